//! Models from disk: weights, configuration, tokenizer and chat template.
//!
//! [`ModelSource::open`] takes a GGUF file or a Hugging Face folder and answers with everything that
//! a decoder needs to know before it places weights on a device. The parts stand on their own too:
//! a drafter, for example, opens only a [`Checkpoint`] and reads its own `config.json`.
//!
//! Weights stay memory-mapped. Nothing here ever holds the whole model as f32:
//! [`Checkpoint::read_rows`] dequantises a range of rows of one tensor into the caller's buffer.
//!
//! Every file is taken for hostile until it has been checked. A truncated or lying one is a
//! [`LoadError`] that names the file, the field and the value, and no allocation is larger than a
//! small multiple of the file itself.

pub mod chat;
pub mod checkpoint;
pub mod config;
mod deepseek;
pub mod dequant;
mod error;
pub mod gguf;
#[cfg(any(test, feature = "test-support"))]
pub mod gguf_write;
mod map;
pub mod model;
pub mod safetensors;
#[cfg(any(test, feature = "test-support"))]
pub mod tiny;
pub mod tokenizer;

pub use chat::{ChatMessage, ChatRole, ChatTemplate};
pub use checkpoint::{Checkpoint, CheckpointFormat};
pub use config::{
    Architecture, DecoderConfig, ExpertChoice, ExpertsConfig, LatentConfig, LayerWeight, RopeConfig, RopePairing,
    RopeScaling, WeightName,
};
pub use dequant::{StoredType, dequantize};
pub use error::LoadError;
pub use model::ModelSource;
pub use tokenizer::{Detokenizer, Segment, TextTokenizer};
