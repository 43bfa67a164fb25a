//! Random problems within the capabilities.

use std::cell::RefCell;

use polyattn_api::{AttentionKind, DType, KvDType, Mask, Phase, Window};
use polyattn_replay::random::Spec;
use proptest::{
    collection, option,
    prelude::any,
    sample::select,
    strategy::Strategy,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner},
};

use super::{
    Trials,
    subject::{Subject, gqa, kind_name, samples},
};
use crate::Failure;

pub(super) fn trials(trials: &mut Trials) {
    let subject = trials.subject.clone();
    for kind in subject.kinds().into_iter().filter(|kind| subject.spec(*kind).is_some()) {
        trials.add(format!("{}/random/problems", kind_name(kind)), move |subject| problems(subject, kind));
    }
}

fn number(name: &str, default: u64) -> Result<u64, Failure> {
    match std::env::var(name) {
        Err(_) => Ok(default),
        Ok(text) => text.parse().map_err(|_| Failure::new(format!("{name} is '{text}', it must be a number"))),
    }
}

fn problems(subject: &Subject, kind: AttentionKind) -> Result<(), Failure> {
    let cases = number("POLYATTN_CONFORMANCE_CASES", 24)?;
    let seed = number("POLYATTN_CONFORMANCE_SEED", 1)?;
    let config = Config {
        cases: u32::try_from(cases).unwrap_or(u32::MAX),
        // A simpler problem is worth a few compilations, not hundreds.
        max_shrink_iters: 64,
        failure_persistence: None,
        ..Config::default()
    };
    let mut bytes = [0u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let Some(strategy) = strategy(subject, kind) else { return Ok(()) };
    // The last failure seen is that of the simplest problem.
    let last = RefCell::new(None);
    let served = RefCell::new(0u32);
    let outcome =
        runner.run(&strategy, |(seed, spec, phase)| match subject.answer(&subject.case(seed, &spec, phase)) {
            Ok(answer) => {
                *served.borrow_mut() += u32::from(answer.is_some());
                Ok(())
            }
            Err(failure) => {
                let message = failure.message().to_owned();
                *last.borrow_mut() = Some(failure);
                Err(TestCaseError::fail(message))
            }
        });
    match (outcome, last.into_inner()) {
        (Err(TestError::Fail(..)), Some(failure)) => Err(failure),
        (Err(error), _) => Err(Failure::new(error.to_string())),
        // A rule of the backend's own may decline a combination, but not all of them.
        (Ok(()), _) if served.into_inner() == 0 && cases > 0 => {
            Err(Failure::new(format!("it declines every one of {cases} random problems within its capabilities")))
        }
        (Ok(()), _) => Ok(()),
    }
}

/// Problems that the capabilities admit one by one.
fn strategy(subject: &Subject, kind: AttentionKind) -> Option<impl Strategy<Value = (u64, Spec, Phase)> + use<>> {
    let can = subject.can();
    let kinds: Vec<AttentionKind> = match kind {
        AttentionKind::Gqa { .. } => {
            // Few dims, so that kernels are shared.
            let dims = samples(can.head_dims, &[32, 64, 128]).into_iter().filter(|dim| *dim <= 128);
            dims.flat_map(|dim| [(1, 1), (6, 2), (4, 1)].map(|(heads, kv_heads)| gqa(heads, kv_heads, dim))).collect()
        }
        other => vec![other],
    };
    let kinds = if kinds.is_empty() { vec![kind] } else { kinds };
    let masks = [(can.causal, Mask::Causal), (can.non_causal, Mask::Bidirectional), (can.tree, Mask::Tree)];
    let masks: Vec<_> = masks.into_iter().filter(|(served, _)| *served).map(|(_, mask)| mask).collect();
    let formats: Vec<(DType, KvDType)> = subject.formats();
    let pages = samples(can.page_sizes, &[1, 5, 16, 32]);
    let phases = subject.phases();
    let shape = (
        select(kinds),
        select(formats),
        select(masks),
        select(pages),
        select(phases),
        collection::vec((0u32..20, 0u32..150), 0..5),
    );
    let side = || option::of(0u32..40);
    let features = (
        option::weighted(0.3, (side(), side())),
        option::weighted(0.3, select(vec![0.5f32, 3.0, 30.0])),
        any::<[bool; 4]>(),
        any::<u64>(),
    );
    Some((shape, features).prop_map(move |(shape, (window, softcap, [sinks, alibi, sequences, spans], seed))| {
        let (kind, (dtype, kv_dtype), mask, page_size, phase, lengths) = shape;
        let spec = Spec {
            kind,
            dtype,
            kv_dtype,
            mask,
            window: window.filter(|_| can.sliding_window).map(|(left, right)| Window { left, right }),
            softcap: softcap.filter(|_| can.softcap),
            sinks: sinks && can.sinks,
            alibi: alibi && can.alibi,
            per_sequence_causal: sequences && can.per_sequence_causal,
            prefix_spans: spans && can.prefix_spans && mask == Mask::Causal,
            page_size,
            sequences: lengths.into_iter().map(|(rows, more)| (rows, rows + more)).collect(),
        };
        (seed, spec, phase)
    }))
}
