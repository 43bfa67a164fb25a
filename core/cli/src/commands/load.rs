//! From what the command line says to an engine: which model, which drafter, on which device.

use std::path::{Path, PathBuf};

use crate::{
    api::Registry,
    device::Device,
    engine::{Engine, EngineOptions, SpeculativeOptions},
    models::{self, KnownModel},
    nn::load::{ChatMessage, ModelSource},
};
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    fetch,
    options::{ProposerChoice, SpeculativeChoice},
};
use crate::{failure::Failure, interrupt, output};

/// The model that is used where none is named.
const DEFAULT_MODEL: &str = "smollm2";

/// A model that was found and opened.
pub(super) struct Model {
    /// What it is called in answers: its name, or its path.
    pub(super) name: String,
    pub(super) source: ModelSource,
    known: Option<&'static KnownModel>,
}

impl Model {
    /// Finds a model by name or path. The default one is fetched where it is missing, unless `offline` forbids it.
    pub(super) fn open(wanted: Option<&str>, offline: bool) -> Result<Self, Failure> {
        let name = wanted.unwrap_or(DEFAULT_MODEL);
        let known = models::known(name).filter(|_| wanted.is_none() || !Path::new(name).exists());
        let path = match known {
            None => PathBuf::from(name),
            Some(model) => match models::locate(model.name) {
                Some(path) => path,
                None if wanted.is_none() && !offline => {
                    output::note(&format!(
                        "the default model {} is not in the cache: downloading it ({})",
                        model.name,
                        output::bytes(model.bytes)
                    ));
                    fetch::fetch(model, interrupt::flag())?.path
                }
                None => {
                    let name = model.name;
                    return Err(Failure::new(format!(
                        "--model: {name} is not in the cache; fetch it with: polyattn fetch {name}"
                    )));
                }
            },
        };
        if known.is_none() && !path.exists() {
            return Err(Failure::new(format!(
                "--model: '{name}' is no file or folder, and no known model; known are: {}",
                models::names()
            )));
        }
        Ok(Self { name: known.map_or(name, |model| model.name).to_owned(), source: ModelSource::open(&path)?, known })
    }

    /// The ids of a prompt: a question in the model's chat template, or a text to go on from.
    ///
    /// # Errors
    /// `chat` for a model without a template.
    pub(super) fn prompt(&self, text: &str, chat: bool) -> Result<Vec<u32>, Failure> {
        let source = &self.source;
        if chat {
            let template = source.chat_template.as_ref().ok_or_else(|| {
                Failure::new(format!(
                    "--chat: {} has no chat template; leave --chat out to go on from the text",
                    self.name
                ))
            })?;
            return Ok(template.encode(&source.tokenizer, &[ChatMessage::user(text)], true)?);
        }
        let mut ids = source.tokenizer.encode_text(text)?;
        if let (true, Some(bos)) = (source.config.add_bos, source.config.bos) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Whether it is known and its trained drafter is at hand.
    pub(super) fn has_drafter(&self) -> bool {
        self.known.is_some_and(|model| models::locate_drafter(model.name).is_some())
    }

    /// The speculative decoding that a choice means for this model: its own drafter where nothing was said and it has
    /// one.
    pub(super) fn speculative(&self, choice: &SpeculativeChoice) -> Result<Option<SpeculativeOptions>, Failure> {
        let drafter = || self.known.and_then(|model| models::locate_drafter(model.name));
        let (method, model) = match (&choice.proposer, &choice.draft_model) {
            (ProposerChoice::None, _) => return Ok(None),
            (ProposerChoice::Named(name), Some(model)) => (name.clone(), Some(model.clone())),
            (ProposerChoice::Named(name), None) if matches!(&**name, "dflash" | "combine") => (name.clone(), drafter()),
            (ProposerChoice::Named(name), None) => (name.clone(), None),
            (ProposerChoice::Unset, Some(model)) => ("dflash".into(), Some(model.clone())),
            (ProposerChoice::Unset, None) => match drafter() {
                Some(folder) => ("dflash".into(), Some(folder)),
                None if *choice == SpeculativeChoice::default() => return Ok(None),
                None => {
                    return Err(Failure::new(format!(
                        "--speculative-config: {} has no drafter of its own; name a proposer with --proposer",
                        self.name
                    )));
                }
            },
        };
        if let Some(path) = &model
            && !path.exists()
        {
            return Err(Failure::new(format!("--draft-model: there is nothing at '{}'", path.display())));
        }
        if model.is_some()
            && let Some(entry) = Registry::global()?.proposer(&method)
            && !entry.proposer.requirements().checkpoint
        {
            output::note(&format!("--draft-model is not used: proposer '{method}' needs none"));
        }
        Ok(Some(SpeculativeOptions {
            method,
            parameters: choice.parameters.clone(),
            attention_backend: choice.attention_backend.clone(),
            moe_backend: choice.moe_backend.clone(),
            num_speculative_tokens: choice.num_speculative_tokens,
            model,
            tree: choice.tree.clone(),
            tree_nodes: choice.tree_nodes,
            acceptance: choice.acceptance.clone(),
            length: choice.length.clone(),
            ..SpeculativeOptions::default()
        }))
    }

    /// Loads it, with a progress bar on standard error.
    pub(super) fn engine(&self, device: &Device, options: &EngineOptions) -> Result<Engine, Failure> {
        let bar = ProgressBar::new(self.source.checkpoint.stored_bytes() as u64);
        if let Ok(style) = ProgressStyle::with_template("loading {msg} {wide_bar} {bytes}/{total_bytes}") {
            bar.set_style(style);
        }
        bar.set_message(self.name.clone());
        let engine = Engine::load(&self.source, device, Registry::global()?, options, &mut |bytes| bar.inc(bytes));
        bar.finish_and_clear();
        Ok(engine?)
    }
}
