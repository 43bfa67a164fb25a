//! The same calls on the CPU and, where there is an adapter, on a GPU.
#![allow(clippy::unwrap_used, reason = "a test's help may fail the test")]

use polyattn_device::{Access, Buffer, DType, Device, DeviceChoice, DeviceError, DeviceFacts, PipelineSpec};

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    devices
}

const DOUBLE: &str = "
struct P { n: u32, add: f32 }
var<immediate> p: P;
@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read_write> b: array<f32>;
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x < p.n) { b[id.x] = 2.0 * a[id.x] + p.add; }
}";

fn double(device: &Device, source: &str) -> Result<polyattn_device::Pipeline, DeviceError> {
    device.pipeline(&PipelineSpec {
        label: "double",
        source,
        entry: "main",
        bindings: &[Access::Read, Access::ReadWrite],
        immediate_bytes: 8,
        constants: &[],
    })
}

#[test]
fn round_trips_and_copies() {
    for device in devices() {
        let data: Vec<u16> = (0..37).collect();
        let buffer = device.upload(&data, "data").unwrap();
        assert_eq!(buffer.bytes(), 74);
        assert_eq!(device.download::<u16>(&buffer).unwrap(), data);
        let other = device.alloc(76, "other").unwrap();
        let mut commands = device.commands().unwrap();
        commands.copy(buffer.slice(4, 8).unwrap(), other.slice(0, 8).unwrap()).unwrap();
        let read = commands.read_back(other.slice(0, 8).unwrap()).unwrap();
        let _ = commands.submit().unwrap();
        assert_eq!(read.wait_as::<u16>().unwrap(), [2, 3, 4, 5]);
    }
}

#[test]
fn dispatches_and_reads_in_order() {
    for device in devices().into_iter().skip(1) {
        let pipeline = double(&device, DOUBLE).unwrap();
        let a = device.upload(&[1.0f32, 2.0, 3.0], "a").unwrap();
        let b = device.alloc(12, "b").unwrap();
        let c = device.alloc(12, "c").unwrap();
        let mut commands = device.timed_commands().unwrap();
        let call = |add: f32| -> Vec<u8> { [3u32.to_le_bytes(), add.to_le_bytes()].concat() };
        commands.dispatch(&pipeline, &[a.whole(), b.whole()], &call(1.0), [1, 1, 1]).unwrap();
        let first = commands.read_back(b.whole()).unwrap();
        commands.flush().unwrap();
        commands.dispatch(&pipeline, &[b.whole(), c.whole()], &call(0.0), [1, 1, 1]).unwrap();
        commands.dispatch(&pipeline, &[c.whole(), b.whole()], &call(0.5), [1, 1, 1]).unwrap();
        let second = commands.read_back(b.whole()).unwrap();
        let submission = commands.submit().unwrap();
        assert_eq!(first.wait_as::<f32>().unwrap(), [3.0, 5.0, 7.0]);
        assert_eq!(second.wait_as::<f32>().unwrap(), [12.5, 20.5, 28.5]);
        if device.facts().has("timestamp-query") {
            assert!(submission.gpu_time().unwrap().is_some());
        }
    }
}

#[test]
fn mistakes_are_typed_errors() {
    for device in devices() {
        let small = device.alloc(8, "small").unwrap();
        assert!(matches!(small.slice(4, 8), Err(DeviceError::Range { .. })));
        assert!(matches!(device.write(&small, 4, &[0u64]), Err(DeviceError::Range { .. })));
        if device.is_cpu() {
            assert!(matches!(double(&device, DOUBLE), Err(DeviceError::WrongDevice(_))));
            let _reading = small.read::<u8>().unwrap();
            assert!(matches!(small.write::<u8>(), Err(DeviceError::InUse(_))));
            assert!(matches!(device.alloc(1 << 60, "huge"), Err(DeviceError::OutOfMemory { .. })));
            continue;
        }
        assert!(matches!(device.alloc(1 << 60, "huge"), Err(DeviceError::Limit { .. })));
        assert!(matches!(double(&device, "fn nonsense("), Err(DeviceError::Shader { .. })));
        let pipeline = double(&device, DOUBLE).unwrap();
        let mut commands = device.commands().unwrap();
        let wide = commands.dispatch(&pipeline, &[small.whole(), small.whole()], &[0; 8], [70_000, 1, 1]);
        assert!(matches!(wide, Err(DeviceError::Limit { .. })));
        let few = commands.dispatch(&pipeline, &[small.whole()], &[0; 8], [1, 1, 1]);
        assert!(matches!(few, Err(DeviceError::Other(_))));
        let cpu: Buffer = Device::cpu().alloc(8, "cpu").unwrap();
        let mixed = commands.dispatch(&pipeline, &[small.whole(), cpu.whole()], &[0; 8], [1, 1, 1]);
        assert!(matches!(mixed, Err(DeviceError::WrongDevice(_))));
    }
}

#[test]
fn shapes_of_cooperative_matrices_come_with_their_feature() {
    for facts in Device::list().into_iter().chain(devices().iter().map(|device| device.facts().clone())) {
        assert!(facts.cooperative_tiles.is_empty() || facts.has("wgpu-cooperative-matrix"), "{facts:?}");
        assert!(facts.cooperative_tiles.iter().all(|tile| [8, 16].contains(&tile.side)), "{facts:?}");
    }
    let facts = DeviceFacts::gpu("any").with_cooperative_tile(16, DType::F16, DType::F32);
    assert!(facts.has("wgpu-cooperative-matrix") && facts.has_cooperative_tile(16, DType::F16, DType::F32));
    assert!(!facts.has_cooperative_tile(8, DType::F16, DType::F32));
}

#[test]
fn unknown_devices_are_listed() {
    let error = Device::open(&DeviceChoice::Name("no such adapter".into())).unwrap_err();
    assert!(error.to_string().contains("no such adapter") && error.to_string().contains("cpu"), "{error}");
}
