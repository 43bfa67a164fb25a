//! What the tests of operations share.

use polyattn_device::{Buffer, Device, DeviceChoice};

/// The CPU, and a GPU where there is one; says so where there is none.
pub(crate) fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    devices
}

/// Numbers in -1..1, the same ones on every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1 << 23) as f32) - 1.0
    }

    pub(crate) fn vec(&mut self, length: usize) -> Vec<f32> {
        (0..length).map(|_| self.next()).collect()
    }
}

pub(crate) fn floats(device: &Device, data: &[f32]) -> Buffer {
    device.upload(data, "floats").unwrap()
}

/// Memory that shows what was not written.
pub(crate) fn poison(device: &Device, elements: usize) -> Buffer {
    floats(device, &vec![f32::NAN; elements])
}
