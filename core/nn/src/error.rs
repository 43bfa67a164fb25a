use polyattn_api::BackendError;
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
