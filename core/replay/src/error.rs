use polyattn_api::{BackendError, Decline, DeviceError};

/// What can go wrong with a recorded problem.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// A file could not be read or written.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// A file is no replay file, or contradicts itself.
    #[error("{file}: {reason}")]
    Invalid {
        /// The file.
        file: String,
        /// The field or tensor, its value, and what is wrong with it.
        reason: String,
    },
    /// A case built in memory contradicts itself.
    #[error("invalid case: {0}")]
    Case(String),
    /// A shader says what is not emulated.
    #[error("no emulation of {0}")]
    Emulation(String),
    /// The backend cannot serve the problem.
    #[error("declined: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Declined(Vec<Decline>),
    /// The backend failed.
    #[error(transparent)]
    Backend(BackendError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<BackendError> for ReplayError {
    fn from(error: BackendError) -> Self {
        match error {
            BackendError::Declined(reasons) => Self::Declined(reasons),
            error => Self::Backend(error),
        }
    }
}
