//! The layers around attention that a decoder needs, and the loading of models.
//!
//! * [`load`] reads models from disk: weights, configuration, tokenizer and chat template.
//! * [`ops`] are the operations, on the CPU and on a GPU.
//! * [`layer`] is one decoder layer, [`decoder`] a whole model; both take their attention from whoever serves it.
//! * [`drafting`] is what drafters share that work on hidden states of their target.

pub mod decoder;
pub mod drafting;
mod error;
pub mod layer;
pub mod load;
pub mod ops;
mod weights;

pub use error::NnError;
pub use weights::WeightLoader;
