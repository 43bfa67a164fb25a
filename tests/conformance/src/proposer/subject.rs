//! What a proposer is tried on: a model to draft for, a draft model, and what is expected of them.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use polyattn_api::{
    Device, EngineConfig, LayerConfig, ModelConfig, ProposerError, RegisteredProposer, Registry, SpeculativeConfig,
    StrategyConfig, TargetFacts, WindowConfig,
};
use polyattn_engine::{Engine, EngineError, EngineOptions, SpeculativeOptions};
use polyattn_nn::{
    decoder::Decoder,
    load::{Architecture, LayerWeight, ModelSource, WeightName, tiny::TinyModel},
};
use tempfile::TempDir;

use crate::Failure;

/// Tokens that the trials' sequences can grow to.
pub(super) const CONTEXT: u32 = 320;

/// The cycle of the counting target: it says 0, 1, … , 26, 0, … within each block of as many ids.
pub(super) const CYCLE: u32 = 27;

/// What to try a proposer on: by default a tiny model that the kit makes, no draft model, and no expectation of how much
/// is accepted beyond that something is drafted.
///
/// ```
/// use polyattn_conformance::ProposerSubject;
///
/// // A method without a model that should accept most of a text that repeats itself.
/// let lookup = ProposerSubject::new().acceptance_floor(3.0);
/// // A method with a model: a random one is written for the tiny target.
/// let drafter = ProposerSubject::new().make_checkpoint(|target, folder| {
///     std::fs::write(folder.join("config.json"), format!("{{\"hidden_size\": {}}}", target.hidden_size))
/// });
/// // A released pair of models.
/// let trained = ProposerSubject::new().target("models/llama").checkpoint("models/drafter").acceptance_floor(2.0);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ProposerSubject {
    target: Option<PathBuf>,
    draft: DraftModel,
    pub(super) floor: Option<f64>,
    prompts: Option<Vec<Vec<u32>>>,
    tolerance: Option<f32>,
    pub(super) name: Option<String>,
}

#[derive(Clone, Debug, Default)]
enum DraftModel {
    #[default]
    None,
    At(PathBuf),
    Made(Maker),
}

#[derive(Clone)]
#[expect(clippy::type_complexity, reason = "it is named here, and nowhere else")]
struct Maker(Arc<dyn Fn(&TargetFacts, &Path) -> io::Result<()> + Send + Sync>);

impl fmt::Debug for Maker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Maker")
    }
}

impl ProposerSubject {
    /// The kit's tiny target, and no draft model.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A name for the trials, where a proposer is tried on several subjects.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Drafts for this model, a GGUF file or a Hugging Face folder, instead of the kit's own.
    #[must_use]
    pub fn target(mut self, path: impl Into<PathBuf>) -> Self {
        self.target = Some(path.into());
        self
    }

    /// Drafts with this checkpoint. It must fit the target.
    #[must_use]
    pub fn checkpoint(mut self, path: impl Into<PathBuf>) -> Self {
        self.draft = DraftModel::At(path.into());
        self
    }

    /// Drafts with a checkpoint that `make` writes into an empty folder, for a target of these facts. Random weights
    /// will do, of the size of an embedding (a few hundred ids, width 64): the trials compare drafts with drafts.
    #[must_use]
    pub fn make_checkpoint(
        mut self,
        make: impl Fn(&TargetFacts, &Path) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.draft = DraftModel::Made(Maker(Arc::new(make)));
        self
    }

    /// The mean acceptance length (1 + accepted tokens ÷ steps with a draft, greedy, at the default width) below which
    /// the proposer fails. Without a target of the author's it is measured on one that counts in circles, so that a
    /// method that only looks at tokens reaches its width plus 1.
    #[must_use]
    pub fn acceptance_floor(mut self, mean_length: f64) -> Self {
        self.floor = Some(mean_length);
        self
    }

    /// Ids of the prompts to generate from, for an author's own target; otherwise they are made up.
    #[must_use]
    pub fn prompts(mut self, prompts: Vec<Vec<u32>>) -> Self {
        self.prompts = Some(prompts);
        self
    }

    /// How far logits of the same draft may lie apart, relative to the largest of their row, where the draft was
    /// computed from chunks or batches of other sizes; 0.02 by default, for a cache of 16 bits.
    #[must_use]
    pub fn tolerance(mut self, relative: f32) -> Self {
        self.tolerance = Some(relative);
        self
    }

    pub(super) fn has_target(&self) -> bool {
        self.target.is_some()
    }

    pub(super) fn relative_tolerance(&self) -> f32 {
        self.tolerance.unwrap_or(0.02)
    }
}

