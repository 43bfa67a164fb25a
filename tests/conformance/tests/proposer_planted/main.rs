//! The kit for proposers against drafters that are wrong on purpose: each fault is found, by the trial meant for it.

mod misled;
mod remembering;

use std::{collections::BTreeMap, sync::Arc};

use misled::{Misled, Told};
use polyattn_api::{Device, Origin, Proposer, RegisteredProposer};
use polyattn_conformance::{ProposerSubject, proposer_suite};
use polyattn_cpu as _;
use polyattn_dflash::tiny::write_random;
use remembering::{Fault, Remembering};

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
