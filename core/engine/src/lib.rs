//! The reference engine of polyattn: paged KV cache, model runner, verification and generation.
//!
//! [`Engine::load`] resolves who serves which attention, places a model and, where asked for, a drafter on one device;
//! [`Engine::generate`] turns a prompt into tokens. Whatever the drafter, the tokens are the target's.

#![forbid(unsafe_code)]

mod attention;
mod engine;
mod error;
mod pages;
mod record;
mod report;
mod runner;
mod sampling;
mod verify;

pub use engine::{Engine, EngineOptions, Request, SpeculativeOptions};
pub use error::EngineError;
pub use pages::PageAllocator;
pub use record::RecordOptions;
pub use report::{Acceptance, Backends, Generation, StopReason, TargetBackends};
pub use sampling::{Sampler, Sampling};
pub use verify::{Verified, verify_greedy, verify_sampled};
