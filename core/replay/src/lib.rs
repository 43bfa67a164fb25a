//! Recorded attention problems of polyattn: the file format, an f64 reference, and running them on any backend.
//!
//! * [`Case`] is one attention call with its data. It is read from a replay file ([`Case::load`]), written to one
//!   ([`Case::save`]), made at random ([`random::case`]), or built from what an engine has at hand ([`Case::new`]).
//! * [`Case::run`] runs it on a backend and gives an [`Outcome`]; [`Comparison::of`] holds that against the recorded
//!   answer, or against [`reference::attention_f64`] where none is recorded.
//! * [`emulated_matrices`] lets kernels for cooperative matrices be tested on devices that have none.
//!
//! ```no_run
//! use polyattn_api::{Device, Registry};
//! use polyattn_replay::{Case, Comparison};
//!
//! let case = Case::load("call.safetensors")?;
//! let registry = Registry::global()?;
//! for entry in registry.backends().iter() {
//!     let outcome = case.run(&Device::cpu(), entry.backend.as_ref())?;
//!     println!("{}: {:?}", entry.name(), Comparison::of(&case, &outcome)?);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The file format
//! A safetensors file whose metadata key `polyattn.problem` is JSON with `format` (1), `attention` and `tolerance`.
//! Tensors hold the stored values, in their stored format:
//!
//! | tensor | shape | format |
//! |---|---|---|
//! | `q` | `[tokens, query_heads, head_dim]` | `dtype` |
//! | `k_cache`, `v_cache` | `[pages, page_size, kv_heads, head_dim]`, `[.., value_dim]` | `kv_dtype` |
//! | `kv_cache` (MLA, in place of the two) | `[pages, page_size, latent_dim + rope_dim]` | `kv_dtype` |
//! | `k_scale`, `v_scale` (with `q8`) | `[pages, page_size, kv_heads]` | F32 |
//! | `page_table` | `[batch, max_pages]` | I32, −1 where unused |
//! | `query_start`, `kv_len` | `[batch + 1]`, `[batch]` | I32 |
//! | `causal` (optional) | `[batch]` | I32, 0 or 1 |
//! | `prefix_spans` (optional) | `[spans, 3]` | I32: sequence, first and last key position |
//! | `tree_mask` (with mask `tree`) | `[tokens, words]` | U32 |
//! | `sinks`, `alibi_slopes` (optional) | `[query_heads]` | F32 |
//! | `out`, `lse` (optional) | `[tokens, query_heads, value_dim]`, `[tokens, query_heads]` | F32 |
//!
//! A `q8` cache is I8, a cache of 8-bit floats U8. With MLA the query dim is `latent_dim + rope_dim`, the output's is
//! `latent_dim`, and a `q8` cache may leave `v_scale` out: the values then have the scales of the keys.

#![forbid(unsafe_code)]

mod case;
mod compare;
mod emulated;
mod error;
mod file;
mod number;
pub mod random;
pub mod reference;
mod run;

pub use case::{Case, Tolerance};
pub use compare::Comparison;
pub use emulated::emulated_matrices;
pub use error::ReplayError;
pub use run::Outcome;
