//! Acceptance rules: known answers, hostile input, and what is emitted against the target's distribution.
#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

mod known;
mod statistics;
