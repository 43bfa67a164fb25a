//! Conformance kits for attention backends and proposers.

#![forbid(unsafe_code)]

#[cfg(feature = "proposers")]
mod proposer;
mod trial;

#[cfg(feature = "proposers")]
pub use proposer::{ProposerSubject, proposer_suite};
pub use trial::{Failure, Trial, run};