/// A proposer, what to try it on, and where: shared by all trials.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) proposer: RegisteredProposer,
    pub(super) subject: ProposerSubject,
    pub(super) device: Device,
    random: OnceLock<Result<Ground, Failure>>,
    counting: OnceLock<Result<Ground, Failure>>,
}

impl Bench {
    pub(super) fn new(proposer: &RegisteredProposer, subject: &ProposerSubject, device: &Device) -> Self {
        Self {
            proposer: proposer.clone(),
            subject: subject.clone(),
            device: device.clone(),
            random: OnceLock::new(),
            counting: OnceLock::new(),
        }
    }

    /// The author's target, or one of random weights.
    pub(super) fn ground(&self) -> Result<&Ground, Failure> {
        let ground = self.random.get_or_init(|| Ground::open(self, |folder| tiny().write_hf_folder(folder)));
        ground.as_ref().map_err(Clone::clone)
    }

    /// The author's target, or one that counts in circles.
    pub(super) fn known_ground(&self) -> Result<&Ground, Failure> {
        if self.subject.target.is_some() {
            return self.ground();
        }
        self.counting.get_or_init(|| Ground::open(self, write_counting_target)).as_ref().map_err(Clone::clone)
    }
}

fn tiny() -> TinyModel {
    TinyModel::new(Architecture::Llama)
}

/// Writes a target, a Hugging Face folder, whose layers add nothing and whose head holds the embedding of each id's
/// predecessor, in circles of 27 ids: what it says next is known. [`ProposerSubject::acceptance_floor`] is measured on
/// it.
///
/// # Errors
/// If a file cannot be written.
pub fn write_counting_target(folder: &Path) -> io::Result<()> {
    let tiny = TinyModel { tied_embedding: false, ..tiny() };
    let mut weights = tiny.weights();
    let embedding = weights.iter().find(|(name, ..)| *name == WeightName::TokenEmbedding);
    let embedding = embedding.map(|(_, _, values)| values.clone()).unwrap_or_default();
    for (name, shape, values) in &mut weights {
        match name {
            WeightName::Layer(_, LayerWeight::AttentionOutput | LayerWeight::Down) => values.fill(0.0),
            WeightName::OutputNorm => values.fill(1.0),
            WeightName::Output => {
                for (id, row) in values.chunks_mut(shape[1]).enumerate() {
                    let before = predecessor(id as u32) as usize * shape[1];
                    row.copy_from_slice(&embedding[before..before + shape[1]]);
                }
            }
            _ => {}
        }
    }
    tiny.write_hf_folder_of(weights, folder)
}

fn predecessor(id: u32) -> u32 {
    id / CYCLE * CYCLE + (id % CYCLE + CYCLE - 1) % CYCLE
}

/// A target with the draft model made for it.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) source: ModelSource,
    pub(super) facts: TargetFacts,
    pub(super) registry: Registry,
    pub(super) checkpoint: Option<PathBuf>,
    pub(super) prompts: Vec<Vec<u32>>,
    proposer: RegisteredProposer,
    device: Device,
    decoder: OnceLock<Result<Arc<Decoder>, Failure>>,
    /// Holds what the kit wrote.
    _folder: TempDir,
}

impl Ground {
    fn open(bench: &Bench, write: impl Fn(&Path) -> io::Result<()>) -> Result<Self, Failure> {
        let registry = Registry::global().and_then(|all| all.with_proposer(bench.proposer.clone()));
        let registry = registry.map_err(|error| Failure::new(error.to_string()))?;
        let proposer = &bench.proposer.proposer;
        if proposer.requirements().checkpoint && matches!(bench.subject.draft, DraftModel::None) {
            let name = proposer.name();
            return Err(Failure::new(format!(
                "proposer '{name}' requires a checkpoint, and the subject has none: give it one with checkpoint() or \
                 make_checkpoint()"
            )));
        }
        let folder = tempfile::tempdir().map_err(|error| Failure::new(format!("no folder for models: {error}")))?;
        let target = match &bench.subject.target {
            Some(path) => path.clone(),
            None => {
                let target = new_folder(&folder, "target")?;
                write(&target).map_err(|error| Failure::new(format!("the kit's target: {error}")))?;
                target
            }
        };
        let source = ModelSource::open(&target).map_err(|error| Failure::new(error.to_string()))?;
        let model = &source.config;
        let facts = TargetFacts::new(model.layers, model.hidden_size, model.vocab_size, model.context_length)
            .loaded_from(&target);
        let checkpoint = match &bench.subject.draft {
            DraftModel::None => None,
            DraftModel::At(path) => Some(path.clone()),
            DraftModel::Made(Maker(make)) => {
                let draft = new_folder(&folder, "draft")?;
                make(&facts, &draft).map_err(|error| Failure::new(format!("the draft model: {error}")))?;
                Some(draft)
            }
        };
        let prompts = bench.subject.prompts.clone().unwrap_or_else(|| made_up_prompts(facts.vocab_size));
        let (proposer, device) = (bench.proposer.clone(), bench.device.clone());
        let decoder = OnceLock::new();
        Ok(Self { source, facts, registry, checkpoint, prompts, proposer, device, decoder, _folder: folder })
    }

