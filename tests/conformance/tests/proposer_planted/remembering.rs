//! A drafter that is simple enough to be right, and what can be wrong with it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use polyattn_api::{
    BackendChoice, CommittedRows, Device, DraftSequence, Drafter, EngineConfig, LoadContext, Outcome, Proposal,
    ProposeContext, Proposer, ProposerError, ProposerRequirements, TapSpec, default_draft_config,
};

/// What is wrong with a drafter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    KeepsRejectedRows,
    KeepsTheFirstRejectedRow,
    LosesTheLastAcceptedRow,
    TakesTheRowBehind,
    TakesRowsFromTheStartOfTheTaps,
    KeepsOnlyTheLastChunk,
    LosesARowEveryTenthCommit,
    OrdersRowsByPages,
    IgnoresForget,
    MixesSequences,
    TakesTheFirstSequencesAnchor,
    IgnoresHiddenStates,
    IsContentWithoutTaps,
    OmitsTheAnchor,
    RepeatsTheAnchor,
    DraftsBeyondTheVocabulary,
    DraftsMoreThanAsked,
    DraftsNothing,
    AnswersDifferentlyEachTime,
    TiresWithTime,
    PanicsInPropose,
    PanicsOnLoad,
    HidesThatItTaps,
    TapsALayerThatIsNotThere,
    NeedsNonCausalAndDoesNotAsk,
    AsksForNonCausalUnneeded,
    InheritsTheTargetsBackend,
    InheritsTheTargetsBackendsPerKind,
    InheritsTheTargetsCausality,
    LoadsWithoutItsCheckpoint,
}

/// Tokens it drafts at the most.
const MOST: u32 = 5;

/// A drafter that remembers the hidden states of every token. The next token is the one that the target's head sees in
/// the embedding of the last, with a share of all remembered states that wanes with their distance.
#[derive(Debug)]
pub(crate) struct Remembering {
    fault: Fault,
    needs: ProposerRequirements,
}

impl Remembering {
    pub(crate) fn made(fault: Fault) -> Arc<dyn Proposer> {
        let mut needs = ProposerRequirements::none();
        needs.taps = fault != Fault::HidesThatItTaps;
        needs.non_causal = fault == Fault::NeedsNonCausalAndDoesNotAsk;
        needs.checkpoint = fault == Fault::LoadsWithoutItsCheckpoint;
        Arc::new(Self { fault, needs })
    }
}

impl Proposer for Remembering {
    fn name(&self) -> &'static str {
        "remembering"
    }

    fn requirements(&self) -> &ProposerRequirements {
        &self.needs
    }

    fn draft_config(&self, target: &EngineConfig) -> EngineConfig {
        let mut draft = default_draft_config(target);
        match self.fault {
            Fault::AsksForNonCausalUnneeded => draft.attention.use_non_causal = true,
            Fault::InheritsTheTargetsBackend if draft.attention.backend == BackendChoice::Auto => {
                draft.attention.backend = target.attention.backend.clone();
            }
            Fault::InheritsTheTargetsBackendsPerKind => {
                draft.attention.backend_per_kind = target.attention.backend_per_kind.clone();
            }
            Fault::InheritsTheTargetsCausality => draft.attention.use_non_causal = target.attention.use_non_causal,
            _ => {}
        }
        draft
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        assert!(self.fault != Fault::PanicsOnLoad, "at a loss");
        let layer = if self.fault == Fault::TapsALayerThatIsNotThere { 9 } else { context.target.layers - 1 };
        Ok(Box::new(Memory {
            fault: self.fault,
            device: context.device.clone(),
            taps: TapSpec::of_layers(vec![layer]),
            width: context.target.hidden_size as usize,
            texts: BTreeMap::new(),
            proposed: 0,
            commits: 0,
            asked: AtomicU32::new(0),
        }))
    }
}

#[derive(Debug)]
struct Memory {
    fault: Fault,
    device: Device,
    taps: TapSpec,
    width: usize,
    /// For each sequence the states of its committed tokens.
    texts: BTreeMap<u64, Vec<Vec<f32>>>,
    /// Tokens of the last proposal.
    proposed: u32,
    commits: u32,
    asked: AtomicU32,
}

impl Memory {
    fn key(&self, id: u64) -> u64 {
        if self.fault == Fault::MixesSequences { 0 } else { id }
    }

