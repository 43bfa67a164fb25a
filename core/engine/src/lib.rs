//! The reference engine of polyattn: paged KV cache, model runner, verification and generation.
//!
//! [`Engine::load`] resolves who serves which attention, places a model and, where asked for, a drafter on one device.
//! [`Engine::generate`] turns a prompt into tokens; [`Engine::add_request`] and [`Engine::step`] serve many requests at
//! once. Whatever the drafter, the tokens are the target's.

#![forbid(unsafe_code)]

mod attention;
mod engine;
mod error;
mod meter;
mod pages;
mod record;
mod report;
mod runner;
mod scheduler;

pub use engine::{Engine, EngineOptions, SpeculativeOptions};
pub use error::EngineError;
pub use pages::{PageAllocator, PageKind};
pub use polyattn_api::Sampling;
pub use record::RecordOptions;
pub use report::{Acceptance, Backends, Generation, StopReason, TargetBackends};
pub use scheduler::{Event, Happened, Request, RequestId, StepTimes};
