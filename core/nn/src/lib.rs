//! The layers around attention that a decoder needs, and weight loading

pub mod load;
pub mod ops;
