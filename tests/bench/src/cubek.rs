//! cubek-attention: its routines and settings raced against each other by its own autotuner, compiled to WGSL or, as it
//! does by default on Vulkan, to SPIR-V with cooperative matrices where the device has them.

use std::time::{Duration, Instant};

use cubecl::{
    bytes::Bytes,
    client::Client,
    future::block_on,
    ir::{ElemType, FloatKind, UIntKind},
    profile::TimingMethod,
    std::tensor::TensorHandle,
    wgpu::{WgpuDevice, WgpuDeviceKind, WgpuRuntime, WgslCompiler},
};
use cubecl_runtime::runtime::Runtime;
use cubek_attention::kernels::{
    AttentionScoring, AttentionVisibility, QueryPlacement, ScoreScale,
    select::selector::QueryPositions,
    tune::{AttentionTuneInputs, launch_tuned},
};
use cubek_matmul::kernels::tensor::PlainTensor;
use cubek_std::autotune::GroupPriority;
use half::f16;
use polyattn::{
    api::{AttentionKind, DType, KvDType},
    bench::{self, Places, Samples, Shape},
    device::DeviceFacts,
};

use crate::{
    Error,
    contest::{Contestant, Row},
};

pub(crate) const WGSL: &str = "cubek-wgsl";
pub(crate) const SPIRV: &str = "cubek-spirv";

/// Counters that its cubes count themselves in at, kept from launch to launch as an engine would.
const ARRIVALS: usize = 1 << 18;

pub(crate) struct Cubek {
    facts: DeviceFacts,
    device: cubecl::Device,
    client: Client,
}

impl Cubek {
    pub(crate) fn new(facts: &DeviceFacts, wgsl: bool) -> Self {
        let kind = if facts.hardware { WgpuDeviceKind::DefaultDevice } else { WgpuDeviceKind::Cpu };
        let adapter = WgpuDevice::new(kind);
        let device = cubecl::Device::Wgpu(adapter.clone());
        let client = if wgsl { WgpuRuntime::<WgslCompiler>::client(&adapter) } else { device.client() };
        Self { facts: facts.clone(), device, client }
    }

    fn tensor(&self, shape: [usize; 4], data: Vec<u8>) -> PlainTensor {
        let memory = self.client.create(Bytes::from_bytes_vec(data));
        PlainTensor::of_handle(TensorHandle::new_contiguous(shape, memory, ElemType::Float(FloatKind::F16)))
    }

    fn counters(&self, data: &[u32]) -> PlainTensor {
        let memory = self.client.create(Bytes::from_elems(data.to_vec()));
        PlainTensor::of_handle(TensorHandle::new_contiguous([data.len()], memory, ElemType::UInt(UIntKind::U32)))
    }
}

impl Contestant for Cubek {
    fn measure(&mut self, shape: &Shape, budget: Duration) -> Result<Vec<Row>, Error> {
        let problem = &shape.problem;
        let AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim } = problem.kind else {
            return Err("it has no latent attention".into());
        };
        if problem.softcap.is_some() || problem.sinks || problem.window.is_some() || problem.dtype != DType::F16 {
            return Err("softcap, sinks, windows and other formats than f16 are not compared".into());
        }
        let [batch, heads, kv, rows, keys, dim] =
            [shape.batch, query_heads, kv_heads, shape.rows, shape.context, head_dim].map(|size| size as usize);
        let value_dim = value_dim as usize;
        let (key_bytes, value_bytes) = shape.cache_bytes();
        let copies = bench::copies(&self.facts, key_bytes, value_bytes) as usize;
        let data = |seed: u32, copy: usize, count: usize| {
            bench::values(seed, (copy * count) as u32, count as u32, KvDType::F16)
        };

        let q = self.tensor([batch, heads, rows, dim], data(1, 0, batch * heads * rows * dim)?);
        let lengths = self.counters(&vec![shape.context; batch]);
        let arrivals = self.counters(&vec![0; ARRIVALS]);
        // One query position sees all there is.
        let visibility = AttentionVisibility::new(rows > 1, None, QueryPlacement::Last);
        let scoring = AttentionScoring { visibility, scale: ScoreScale::Custom(problem.scale) };
        let mut inputs = Vec::new();
        for copy in 0..copies {
            let k = self.tensor([batch, kv, keys, dim], data(2, copy, batch * kv * keys * dim)?);
            let v = self.tensor([batch, kv, keys, value_dim], data(3, copy, batch * kv * keys * value_dim)?);
            let (q, lengths, arrivals) = (q.clone(), lengths.clone(), Some(arrivals.clone()));
            let made = AttentionTuneInputs::new(&self.client, q, k, v, None, lengths, arrivals, scoring);
            inputs.push(made.map_err(|why| format!("it refuses: {why:?}"))?);
        }
        let positions = QueryPositions::of(rows);
        let launch =
            |turn: usize| launch_tuned(positions, &self.device, inputs[turn % copies].clone(), GroupPriority::DEFAULT);
        let done = || block_on(self.client.sync()).map_err(|error| format!("{error:?}"));

        // Tunes.
        let out = launch(0);
        done()?;
        let mut turn = 0;
        let timing = bench::time(budget, |calls| {
            let start = Instant::now();
            for at in 0..calls as usize {
                launch(turn + at);
            }
            done()?;
            let wall = start.elapsed();
            let window = self.client.profile_start().map_err(|error| format!("{error:?}"))?;
            for at in 0..calls as usize {
                launch(turn + at);
            }
            let profile = self.client.profile_end(window).map_err(|error| format!("{error:?}"))?;
            turn += calls as usize;
            let by_device = profile.timing_method() == TimingMethod::Device;
            let gpu = block_on(profile.resolve()).filter(|_| by_device).map(|ticks| ticks.duration());
            Ok::<_, Error>((gpu, wall))
        })?;

        drop(out);
        let out = self.client.read_one(launch(0).handle).map_err(|error| format!("{error:?}"))?;
        let out: &[u8] = &out;
        let (s, l, d) = (shape.rows, shape.context, head_dim);
        let samples = Samples::compute(
            shape,
            Places {
                query: &|sequence, row, head| ((sequence * query_heads + head) * s + row) * d,
                key: &|sequence, position, head| ((sequence * kv_heads + head) * l + position) * d,
                value: &|sequence, position, head| ((sequence * kv_heads + head) * l + position) * value_dim as u32,
            },
        )?;
        let agreement = samples.compare(|sequence, row, head| {
            let at = ((sequence as usize * rows + row as usize) * heads + head as usize) * value_dim * 2;
            let bytes = out.get(at..at + value_dim * 2).ok_or("its output is too short")?;
            Ok::<_, Error>(bytes.chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect())
        })?;
        drop(inputs);
        self.client.memory_cleanup().map_err(|error| format!("{error:?}"))?;
        Ok(vec![Row::new("", &timing, &agreement)])
    }
}
