//! What the engine tells of itself through the `metrics` facade: whatever recorder a program installs gets it.

use metrics::{counter, gauge, histogram};

use crate::report::Generation;

pub(crate) fn request_added() {
    counter!("polyattn_requests_total").increment(1);
}

pub(crate) fn tokens(count: usize) {
    counter!("polyattn_tokens_total").increment(count as u64);
}

pub(crate) fn cached(tokens: usize) {
    counter!("polyattn_prefix_cache_tokens_total").increment(tokens as u64);
}

pub(crate) fn preempted() {
    counter!("polyattn_preemptions_total").increment(1);
}

pub(crate) fn drafter_lost() {
    counter!("polyattn_drafters_lost_total").increment(1);
}

/// A draft and its fate.
pub(crate) fn verified(drafted: usize, accepted: usize) {
    counter!("polyattn_drafted_tokens_total").increment(drafted as u64);
    counter!("polyattn_accepted_tokens_total").increment(accepted as u64);
    counter!("polyattn_wasted_tokens_total").increment(drafted.saturating_sub(accepted) as u64);
    histogram!("polyattn_accepted_length").record(accepted as f64 + 1.0);
}

pub(crate) fn load(running: usize, waiting: usize, free_pages: usize) {
    gauge!("polyattn_running_requests").set(running as f64);
    gauge!("polyattn_waiting_requests").set(waiting as f64);
    gauge!("polyattn_free_pages").set(free_pages as f64);
}

pub(crate) fn finished(generation: &Generation) {
    histogram!("polyattn_prefill_seconds").record(generation.prefill.as_secs_f64());
    histogram!("polyattn_decode_seconds").record(generation.decode.as_secs_f64());
    if let Some(acceptance) = &generation.acceptance {
        histogram!("polyattn_draft_seconds").record(acceptance.draft_seconds);
        histogram!("polyattn_verify_seconds").record(acceptance.verify_seconds);
    }
}
