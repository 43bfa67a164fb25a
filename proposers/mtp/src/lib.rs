#![doc = include_str!("docs.md")]
#![forbid(unsafe_code)]

mod config;
mod drafter;
#[cfg(feature = "test-support")]
pub mod tiny;

use std::path::Path;

use polyattn_api::{
    Drafter, LoadContext, ModelConfig, Proposer, ProposerError, ProposerRequirements, TargetFacts, register_proposer,
};

pub use config::MtpConfig;
pub use drafter::{Form, load};

/// The descriptor of multi-token prediction.
#[derive(Debug, Default)]
pub struct Mtp;

register_proposer!(Mtp);

impl Proposer for Mtp {
    fn name(&self) -> &'static str {
        "mtp"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none()
            .last_hidden()
            .checkpoint()
            .in_target_checkpoint()
            .draft_attention()
            .tree_attention()
            .drafts_trees();
        &NEEDS
    }

    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        let config = MtpConfig::open(checkpoint)?;
        config.check(target)?;
        Ok(Some(config.model_config()))
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(drafter::load(context)?))
    }
}