    fn remember(&mut self, committed: &CommittedRows<'_>, taps: &[f32]) -> Result<(), ProposerError> {
        let accepted = committed.count();
        let first_row = committed.rows.first().copied().unwrap_or(0);
        let verified = self.proposed > 0;
        let (first, rows) = match self.fault {
            Fault::KeepsRejectedRows if verified => (first_row, self.proposed + 1),
            Fault::KeepsTheFirstRejectedRow if verified => (first_row, (accepted + 1).min(self.proposed + 1)),
            Fault::LosesTheLastAcceptedRow if verified => (first_row, accepted - 1),
            Fault::TakesTheRowBehind => (first_row + 1, accepted),
            Fault::TakesRowsFromTheStartOfTheTaps => (0, accepted),
            _ => (first_row, accepted),
        };
        self.commits += 1;
        let (fault, width) = (self.fault, self.width);
        let text = self.texts.entry(self.key(committed.id)).or_default();
        if fault == Fault::None && text.len() != committed.position as usize {
            let message = format!("rows from {} on, after {} rows", committed.position, text.len());
            return Err(ProposerError::Unsupported(message));
        }
        match fault {
            Fault::KeepsOnlyTheLastChunk => text.clear(),
            Fault::LosesARowEveryTenthCommit if self.commits.is_multiple_of(10) => drop(text.pop()),
            _ => {}
        }
        let last = taps.len() / width - 1;
        text.extend((first..first + rows).map(|row| taps[(row as usize).min(last) * width..][..width].to_vec()));
        Ok(())
    }

    fn draft(&self, context: &mut ProposeContext<'_>, sequence: &DraftSequence<'_>) -> Result<Vec<u32>, ProposerError> {
        let anchor = match self.fault {
            Fault::OmitsTheAnchor => sequence.tokens.len().checked_sub(2),
            _ => sequence.tokens.len().checked_sub(1),
        };
        let Some(mut token) = anchor.and_then(|place| sequence.tokens.get(place).copied()) else {
            return Ok(Vec::new());
        };
        let rows = self.texts.get(&self.key(sequence.id)).map_or(&[][..], Vec::as_slice);
        let mut drafts = Vec::new();
        if self.fault == Fault::RepeatsTheAnchor {
            drafts.push(token);
        }
        while drafts.len() < sequence.width.min(MOST) as usize {
            let embedded = self.device.alloc(self.width as u64 * 4, "embedded")?;
            let ids = self.device.upload(&[token], "id")?;
            context.target.embed(context.commands, ids.whole(), 1, embedded.whole())?;
            let mut hidden = self.device.download::<f32>(&embedded)?;
            self.add_memories(&mut hidden, rows, sequence, drafts.len());
            let scale = (hidden.iter().map(|x| x * x).sum::<f32>() / self.width as f32).sqrt().recip();
            hidden.iter_mut().for_each(|x| *x *= scale);
            let hidden = self.device.upload(&hidden, "hidden state")?;
            context.target.head_argmax(context.commands, hidden.whole(), 1, 0, ids.whole())?;
            token = self.device.download::<u32>(&ids)?[0];
            drafts.push(token);
        }
        Ok(drafts)
    }

    fn add_memories(&self, hidden: &mut [f32], rows: &[Vec<f32>], sequence: &DraftSequence<'_>, ahead: usize) {
        let share = if self.fault == Fault::IgnoresHiddenStates { 0.0 } else { 0.3 };
        for (position, row) in rows.iter().enumerate() {
            let mut distance = rows.len() - position + ahead;
            if self.fault == Fault::OrdersRowsByPages {
                distance += sequence.pages.get(position / 16).copied().unwrap_or(0) as usize;
            }
            let weight = share * 0.97f32.powi(distance as i32) * (distance as f32).cos();
            hidden.iter_mut().zip(row).for_each(|(x, state)| *x += weight * state);
        }
    }
}

impl Drafter for Memory {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        MOST
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        assert!(self.fault != Fault::PanicsInPropose, "at a loss");
        let mut all = Vec::new();
        for sequence in context.sequences {
            let mut sequence = *sequence;
            if self.fault == Fault::TakesTheFirstSequencesAnchor {
                sequence.tokens = context.sequences[0].tokens;
            }
            let mut drafts = self.draft(context, &sequence)?;
            match self.fault {
                Fault::DraftsMoreThanAsked => drafts.push(1),
                Fault::DraftsBeyondTheVocabulary => drafts[0] += 1_000,
                Fault::DraftsNothing => drafts.clear(),
                Fault::TiresWithTime if self.asked.fetch_add(1, Ordering::Relaxed) > 12 => drafts.truncate(1),
                Fault::AnswersDifferentlyEachTime => drafts[0] = self.asked.fetch_add(1, Ordering::Relaxed),
                _ => {}
            }
            self.proposed = drafts.len() as u32;
            all.push(drafts.into());
        }
        Ok(Proposal::Host(all))
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        let Some(taps) = outcome.taps else {
            return match self.fault {
                Fault::IsContentWithoutTaps => Ok(()),
                _ => Err(ProposerError::Unsupported("no hidden states to remember".into())),
            };
        };
        let taps = self.device.download::<f32>(taps)?;
        for committed in outcome.sequences {
            self.remember(committed, &taps)?;
        }
        self.proposed = 0;
        Ok(())
    }

    fn forget(&mut self, sequence: u64) {
        if self.fault != Fault::IgnoresForget {
            let key = self.key(sequence);
            self.texts.remove(&key);
        }
    }
}
