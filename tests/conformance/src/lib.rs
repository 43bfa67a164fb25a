//! Conformance kits for attention backends and proposers.

#![forbid(unsafe_code)]

mod proposer;
mod trial;

pub use proposer::{ProposerSubject, proposer_suite};
pub use trial::{Failure, Trial, run};
