/// What can go wrong on a device. Every variant ends the request it happened in, never the program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No adapter answers to the name that was asked for.
    #[error("no device '{wanted}'; there are: {available}")]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// What there is, as one line.
        available: String,
    },
    /// The adapter exists but cannot be used.
    #[error("device '{device}' cannot be used: {reason}")]
    Unusable {
        /// Adapter name.
        device: String,
        /// Why, as a sentence.
        reason: String,
    },
    /// The device went away: driver reset, removed hardware, time-out.
    #[error("device lost: {0}")]
    Lost(String),
    /// The memory for a buffer could not be had.
    #[error("out of memory: {bytes} bytes for {what} on {device}")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
        /// The buffer's label.
        what: String,
        /// Device name.
        device: String,
    },
    /// A limit of the device is exceeded.
    #[error("{what} needs {needed} {unit}, {device} allows {allowed}")]
    Limit {
        /// What exceeds it.
        what: String,
        /// How much it needs.
        needed: u64,
        /// How much the device has.
        allowed: u64,
        /// The unit of both numbers.
        unit: &'static str,
        /// Device name.
        device: String,
    },
    /// A shader did not compile, or a pipeline could not be made of it.
    #[error("shader '{label}' failed: {message}")]
    Shader {
        /// The pipeline's label.
        label: String,
        /// The compiler's words.
        message: String,
    },
    /// A range lies outside its buffer or is misaligned.
    #[error("range {offset}..{end} of buffer '{label}' with {bytes} bytes: {reason}")]
    Range {
        /// The buffer's label.
        label: String,
        /// Start of the range in bytes.
        offset: u64,
        /// End of the range in bytes.
        end: u64,
        /// Size of the buffer in bytes.
        bytes: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A buffer is read and written by one call, or used from another thread at the same time.
    #[error("buffer '{0}' is in use")]
    InUse(String),
    /// A buffer or pipeline of one kind of device was given to another.
    #[error("{0}")]
    WrongDevice(String),
    /// The driver or wgpu reported an error that has no variant of its own.
    #[error("device error: {0}")]
    Other(String),
}
