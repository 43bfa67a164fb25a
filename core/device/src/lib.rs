//! Devices of polyattn: a GPU through wgpu, or the CPU, behind one type.
//!
//! * [`Device`] opens an adapter ([`DeviceChoice`]) and owns what is expensive: pipelines, bind groups, staging memory.
//! * [`Buffer`] is memory on that device; [`BufferSlice`] a range of it.
//! * [`Commands`] records one step. On a GPU everything between two read-backs is one compute pass of one
//!   submission; on the CPU a command runs as it is recorded, so the same calling code serves both.
//! * [`DeviceFacts`] is what a selector may look at: plain data, so that any device can be described in a test.
//!
//! This crate knows nothing of attention. It re-exports [`wgpu`], whose major version its own minor version follows.

#![deny(unsafe_code)]

mod buffer;
mod choice;
mod commands;
mod device;
mod dtype;
mod error;
mod facts;
mod gpu;
mod pipeline;
pub mod wgsl;

pub use buffer::{Buffer, BufferSlice, CpuRead, CpuWrite};
pub use choice::DeviceChoice;
pub use commands::{Commands, Readback, Submission};
pub use device::Device;
pub use dtype::DType;
pub use error::DeviceError;
pub use facts::{CooperativeTile, DeviceFacts, DeviceKind, DeviceLimits};
pub use pipeline::{Access, Pipeline, PipelineSpec};
pub use wgpu;
