//! What an engine of one's own takes from polyattn: the registry, selection, kernels over a paged cache, proposers.
//! Buffers, weights, sampling and the loop are its own; `polyattn-engine` and `polyattn-nn` are not involved.
//!
//! [`Layer`] is a layer's attention over a cache, [`generate`] a loop that speculates.

#![forbid(unsafe_code)]

mod layer;
mod speculate;

pub use layer::Layer;
pub use speculate::{Generated, generate};

// Whoever builds the program names the plugins.
use {polyattn_cpu as _, polyattn_flash as _, polyattn_ngram as _, stranger_proposer as _};
