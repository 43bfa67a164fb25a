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

pub use config::MedusaConfig;
pub use drafter::{MedusaDrafter, Stages};

/// The descriptor of Medusa.
#[derive(Debug, Default)]
pub struct Medusa;

register_proposer!(Medusa);

impl Proposer for Medusa {
    fn name(&self) -> &'static str {
        "medusa"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none().last_hidden().checkpoint().drafts_trees();
        &NEEDS
    }

    /// There is no attention, but a checkpoint that does not fit is refused early.
    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        MedusaConfig::open(checkpoint)?.check(target)?;
        Ok(None)
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(MedusaDrafter::load(context)?))
    }
}
