//! Who serves what, and why the others do not: selection, configuration and registry, over backends and proposers that
//! exist in these tests alone. No device is opened; devices are described.

mod config;
mod draft;
mod golden;
mod mocks;
mod reasons;
mod registry;
mod select;
