use polyattn_api::{BackendError, ProposerError};
use polyattn_device::DeviceError;

use crate::{load::LoadError, ops::OpError};

/// What can go wrong in a layer or while loading one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NnError {
    /// Attention failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A checkpoint cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// An operation was called wrongly.
    #[error(transparent)]
    Op(#[from] OpError),
    /// A tensor does not fit the model.
    #[error("{0}")]
    Shape(String),
}

impl From<NnError> for ProposerError {
    fn from(error: NnError) -> Self {
        match error {
            NnError::Backend(error) => error.into(),
            NnError::Device(error) | NnError::Op(OpError::Device(error)) => error.into(),
            NnError::Load(error) => Self::Checkpoint(error.to_string()),
            NnError::Op(OpError::Shape(message)) | NnError::Shape(message) => Self::Mismatch(message),
        }
    }
}

impl From<OpError> for ProposerError {
    fn from(error: OpError) -> Self {
        NnError::from(error).into()
    }
}