    pub(super) fn name(&self) -> &'static str {
        self.proposer.proposer.name()
    }

    /// The target's layers by themselves, for who lends a drafter its embedding and its head.
    pub(super) fn decoder(&self) -> Result<Arc<Decoder>, Failure> {
        let load = || Decoder::load(&self.source, &self.device, CONTEXT, &mut |_| {});
        let decoder =
            self.decoder.get_or_init(|| load().map(Arc::new).map_err(|error| Failure::new(error.to_string())));
        decoder.clone()
    }

    /// A configuration as an engine would make it, and the draft's layers in it.
    pub(super) fn config(&self) -> Result<EngineConfig, Failure> {
        let model = &self.source.config;
        let fail = |error: &dyn fmt::Display| Failure::new(error.to_string());
        let mut layer = LayerConfig::gqa("full", model.layers, model.query_heads, model.kv_heads, model.head_dim);
        layer.window = model.window(0).map(WindowConfig::Keys);
        let target = ModelConfig { dtype: polyattn_api::DType::F16, layers: vec![layer] };
        let config = serde_json::json!({ "target": target, "kv_cache": { "page_size": super::text::PAGE } });
        let mut config: EngineConfig = serde_json::from_value(config).map_err(|error| fail(&error))?;
        let draft = match &self.checkpoint {
            Some(path) => self.proposer.proposer.describe(path, &self.facts).map_err(|error| fail(&error))?,
            None => None,
        };
        config.speculative = Some(SpeculativeConfig { method: self.name().into(), draft, ..Default::default() });
        Ok(config)
    }

    /// An engine for several requests at once, in trees or not, under this acceptance rule; `None` where the proposer
    /// says that it drafts for one.
    pub(super) fn batch_engine(&self, tree: bool, rule: &str) -> Result<Option<Engine>, Failure> {
        let speculative = SpeculativeOptions {
            method: self.name().into(),
            model: self.checkpoint.clone(),
            tree: tree.then(|| StrategyConfig::new("top-k")),
            acceptance: Some(StrategyConfig::new(rule)),
            ..SpeculativeOptions::default()
        };
        let options =
            EngineOptions::default().with_context(CONTEXT).with_sequences(3).with_speculative(Some(speculative));
        match Engine::load(&self.source, &self.device, &self.registry, &options, &mut |_| {}) {
            Ok(engine) => Ok(Some(engine)),
            Err(EngineError::Proposer(ProposerError::Unsupported(_))) => Ok(None),
            Err(error) => Err(Failure::new(format!("no engine for {}: {error}", self.name()))),
        }
    }

    /// An engine for this target, with or without the proposer.
    pub(super) fn engine(&self, drafting: bool, context: u32) -> Result<Engine, Failure> {
        let speculative = drafting.then(|| SpeculativeOptions {
            method: self.name().into(),
            model: self.checkpoint.clone(),
            ..SpeculativeOptions::default()
        });
        let options = EngineOptions::default().with_context(context).with_speculative(speculative);
        Engine::load(&self.source, &self.device, &self.registry, &options, &mut |_| {})
            .map_err(|error| Failure::new(format!("no engine for {}: {error}", self.name())))
    }
}

fn new_folder(parent: &TempDir, name: &str) -> Result<PathBuf, Failure> {
    let folder = parent.path().join(name);
    std::fs::create_dir(&folder).map_err(|error| Failure::new(format!("{}: {error}", folder.display())))?;
    Ok(folder)
}

/// A text that repeats itself, one that counts, and one without order.
fn made_up_prompts(vocab: u32) -> Vec<Vec<u32>> {
    let within = |id: u32| id % vocab.max(1);
    let repeating = [5, 9, 17, 33, 5, 9, 17, 40, 41, 42, 5, 9, 17, 33, 70, 5, 9, 17].map(within).to_vec();
    let counting = (0..CYCLE + 4).map(|id| within(CYCLE + id % CYCLE)).collect();
    let wild = (0..37u32).map(|place| within(place.wrapping_mul(2_654_435_761) >> 7)).collect();
    vec![counting, repeating, wild]
}
