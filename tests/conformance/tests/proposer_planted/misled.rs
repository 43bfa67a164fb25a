//! A drafter of this repository that is told the wrong rows.

use std::path::Path;

use polyattn_api::{
    Drafter, EngineConfig, LoadContext, ModelConfig, Outcome, Proposal, ProposeContext, Proposer, ProposerError,
    ProposerRequirements, TapSpec, TargetFacts,
};
use polyattn_dflash::DFlash;

/// What is wrong with the way that a drafter of a repository is told what was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Right,
    TheRowBehind,
    OneRowTooFew,
    NothingOfTheFirstChunk,
    /// And what it drafted is passed on with another token in the place of the anchor.
    AnotherAnchor,
}

/// DFlash, told wrongly: a drafter with a paged cache of its own, so that what is wrong must show in logits.
#[derive(Debug)]
pub(crate) struct Misled(pub(crate) Told);

impl Proposer for Misled {
    fn name(&self) -> &'static str {
        "misled"
    }

    fn requirements(&self) -> &ProposerRequirements {
        DFlash.requirements()
    }

    fn draft_config(&self, target: &EngineConfig) -> EngineConfig {
        DFlash.draft_config(target)
    }

    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        DFlash.describe(checkpoint, target)
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(MisledDrafter { drafter: DFlash.load(context)?, told: self.0 }))
    }
}

#[derive(Debug)]
struct MisledDrafter {
    drafter: Box<dyn Drafter>,
    told: Told,
}

impl Drafter for MisledDrafter {
    fn taps(&self) -> &TapSpec {
        self.drafter.taps()
    }

    fn max_tokens(&self) -> u32 {
        self.drafter.max_tokens()
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        let proposal = self.drafter.propose(context)?;
        if let (Told::AnotherAnchor, Proposal::Device { ids, .. }) = (self.told, &proposal) {
            context.commands.device().write(ids, 0, &[7u32])?;
        }
        Ok(proposal)
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        let mut rows: Vec<Vec<u32>> = outcome.sequences.iter().map(|committed| committed.rows.to_vec()).collect();
        for (rows, committed) in rows.iter_mut().zip(outcome.sequences) {
            match self.told {
                Told::Right | Told::AnotherAnchor => {}
                Told::TheRowBehind if rows.len() < 20 => rows.iter_mut().for_each(|row| *row += 1),
                Told::TheRowBehind => {}
                Told::OneRowTooFew => rows.truncate((rows.len() - 1).max(1)),
                Told::NothingOfTheFirstChunk if committed.position == 0 => return Ok(()),
                Told::NothingOfTheFirstChunk => {}
            }
        }
        let mut sequences = outcome.sequences.to_vec();
        sequences.iter_mut().zip(&rows).for_each(|(committed, rows)| committed.rows = rows);
        self.drafter.commit(&mut Outcome::new(outcome.commands, &sequences, outcome.taps, outcome.target))
    }
}
