use std::path::PathBuf;

use polyattn_api::{BackendError, ProposerError, ResolveError};
use polyattn_device::DeviceError;
use polyattn_nn::{NnError, load::LoadError, ops::OpError};

/// What can go wrong in an engine. An error ends the request it happened in; the engine goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The configuration cannot be resolved.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// A model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A layer failed.
    #[error(transparent)]
    Nn(NnError),
    /// A proposer failed.
    #[error(transparent)]
    Proposer(#[from] ProposerError),
    /// Attention failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The target's logits are NaN: its weights are broken, or a backend is at fault.
    #[error(
        "the target's logits at position {position} are not finite; its attention is served by {backends}: \
         'polyattn check' tests a backend, another is chosen by --attention-backend"
    )]
    NotFinite {
        /// The position of the row.
        position: usize,
        /// The backends by phase.
        backends: String,
    },
    /// The request contradicts itself or the model.
    #[error("{0}")]
    Request(String),
    /// The page pool is exhausted.
    #[error("out of cache pages: {needed} more needed, {free} of {total} free")]
    OutOfPages {
        /// Pages needed.
        needed: usize,
        /// Pages free.
        free: usize,
        /// Pages of the pool.
        total: usize,
    },
    /// A tensor of the cache that the device cannot bind.
    #[error(
        "the cache is too large for {device}: each layer's keys are {bytes} bytes ({pages} pages, {tokens} tokens), one \
         binding holds {allowed} ({most} tokens); ask for a smaller context (a shorter prompt, fewer tokens to generate) \
         or fewer sequences at once"
    )]
    CacheTooLarge {
        /// Bytes of the tensor.
        bytes: u64,
        /// Pages of the pool.
        pages: u32,
        /// Tokens that they hold.
        tokens: u64,
        /// The device's name.
        device: String,
        /// Bytes of a binding at the most.
        allowed: u64,
        /// Tokens that fit it, in whole pages.
        most: u64,
    },
    /// An error that ended several requests at once.
    #[error(transparent)]
    Shared(std::sync::Arc<EngineError>),
    /// A recorded call could not be written.
    #[error("{}: {message}", path.display())]
    Record {
        /// The file or folder.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
}

impl From<NnError> for EngineError {
    fn from(error: NnError) -> Self {
        match error {
            NnError::Backend(error) => Self::Backend(error),
            NnError::Device(error) => Self::Device(error),
            NnError::Load(error) => Self::Load(error),
            other => Self::Nn(other),
        }
    }
}

impl From<OpError> for EngineError {
    fn from(error: OpError) -> Self {
        NnError::from(error).into()
    }
}
