//! Bodies follow.
