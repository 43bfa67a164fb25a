//! The kit for proposers: [`proposer_suite`] and what it is made of.

mod declared;
mod drafts;
mod drive;
mod generation;
mod subject;
mod text;

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use polyattn_api::{Device, ProposerRequirements, RegisteredProposer};

use self::subject::Bench;
pub use self::subject::{ProposerSubject, write_counting_target};
use crate::{Failure, Trial};

type Check = fn(&Bench) -> Result<(), Failure>;

/// The trial of those alone who ask for hidden states.
const OF_TAPS: &str = "drafts/hidden-states-matter";

/// Every trial: its name, and what it does.
const CHECKS: [(&str, Check); 22] = [
    ("declares/requirements-are-honest", declared::requirements_are_honest),
    ("declares/non-causal-is-asked-for", declared::non_causal_is_asked_for),
    ("declares/targets-backend-is-not-inherited", declared::the_targets_backend_is_not_inherited),
    ("declares/what-cannot-be-loaded-is-an-error", declared::what_cannot_be_loaded_is_an_error),
    ("drafts/rejected-rows-leave-no-trace", drafts::rejected_rows_leave_no_trace),
    ("drafts/many-steps-leave-no-trace", drafts::many_steps_leave_no_trace),
    ("drafts/chunks-do-not-matter", drafts::chunks_do_not_matter),
    ("drafts/pages-do-not-matter", drafts::pages_do_not_matter),
    ("drafts/batch-is-as-each-alone", drafts::a_batch_is_as_each_alone),
    ("drafts/sequences-that-take-turns", drafts::sequences_that_take_turns),
    ("drafts/identifier-is-used-again", drafts::an_identifier_is_used_again),
    ("drafts/bounds-are-kept", drafts::widths_and_ids_keep_their_bounds),
    ("drafts/same-question-same-answer", drafts::the_same_question_has_the_same_answer),
    (OF_TAPS, drafts::hidden_states_matter),
    ("drafts/nonsense-is-an-error", drafts::nonsense_is_an_error),
    ("generates/greedy-tokens-of-the-target", generation::greedy_tokens_are_the_targets),
    ("generates/sampled-tokens-of-the-target", generation::sampled_tokens_are_the_targets),
    ("generates/batches-change-no-token", generation::batches_change_no_token),
    ("generates/ends-where-it-must", generation::a_text_ends_where_it_must),
    ("generates/requests-leave-no-trace", generation::requests_leave_no_trace),
    ("generates/enough-is-accepted", generation::enough_is_accepted),
    ("generates/backends-that-ran", generation::the_backends_that_ran_are_told),
];

/// The trials of one proposer on one device. Their names are `PROPOSER/DEVICE/…`, or `PROPOSER/SUBJECT/DEVICE/…` where
/// the subject has one.
///
/// Half of them drive the drafter by hand, with hidden states that are made up and drafts that are accepted and rejected
/// at will: an engine would hide its faults, because whatever is drafted, the emitted tokens are the target's. The others
/// look at what the proposer declares, and run it in `polyattn-engine`.
///
/// | trial | what is found |
/// |---|---|
/// | `declares/…` | requirements that are not those of the drafter, a hook that takes over the target's backend or forgets non-causal attention, a broken checkpoint that is no error |
/// | `drafts/…` | hidden states of rejected rows that are kept, rows that are one off, a history that depends on its chunks, sequences that mix, an identifier that is not forgotten, too many tokens, ids beyond the vocabulary, another answer to the same question, hidden states that are ignored |
/// | `generates/…` | tokens that are not the target's, a text that ends elsewhere, too little accepted |
///
/// What is the same in every run cannot be found by comparing runs: a wrong pairing of rotary embeddings, positions that
/// are all one off, a mask that is too narrow. For these, give the subject a trained model and an
/// [`acceptance_floor`](ProposerSubject::acceptance_floor), and compare each stage with an independent implementation.
///
/// A panic in a proposer fails the trial it happened in, and is named there. Backends are those that the program
/// registered ([`Registry::global`](polyattn_api::Registry::global)).
///
/// # In a crate of one's own
/// A test target without the harness (`harness = false`), with this kit and a backend or two as dev-dependencies:
///
/// ```no_run
/// # #[derive(Debug, Default)] struct Mine;
/// # impl polyattn_api::Proposer for Mine {
/// #     fn name(&self) -> &'static str { "mine" }
/// #     fn requirements(&self) -> &polyattn_api::ProposerRequirements { unimplemented!() }
/// #     fn load(&self, _: &polyattn_api::LoadContext<'_>)
/// #         -> Result<Box<dyn polyattn_api::Drafter>, polyattn_api::ProposerError> { unimplemented!() }
/// # }
/// use std::{process::ExitCode, sync::Arc};
/// use polyattn_api::{Device, Origin, RegisteredProposer};
/// use polyattn_conformance::{ProposerSubject, proposer_suite, run};
/// // The backends that serve the target, and the draft if it runs attention:
/// // use polyattn_cpu as _;
///
/// fn main() -> ExitCode {
///     let origin = Origin { crate_name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") };
///     let mine = RegisteredProposer { origin, proposer: Arc::new(Mine) };
///     let subject = ProposerSubject::new().acceptance_floor(2.0);
///     run(proposer_suite(&mine, &subject, &Device::cpu()))
/// }
/// ```
#[must_use]
pub fn proposer_suite(proposer: &RegisteredProposer, subject: &ProposerSubject, device: &Device) -> Vec<Trial> {
    let bench = Arc::new(Bench::new(proposer, subject, device));
    let name = contained(|| proposer.proposer.name()).unwrap_or("a proposer without a name");
    let device = &device.facts().name;
    let subject = subject.name.as_ref().map_or(String::new(), |subject| format!("/{subject}"));
    let needs = |needs: &ProposerRequirements| needs.taps || needs.last_hidden;
    let taps = contained(|| needs(proposer.proposer.requirements())).unwrap_or(true);
    CHECKS
        .into_iter()
        .filter(|(check_name, _)| taps || *check_name != OF_TAPS)
        .map(|(check_name, check)| {
            let bench = Arc::clone(&bench);
            Trial::new(format!("{name}{subject}/{device}/{check_name}"), move || {
                contained(|| check(&bench)).unwrap_or_else(Err)
            })
        })
        .collect()
}

/// An error of the engine, a plugin or the machine as a failure.
fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::new(error.to_string())
}

/// Calls what may panic, because a proposer's code runs in it.
fn contained<T>(call: impl FnOnce() -> T) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| Failure::new(format!("it panicked: {}", said(&*payload))))
}

fn said(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
