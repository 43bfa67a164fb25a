//! What drafters have in common that work on hidden states of their target.
//!
//! * [`RowStore`] keeps the newest hidden state of each sequence between steps.
//! * [`Chains`] collects drafted ids on the device.
//! * [`FeatureDrafter`] drafts token by token from hidden states that it extrapolates itself, as EAGLE and
//!   multi-token prediction do.

mod chains;
mod features;
mod rows;

pub use chains::{ChainOrder, Chains};
pub use features::{FeatureDrafter, FeatureEntry, FeatureHead, FeatureNetwork, FeatureStages, NextFeature};
pub use rows::{NewRow, RowStore};
