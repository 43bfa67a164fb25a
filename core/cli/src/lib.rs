//! Attention as a plugin.
//!
//! This crate is the front of the project: it re-exports its parts under one name and registers the plugins whose
//! features are on. An engine that wants all of them needs one dependency and one line:
//!
//! ```
//! use polyattn::api::{Registry, RegistryError};
//!
//! let registry = Registry::global()?;
//! println!("backends: {}; proposers: {}", registry.backend_names(), registry.proposer_names());
//! # Ok::<(), RegistryError>(())
//! ```
//!
//! Who serves a problem is decided by data: what is asked ([`api::AttentionProblem`]), what a backend can do
//! ([`api::Capabilities`]) and what the device is ([`device::DeviceFacts`]).
//!
//! ```
//! # #[cfg(feature = "cpu")] {
//! use polyattn::{
//!     api::{AttentionKind, AttentionProblem, DType, Policy, Registry, select},
//!     device::DeviceFacts,
//! };
//!
//! let kind = AttentionKind::Gqa { query_heads: 16, kv_heads: 8, head_dim: 128, value_dim: 128 };
//! let problem = AttentionProblem::new(kind, DType::F16);
//! let registry = Registry::global().expect("plugins are registered");
//! let selection = select(&problem, &DeviceFacts::cpu(), registry, &Policy::Auto).expect("somebody serves it");
//! println!("{} serves it; not taken: {:?}", selection.backend.name(), selection.declined);
//! # }
//! ```
//!
//! # Features
//! | feature | what it adds |
//! |---|---|
//! | `cpu`, `plain`, `flash`, `splitkv`, `mla` | the attention backend of this name |
//! | `moe-dense`, `moe-grouped` | the backend for mixtures of experts called `dense`, `grouped` |
//! | `ngram`, `suffix`, `draft-model`, `dflash`, `medusa`, `mtp`, `combine` | the proposer of this name |
//! | `eagle` | the proposers `eagle` and `eagle3` |
//! | `program` | the `polyattn` program, also as a function of a library ([`program`]), [`models`] and [`mod@bench`] |
//!
//! All are on by default. An engine that brings plugins of its own turns the default features off, names those it
//! wants, and says `use my_backend as _;` for its own.

#![forbid(unsafe_code)]

#[cfg(feature = "program")]
mod args;
#[cfg(feature = "program")]
pub mod bench;
#[cfg(feature = "program")]
mod commands;
#[cfg(feature = "program")]
mod failure;
#[cfg(feature = "program")]
mod interrupt;
#[cfg(feature = "program")]
pub mod models;
#[cfg(feature = "program")]
mod output;
#[cfg(feature = "program")]
pub mod program;

pub use polyattn_api as api;
#[cfg(feature = "combine")]
pub use polyattn_combine as combine;
#[cfg(feature = "cpu")]
pub use polyattn_cpu as cpu;
pub use polyattn_device as device;
#[cfg(feature = "dflash")]
pub use polyattn_dflash as dflash;
#[cfg(feature = "draft-model")]
pub use polyattn_draft_model as draft_model;
#[cfg(feature = "eagle")]
pub use polyattn_eagle as eagle;
pub use polyattn_engine as engine;
#[cfg(feature = "flash")]
pub use polyattn_flash as flash;
#[cfg(feature = "medusa")]
pub use polyattn_medusa as medusa;
#[cfg(feature = "mla")]
pub use polyattn_mla as mla;
#[cfg(feature = "moe-dense")]
pub use polyattn_moe_dense as moe_dense;
#[cfg(feature = "moe-grouped")]
pub use polyattn_moe_grouped as moe_grouped;
#[cfg(feature = "mtp")]
pub use polyattn_mtp as mtp;
#[cfg(feature = "ngram")]
pub use polyattn_ngram as ngram;
pub use polyattn_nn as nn;
#[cfg(feature = "plain")]
pub use polyattn_plain as plain;
pub use polyattn_replay as replay;
#[cfg(feature = "splitkv")]
pub use polyattn_splitkv as splitkv;
#[cfg(feature = "suffix")]
pub use polyattn_suffix as suffix;
