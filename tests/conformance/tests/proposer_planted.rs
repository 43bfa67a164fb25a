//! The kit for proposers against drafters that are wrong on purpose: each fault is found, by the trial meant for it.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use polyattn_api::{
    BackendChoice, CommittedRows, Device, DraftSequence, Drafter, EngineConfig, LoadContext, ModelConfig, Origin,
    Outcome, Proposal, ProposeContext, Proposer, ProposerError, ProposerRequirements, RegisteredProposer, TapSpec,
    TargetFacts, default_draft_config,
};
use polyattn_conformance::{ProposerSubject, proposer_suite};
use polyattn_cpu as _;
use polyattn_dflash::{DFlash, tiny::write_random};

/// What is wrong with a drafter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
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

/// For each fault the trial that finds it, and a part of what it says.
const FOUND: [(Fault, &str, &str); 30] = [
    (Fault::KeepsRejectedRows, "drafts/rejected-rows-leave-no-trace", "drafted tokens were accepted"),
    (Fault::KeepsTheFirstRejectedRow, "drafts/rejected-rows-leave-no-trace", "drafted tokens were accepted"),
    (Fault::LosesTheLastAcceptedRow, "drafts/rejected-rows-leave-no-trace", "drafted tokens were accepted"),
    (Fault::TakesTheRowBehind, "drafts/chunks-do-not-matter", "in chunks of"),
    (Fault::TakesRowsFromTheStartOfTheTaps, "drafts/chunks-do-not-matter", "behind 3 rows of others"),
    (Fault::KeepsOnlyTheLastChunk, "drafts/chunks-do-not-matter", "in chunks of"),
    (Fault::LosesARowEveryTenthCommit, "drafts/many-steps-leave-no-trace", "after 14 steps"),
    (Fault::OrdersRowsByPages, "drafts/pages-do-not-matter", "on other pages"),
    (Fault::IgnoresForget, "drafts/identifier-is-used-again", "was used before"),
    (Fault::MixesSequences, "drafts/sequences-that-take-turns", "took turns"),
    (Fault::TakesTheFirstSequencesAnchor, "drafts/batch-is-as-each-alone", "sequence 1 of 3"),
    (Fault::IgnoresHiddenStates, "drafts/hidden-states-matter", "other hidden states change none"),
    (Fault::IsContentWithoutTaps, "drafts/nonsense-is-an-error", "content with a commit that has none"),
    (Fault::OmitsTheAnchor, "generates/enough-is-accepted", "below the floor"),
    (Fault::RepeatsTheAnchor, "generates/enough-is-accepted", "below the floor"),
    (Fault::DraftsBeyondTheVocabulary, "drafts/bounds-are-kept", "the vocabulary ends at"),
    (Fault::DraftsMoreThanAsked, "drafts/bounds-are-kept", "where 1 were wanted"),
    (Fault::DraftsNothing, "generates/enough-is-accepted", "nothing was drafted"),
    (Fault::AnswersDifferentlyEachTime, "drafts/same-question-same-answer", "asked a second time"),
    (Fault::TiresWithTime, "generates/requests-leave-no-trace", "in the first round"),
    (Fault::PanicsInPropose, "drafts/same-question-same-answer", "panicked in propose: at a loss"),
    (Fault::PanicsOnLoad, "declares/what-cannot-be-loaded-is-an-error", "panicked in load: at a loss"),
    (Fault::HidesThatItTaps, "declares/requirements-are-honest", "says taps: false"),
    (Fault::TapsALayerThatIsNotThere, "declares/requirements-are-honest", "taps layer 9 of a target of 2"),
    (Fault::NeedsNonCausalAndDoesNotAsk, "declares/non-causal-is-asked-for", "says non_causal: true"),
    (Fault::AsksForNonCausalUnneeded, "declares/non-causal-is-asked-for", "says non_causal: false"),
    (
        Fault::InheritsTheTargetsBackend,
        "declares/targets-backend-is-not-inherited",
        "is 'of-the-target', it must be automatic",
    ),
    (Fault::InheritsTheTargetsBackendsPerKind, "declares/targets-backend-is-not-inherited", "per phase and kind"),
    (Fault::InheritsTheTargetsCausality, "declares/targets-backend-is-not-inherited", "use_non_causal is true"),
    (Fault::LoadsWithoutItsCheckpoint, "declares/what-cannot-be-loaded-is-an-error", "loads without one"),
];

/// Tokens it drafts at the most.
const MOST: u32 = 5;

/// A drafter that remembers the hidden states of every token. The next token is the one that the target's head sees in
/// the embedding of the last, with a share of all remembered states that wanes with their distance.
#[derive(Debug)]
struct Remembering {
    fault: Fault,
    needs: ProposerRequirements,
}

