//! A smaller model drafts token by token, each from its own last one.
//!
//! Any model that `polyattn-nn` loads will do, latent attention and mixtures of experts included, a GGUF file or a
//! Hugging Face folder, as long as its tokenizer is the target's: every id must stand for the same text, which is
//! checked. The model keeps keys and values of its own at the target's positions, on the target's page tables, and runs
//! attention and experts on the backends that were selected for the draft. A step's first pass runs the committed tokens
//! that it has not seen; the others one drafted token each, fed on from the device. What was rejected is overwritten at
//! the same positions.
//!
//! Source: "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192).

#![forbid(unsafe_code)]

mod drafter;
mod vocabulary;

use std::path::Path;

use polyattn_api::{
    Drafter, LoadContext, ModelConfig, Proposer, ProposerError, ProposerRequirements, TargetFacts, register_proposer,
};
use polyattn_nn::load::{LoadError, ModelSource};

pub use drafter::ModelDrafter;

/// The descriptor of drafting by a model.
#[derive(Debug, Default)]
pub struct DraftModel;

register_proposer!(DraftModel);

impl Proposer for DraftModel {
    fn name(&self) -> &'static str {
        "draft-model"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none().checkpoint().draft_attention();
        &NEEDS
    }

    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        let source = open(checkpoint, target)?;
        let (layers, _) = source.attention_layers().map_err(unreadable)?;
        Ok(Some(ModelConfig { dtype: source.activation_dtype().map_err(unreadable)?, layers }))
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        let path = context.checkpoint.ok_or(ProposerError::NoCheckpoint("draft-model"))?;
        let source = open(path, context.target)?;
        if let Some(target) = &context.target.checkpoint {
            let target = ModelSource::open(target).map_err(unreadable)?;
            vocabulary::check_same(&source.tokenizer, &target.tokenizer)?;
        }
        Ok(Box::new(ModelDrafter::load(context, &source)?))
    }
}

/// Opens the model and compares the numbers.
fn open(path: &Path, target: &TargetFacts) -> Result<ModelSource, ProposerError> {
    let source = ModelSource::open(path).map_err(unreadable)?;
    let (own, targets) = (source.config.vocab_size, target.vocab_size);
    if own > targets {
        return Err(ProposerError::Mismatch(format!(
            "{} has a vocabulary of {own} tokens, the target one of {targets}",
            path.display()
        )));
    }
    Ok(source)
}

fn unreadable(error: LoadError) -> ProposerError {
    ProposerError::Checkpoint(error.to_string())
}
