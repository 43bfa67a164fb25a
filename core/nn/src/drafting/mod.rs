//! What drafters have in common that work on hidden states of their target.
//!
//! * [`RowStore`] keeps the newest hidden state of each sequence between steps.
//! * [`Chains`] collects drafted ids on the device.
//! * [`DraftConfigFile`] reads the configuration of a drafter's checkpoint.
//! * [`FeatureDrafter`] drafts token by token from hidden states that it extrapolates itself, as EAGLE and
//!   multi-token prediction do.

mod chains;
mod config;
mod features;
#[cfg(feature = "test-support")]
pub mod golden;
mod rows;
#[cfg(any(test, feature = "test-support"))]
pub mod tiny;
mod trees;

pub use chains::{ChainOrder, Chains};
pub use config::{DraftConfigFile, fits};
pub use features::{FeatureDrafter, FeatureEntry, FeatureHead, FeatureNetwork, FeatureStages, NextFeature};
pub use rows::{NewRow, RowStore};
pub use trees::Candidates;
