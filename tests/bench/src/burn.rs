//! burn's `attention`: an autotuned flash kernel or its fallback. It takes as many key heads as query heads, so that
//! shared ones are repeated beforehand, and aligns its own causal mask at the top left, so that verification brings an
//! explicit mask. It gives no GPU timestamps.

mod contest;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use burn::tensor::{
    Bool, DType as BurnType, Device, DeviceKind, Tensor, TensorData, module::attention, ops::AttentionModuleOptions,
};
use clap::Parser;
use half::f16;
use polyattn::{
    api::{AttentionKind, DType, Device as OurDevice},
    bench::{self, Places, Samples, Shape, value},
    device::{DeviceChoice, DeviceFacts},
};

use contest::{Contestant, Row};

type Error = Box<dyn std::error::Error>;

/// burn among the peers: shapes come by standard input, answers go to standard output.
#[derive(Debug, Parser)]
struct Args {
    #[arg(long)]
    be: String,
    #[arg(long)]
    device: String,
    #[arg(long)]
    seconds: f64,
}

fn main() -> ExitCode {
    match be(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn be(args: &Args) -> Result<(), Error> {
    let choice: DeviceChoice = args.device.parse()?;
    let facts = OurDevice::open(&choice)?.facts().clone();
    contest::serve(&mut Burn::new(&facts), Duration::from_secs_f64(args.seconds))
}

struct Burn {
    facts: DeviceFacts,
    device: Device,
}

impl Burn {
    fn new(facts: &DeviceFacts) -> Self {
        let kind = if facts.hardware { DeviceKind::DefaultDevice } else { DeviceKind::Cpu };
        Self { facts: facts.clone(), device: Device::vulkan(kind) }
    }

    fn tensor(&self, seed: u32, copy: usize, shape: [usize; 4]) -> Tensor<4> {
        let count = shape.iter().product::<usize>();
        let numbers = (0..count).map(|at| f16::from_f32(value(seed, (copy * count + at) as u32)));
        Tensor::from_data(TensorData::new(numbers.collect(), shape), (&self.device, BurnType::F16))
    }
}

impl Contestant for Burn {
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
        let group = heads / kv;
        let (key_bytes, value_bytes) = shape.cache_bytes();
        let repeated = group as u64;
        let copies = bench::copies(&self.facts, key_bytes * repeated, value_bytes * repeated) as usize;
        let largest = (key_bytes.max(value_bytes) * repeated).max((batch * heads * rows * keys * 2) as u64);
        if largest > self.facts.limits.binding_bytes {
            return Err(format!(
                "{largest} bytes with heads repeated, one binding holds {}",
                self.facts.limits.binding_bytes
            )
            .into());
        }
        let repeat = |tensor: Tensor<4>, dim: usize| {
            let each: Tensor<5> = tensor.reshape([batch, kv, 1, keys, dim]);
            each.expand([batch, kv, group, keys, dim]).reshape([batch, heads, keys, dim])
        };
        let q = self.tensor(1, 0, [batch, heads, rows, dim]);
        let cache: Vec<_> = (0..copies)
            .map(|copy| {
                let k = repeat(self.tensor(2, copy, [batch, kv, keys, dim]), dim);
                (k, repeat(self.tensor(3, copy, [batch, kv, keys, value_dim]), value_dim))
            })
            .collect();
        // True hides.
        let mask: Option<Tensor<4, Bool>> = (1 < rows && rows < keys).then(|| {
            let hidden = (0..rows * keys).map(|at| at % keys > keys - rows + at / keys);
            let mask: Tensor<4, Bool> =
                Tensor::from_data(TensorData::new(hidden.collect::<Vec<bool>>(), [1, 1, rows, keys]), &self.device);
            mask.expand([batch, heads, rows, keys])
        });
        let launch = |turn: usize| {
            let (k, v) = &cache[turn % copies];
            let options = AttentionModuleOptions {
                scale: Some(f64::from(problem.scale)),
                softcap: None,
                is_causal: rows > 1 && rows == keys,
            };
            attention(q.clone(), k.clone(), v.clone(), mask.clone(), None, options)
        };
        let done = || self.device.sync().map_err(|error| format!("{error:?}"));
        launch(0);
        done()?;
        let mut turn = 0;
        let timing = bench::time(budget, |calls| {
            let start = Instant::now();
            for _ in 0..calls {
                launch(turn);
                turn += 1;
            }
            done()?;
            Ok::<_, Error>((None, start.elapsed()))
        })?;

        let out: Vec<f16> = launch(0).into_data().try_to_vec().map_err(|error| format!("{error:?}"))?;
        let (s, l) = (shape.rows, shape.context);
        let samples = Samples::compute(
            shape,
            Places {
                query: &|sequence, row, head| ((sequence * query_heads + head) * s + row) * head_dim,
                key: &|sequence, position, head| ((sequence * kv_heads + head) * l + position) * head_dim,
                value: &|sequence, position, head| ((sequence * kv_heads + head) * l + position) * value_dim as u32,
            },
        )?;
        let agreement = samples.compare(|sequence, row, head| {
            let at = ((sequence as usize * heads + head as usize) * rows + row as usize) * value_dim;
            let numbers = out.get(at..at + value_dim).ok_or("its output is too short")?;
            Ok::<_, Error>(numbers.iter().map(|number| number.to_f32()).collect())
        })?;
        Ok(vec![Row::new("", &timing, &agreement)])
    }
}
