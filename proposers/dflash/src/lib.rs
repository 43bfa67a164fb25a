#![doc = include_str!("docs.md")]
#![forbid(unsafe_code)]

mod config;
mod drafter;
#[cfg(feature = "test-support")]
pub mod tiny;

use std::path::Path;

use polyattn_api::{
    Drafter, EngineConfig, LoadContext, ModelConfig, Proposer, ProposerError, ProposerRequirements, TargetFacts,
    default_draft_config, register_proposer,
};

pub use config::DFlashConfig;
pub use drafter::{DFlashDrafter, Stages};

/// The descriptor of DFlash.
#[derive(Debug, Default)]
pub struct DFlash;

register_proposer!(DFlash);

impl Proposer for DFlash {
    fn name(&self) -> &'static str {
        "dflash"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements =
            ProposerRequirements::none().taps().checkpoint().draft_attention().non_causal().drafts_trees();
        &NEEDS
    }

    /// A block sees itself both ways.
    fn draft_config(&self, target: &EngineConfig) -> EngineConfig {
        let mut draft = default_draft_config(target);
        draft.attention.use_non_causal = true;
        draft
    }

    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        let config = DFlashConfig::open(checkpoint)?;
        config.check(target)?;
        Ok(Some(config.model_config()))
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(DFlashDrafter::load(context)?))
    }
}
