//! What selection costs: a model of 100 layers over 50 registered backends, resolved anew and remembered.
//!
//! `cargo run --release -p polyattn-api --example select_cost`; ends with 1 where a limit is exceeded.

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use polyattn_api::{
    AttentionBackend, AttentionConfig, AttentionKernel, AttentionProblem, BackendEntry, BackendError, Capabilities,
    DType, Decline, Device, DeviceFacts, DeviceNeed, Dims, DtypeSet, EngineConfig, INTERFACE_VERSION, KernelConfig,
    KvCacheConfig, KvDType, KvDtypeSet, LayerConfig, ModelConfig, Origin, Phase, PhaseSet, Registry, Resolver,
    WindowConfig, resolve,
};

const CAPABILITIES: Capabilities = Capabilities::none(DeviceNeed::Gpu)
    .gqa(Dims::Steps { min: 32, max: 256, step: 8 })
    .causal()
    .dtypes(DtypeSet::of(&[DType::F16]), KvDtypeSet::of(&[KvDType::F16]))
    .page_sizes(Dims::Any)
    .phases(PhaseSet::of(&Phase::ALL));

/// The last one serves windows; the others decline the sliding layers.
const WINDOWED: Capabilities = CAPABILITIES.sliding_window();

#[derive(Debug)]
struct Numbered<const N: usize>;

impl<const N: usize> AttentionBackend for Numbered<N> {
    fn name(&self) -> &'static str {
        NAMES[N]
    }

    fn capabilities(&self) -> &Capabilities {
        if N == 0 { &WINDOWED } else { &CAPABILITIES }
    }

    fn prepare(&self, _: &Device, _: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        Err(BackendError::Declined(vec![Decline::Other("running".into())]))
    }
}

macro_rules! numbered {
    ($($n:literal)*) => {
        const NAMES: &[&str] = &[$(concat!("backend-", $n)),*];

        fn entries() -> Vec<BackendEntry> {
            vec![$(BackendEntry {
                origin: Origin { crate_name: "select-cost", version: "0" },
                interface: INTERFACE_VERSION,
                priority: $n,
                make: || Arc::new(Numbered::<$n>),
            }),*]
        }
    };
}
numbered!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39
    40 41 42 43 44 45 46 47 48 49);

/// The median of many runs.
fn median(mut run: impl FnMut()) -> Duration {
    let mut times: Vec<_> = (0..2000)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() -> ExitCode {
    let registry = match entries().into_iter().fold(Registry::builder(), |all, entry| all.backend(entry)).build() {
        Ok(registry) => registry,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let sliding = LayerConfig { window: Some(WindowConfig::Keys(4096)), ..LayerConfig::gqa("sliding", 50, 32, 8, 128) };
    let config = EngineConfig {
        model: ModelConfig { dtype: DType::F16, layers: vec![LayerConfig::gqa("full", 50, 32, 8, 128), sliding] },
        kv_cache: KvCacheConfig::default(),
        attention: AttentionConfig::default(),
        kernel: KernelConfig::default(),
        backend_config: Default::default(),
        speculative: None,
    };
    let device = DeviceFacts::gpu("described");
    if let Err(error) = resolve(&config, &device, &registry) {
        eprintln!("{error}");
        return ExitCode::from(2);
    }
    let anew = median(|| drop(std::hint::black_box(resolve(std::hint::black_box(&config), &device, &registry))));
    let resolver = Resolver::new(&registry, device.clone());
    let known = median(|| drop(std::hint::black_box(resolver.resolve(std::hint::black_box(&config)))));
    println!("100 layers of 2 kinds, 2 phases, {} backends", NAMES.len());
    let mut holds = true;
    for (what, time, limit) in
        [("resolved anew", anew, Duration::from_micros(100)), ("remembered", known, Duration::from_micros(1))]
    {
        println!("{what}: {time:?} (limit {limit:?})");
        holds &= time <= limit;
    }
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