impl Remembering {
    fn made(fault: Fault) -> Arc<dyn Proposer> {
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
            taps: TapSpec { layers: vec![layer] },
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
        let accepted = committed.rows;
        let verified = self.proposed > 0;
        let (first, rows) = match self.fault {
            Fault::KeepsRejectedRows if verified => (committed.first_row, self.proposed + 1),
            Fault::KeepsTheFirstRejectedRow if verified => (committed.first_row, (accepted + 1).min(self.proposed + 1)),
            Fault::LosesTheLastAcceptedRow if verified => (committed.first_row, accepted - 1),
            Fault::TakesTheRowBehind => (committed.first_row + 1, accepted),
            Fault::TakesRowsFromTheStartOfTheTaps => (0, accepted),
            _ => (committed.first_row, accepted),
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
            all.push(drafts);
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

/// What is wrong with the way that a drafter of a repository is told what was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Right,
    TheRowBehind,
    OneRowTooFew,
    NothingOfTheFirstChunk,
    /// And what it drafted is passed on with another token in the place of the anchor.
    AnotherAnchor,
}

/// DFlash, told wrongly: a drafter with a paged cache of its own, so that what is wrong must show in logits.
#[derive(Debug)]
struct Misled(Told);

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
        let mut sequences = outcome.sequences.to_vec();
        for committed in &mut sequences {
            match self.told {
                Told::Right | Told::AnotherAnchor => {}
                Told::TheRowBehind => committed.first_row += u32::from(committed.rows < 20),
                Told::OneRowTooFew => committed.rows -= u32::from(committed.rows > 1),
                Told::NothingOfTheFirstChunk if committed.position == 0 => return Ok(()),
                Told::NothingOfTheFirstChunk => {}
            }
        }
        self.drafter.commit(&mut Outcome::new(outcome.commands, &sequences, outcome.taps))
    }
}

#[test]
fn a_paged_drafter_that_is_told_wrongly_is_found() {
    let cases = [
        (Told::Right, "", ""),
        (Told::TheRowBehind, "drafts/rejected-rows-leave-no-trace", "logits"),
        (Told::OneRowTooFew, "drafts/rejected-rows-leave-no-trace", "logits"),
        (Told::NothingOfTheFirstChunk, "drafts/chunks-do-not-matter", "logits"),
        (Told::AnotherAnchor, "drafts/bounds-are-kept", "7 in the place of the anchor"),
    ];
    for (told, trial, words) in cases {
        let subject = ProposerSubject::new().make_checkpoint(|target, folder| write_random(target, folder, false));
        let failed = failures_of(Arc::new(Misled(told)), &subject, trial);
        match told {
            Told::Right => assert_eq!(failed, BTreeMap::new()),
            _ => assert!(failed.values().any(|message| message.contains(words)), "{told:?}: {failed:?}"),
        }
    }
}

/// A drafter cannot make the target go on from a token of its own.
#[test]
fn another_anchor_does_not_change_the_tokens() {
    let subject = ProposerSubject::new().make_checkpoint(|target, folder| write_random(target, folder, false));
    for trial in ["generates/greedy-tokens-of-the-target", "generates/sampled-tokens-of-the-target"] {
        assert_eq!(failures_of(Arc::new(Misled(Told::AnotherAnchor)), &subject, trial), BTreeMap::new());
    }
}

#[test]
fn a_checkpoint_that_the_subject_lacks_is_asked_for() {
    let failed = failures_of(Arc::new(Misled(Told::Right)), &ProposerSubject::new(), "drafts/chunks-do-not-matter");
    assert!(failed.values().all(|message| message.contains("'misled' requires a checkpoint")), "{failed:?}");
    assert_eq!(failed.len(), 1);
}

/// The failures of a drafter with a fault, by trial; only of those trials whose name ends so.
fn failures(fault: Fault, wanted: &str) -> BTreeMap<String, String> {
    // Its arithmetic is of 32 bits, and chunks do not change its order.
    let mut subject = ProposerSubject::new().acceptance_floor(5.0).tolerance(1e-4);
    if fault == Fault::LoadsWithoutItsCheckpoint {
        subject = subject.make_checkpoint(|_, _| Ok(()));
    }
    failures_of(Remembering::made(fault), &subject, wanted)
}

fn failures_of(proposer: Arc<dyn Proposer>, subject: &ProposerSubject, wanted: &str) -> BTreeMap<String, String> {
    let origin = Origin { crate_name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") };
    let trials = proposer_suite(&RegisteredProposer { origin, proposer }, subject, &Device::cpu());
    let mut ran = 0;
    let mut failures = BTreeMap::new();
    for trial in trials.into_iter().filter(|trial| trial.name().ends_with(wanted)) {
        ran += 1;
        let name = trial.name().to_owned();
        if let Err(failure) = trial.run() {
            failures.insert(name, failure.message().to_owned());
        }
    }
    assert!(ran > 0, "no trial is called {wanted}");
    failures
}

#[test]
fn a_drafter_without_fault_passes() {
    assert_eq!(failures(Fault::None, ""), BTreeMap::new());
}

#[test]
fn every_fault_is_found_by_its_trial() {
    let mut missed = Vec::new();
    for (fault, trial, words) in FOUND {
        let message = failures(fault, trial).into_values().next();
        if !message.as_ref().is_some_and(|message| message.contains(words)) {
            missed.push(format!("{fault:?}: '{trial}' should say '{words}', it says {message:?}"));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
