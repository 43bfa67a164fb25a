//! The commands, one file each.

pub(crate) mod backends;
pub(crate) mod bench;
pub(crate) mod check;
pub(crate) mod devices;
pub(crate) mod fetch;
pub(crate) mod generate;
mod load;
pub(crate) mod options;
pub(crate) mod proposers;
pub(crate) mod replay;
pub(crate) mod select;
