//! Measuring attention: named problems of real models, what each costs at the least, and how long a backend takes.
//!
//! The program's `bench kernels` prints what is measured here, and so does `tests/bench`, beside other libraries.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use polyattn::{
//!     api::{Device, Registry},
//!     bench::{self, Ceilings, Workload},
//! };
//!
//! let device = Device::cpu();
//! let ceilings = Ceilings::measure(&device)?;
//! let registry = Registry::global()?;
//! for shape in bench::catalogue().iter().filter(|shape| shape.matches("smollm2/decode/1x1k")) {
//!     let workload = Workload::new(&device, shape, 16)?;
//!     for backend in registry.backends().iter().filter(|one| one.declines(workload.problem(), device.facts()).is_empty()) {
//!         let timing = workload.time(backend, Duration::from_millis(250))?;
//!         println!("{}: {:.0} % of what the device can do", backend.name(), 100.0 * ceilings.share(shape, timing.seconds));
//!     }
//! }
//! # Ok::<(), polyattn::bench::BenchError>(())
//! ```

mod catalogue;
mod ceilings;
mod data;
mod sample;
mod workload;

pub use catalogue::{Shape, catalogue};
pub use ceilings::Ceilings;
pub use data::{value, values};
pub use sample::{Agreement, Places, Samples};
pub use workload::{Clock, Timing, Workload, copies, time};

use crate::{
    api::{BackendError, RegistryError},
    device::DeviceError,
    replay::ReplayError,
};

/// Why something could not be measured.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// A shape that the device has no room for.
    #[error("{0}")]
    NoRoom(String),
    /// A backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No plugins.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The reference could not be computed.
    #[error("the reference: {0}")]
    Reference(String),
}

impl From<ReplayError> for BenchError {
    fn from(error: ReplayError) -> Self {
        Self::Reference(error.to_string())
    }
}

/// The middle of `numbers`, the mean of the middle two of an even number of them; NaN of none.
#[must_use]
pub fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    match (numbers.len(), numbers.len() / 2) {
        (0, _) => f64::NAN,
        (count, middle) if count % 2 == 1 => numbers[middle],
        (_, middle) => (numbers[middle - 1] + numbers[middle]) / 2.0,
    }
}
