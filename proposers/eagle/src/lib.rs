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

pub use config::{EagleConfig, Version};
pub use drafter::load;

/// The descriptor of EAGLE.
#[derive(Debug, Default)]
pub struct Eagle;

/// The descriptor of EAGLE-3.
#[derive(Debug, Default)]
pub struct Eagle3;

register_proposer!(Eagle);
register_proposer!(Eagle3);

impl Proposer for Eagle {
    fn name(&self) -> &'static str {
        Version::Eagle1.method()
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements =
            ProposerRequirements::none().last_hidden().checkpoint().draft_attention().tree_attention().drafts_trees();
        &NEEDS
    }

    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        described(checkpoint, target, Version::Eagle1)
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(drafter::load(context, Version::Eagle1)?))
    }
}

impl Proposer for Eagle3 {
    fn name(&self) -> &'static str {
        Version::Eagle3.method()
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements =
            ProposerRequirements::none().taps().checkpoint().draft_attention().tree_attention().drafts_trees();
        &NEEDS
    }

    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        described(checkpoint, target, Version::Eagle3)
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(drafter::load(context, Version::Eagle3)?))
    }
}

fn described(checkpoint: &Path, target: &TargetFacts, version: Version) -> Result<Option<ModelConfig>, ProposerError> {
    let config = EagleConfig::open(checkpoint, version)?;
    config.check(target)?;
    Ok(Some(config.model_config()))
}
