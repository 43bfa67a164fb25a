//! Who serves what, and why the others do not: selection, configuration and registry, over backends and proposers that
//! exist in these tests alone. No device is opened; devices are described.

mod config;
mod draft;
mod faults;
mod golden;
mod layouts;
mod mocks;
mod moe;
mod reasons;
mod registry;
mod select;
mod trees;
