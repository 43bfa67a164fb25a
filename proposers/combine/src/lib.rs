//! Two ways to draft: a look-up in the text, which costs nothing, and DFlash.
//!
//! `choose` says who drafts for a sequence in a step:
//! * `first`, the default: the n-gram look-up where it finds something, DFlash otherwise.
//! * `confident`: suffix decoding where the tokens it expects to stand, from its counts, are at least as many as DFlash
//!   had accepted lately in this sequence, DFlash otherwise.
//!
//! DFlash runs for the sequences that are left to it, and not at all where there are none. The checkpoint is DFlash's.
//!
//! Source: vLLM and TGI let prompt look-up stand in front of a neural drafter; see also "SuffixDecoding" (arXiv
//! 2411.04975, §4), whose hybrid compares scores likewise.

#![forbid(unsafe_code)]

mod drafter;

use std::{path::Path, sync::LazyLock};

use polyattn_api::{
    Drafter, EngineConfig, LoadContext, ModelConfig, Proposer, ProposerError, ProposerRequirements, TargetFacts,
    register_proposer,
};
use polyattn_dflash::DFlash;
use polyattn_ngram::NGram;
use polyattn_suffix::Suffix;
use serde::Deserialize;

pub use drafter::CombinedDrafter;

/// The descriptor of combined drafting.
#[derive(Debug, Default)]
pub struct Combine;

register_proposer!(Combine);

/// Who drafts, where both could.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Choose {
    /// The look-up where it finds something.
    #[default]
    First,
    /// The one that expects more tokens to stand.
    Confident,
}

/// The parameters of combined drafting, read from `speculative.parameters`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Who drafts.
    pub choose: Choose,
}

impl Proposer for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }

    fn requirements(&self) -> &ProposerRequirements {
        static NEEDS: LazyLock<ProposerRequirements> = LazyLock::new(|| DFlash.requirements().remembers_requests());
        &NEEDS
    }

    fn draft_config(&self, target: &EngineConfig) -> EngineConfig {
        DFlash.draft_config(target)
    }

    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        DFlash.describe(checkpoint, target)
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        let Settings { choose } = context.settings(self.name())?;
        // The parameters were for this one.
        let mut parts = *context;
        parts.parameters = None;
        let look_up = match choose {
            Choose::First => NGram.load(&parts)?,
            Choose::Confident => Suffix.load(&parts)?,
        };
        Ok(Box::new(CombinedDrafter::new(choose, look_up, DFlash.load(&parts)?)))
    }
}
