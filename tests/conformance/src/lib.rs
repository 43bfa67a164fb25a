//! Conformance kits for attention backends and proposers: what a plugin advertises is what it is tested for.
//!
//! # For a backend
//! `tests/conformance.rs` of its crate, with `[[test]] name = "conformance"` and `harness = false` in `Cargo.toml`:
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use my_backend as _;
//! # mod my_backend {}
//!
//! fn main() -> ExitCode {
//!     polyattn_conformance::backend_main("mine")
//! }
//! ```
//!
//! `polyattn check NAME` runs the same. [`suite`] says what is asked.
//!
//! # For a backend of mixtures of experts
//! [`moe_main`] in the same way; [`moe_suite`] says what is asked.
//!
//! # For a proposer
//! [`proposer_suite`], with an example.

#![forbid(unsafe_code)]

mod backend;
mod moe;
#[cfg(feature = "proposers")]
mod proposer;
mod trial;

pub use backend::{backend_main, suite};
pub use moe::{moe_main, moe_suite};
#[cfg(feature = "proposers")]
pub use proposer::{ProposerSubject, proposer_suite, write_counting_target};
pub use trial::{Failure, Trial, run};
