//! What the engine costs beside its models, on the tiny model with synthetic acceptance of length 4: the share of a step
//! that is not the target's or the drafter's, for one request and for 64. A model's time has the recording of its pass in
//! it, and the planning of its attention.
//!
//! `cargo run --release -p polyattn-e2e --example overhead [PERCENT] [PERCENT]`. Ends with 1 where the engine takes more
//! than the first percentage (10) of the models' time in any batch, or where a batch of 64 keeps less than the second
//! (80) of one request's efficiency.
#![allow(clippy::unwrap_used, reason = "a measurement may panic")]

use std::process::ExitCode;

use polyattn_api::{StrategyConfig, TargetFacts};
use polyattn_device::Device;
use polyattn_e2e::{engine, tests_folder};
use polyattn_engine::{EngineOptions, Request, SpeculativeOptions};
use polyattn_nn::load::ModelSource;

fn main() -> ExitCode {
    let source = ModelSource::open(&tests_folder("golden/tiny/qwen3")).unwrap();
    let folder = std::env::temp_dir().join(format!("polyattn-overhead-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let model = &source.config;
    let facts = TargetFacts::new(model.layers, model.hidden_size, model.vocab_size, model.context_length);
    polyattn_dflash::tiny::write_random(&facts, &folder, false).unwrap();
    let device = Device::cpu();
    println!("engine beside its models, tiny model, dflash, synthetic acceptance of length 4, {}", device.facts().name);
    let limit = |place: usize, unset: f64| std::env::args().nth(place).map_or(unset, |text| text.parse().unwrap());
    let (most_overhead, least_kept) = (limit(1, 10.0) / 100.0, limit(2, 80.0) / 100.0);
    let (mut alone, mut holds) = (None, true);
    for batch in [1u32, 4, 16, 64] {
        let options = EngineOptions::default().with_context(256).with_sequences(batch).with_speculative(Some(
            SpeculativeOptions {
                method: "dflash".into(),
                model: Some(folder.clone()),
                acceptance: Some(StrategyConfig::new("synthetic").with(serde_json::json!({"length": 4}))),
                num_speculative_tokens: Some(7),
                ..SpeculativeOptions::default()
            },
        ));
        let mut engine = engine(&source, &device, &options);
        for round in 0..3 {
            for number in 0..batch {
                let mut request = Request::new((0..8 + number % 7).map(|place| 5 + place).collect(), 160);
                request.stop = Some(Vec::new());
                engine.add_request(request).unwrap();
            }
            // Prompts are not what is measured, nor is the first round.
            let _ = engine.step();
            let _ = engine.take_times();
            while !engine.is_idle() {
                let _ = engine.step();
            }
            if round < 2 {
                continue;
            }
            let times = engine.take_times();
            let efficiency = times.efficiency();
            let first = *alone.get_or_insert(efficiency);
            let overhead = (times.total - times.models).as_secs_f64() / times.models.as_secs_f64();
            holds &= overhead <= most_overhead && efficiency / first >= least_kept;
            println!(
                "batch {batch:3}: {} steps, {:7.1} µs a step, of them {:7.1} µs the engine's own ({:.1} % of the models'); efficiency {:.3} \
                 of batch 1's",
                times.steps,
                times.total.as_secs_f64() * 1e6 / times.steps as f64,
                (times.total - times.models).as_secs_f64() * 1e6 / times.steps as f64,
                overhead * 100.0,
                efficiency / first
            );
        }
    }
    let _ = std::fs::remove_dir_all(&folder);
    if holds {
        ExitCode::SUCCESS
    } else {
        eprintln!("more than {most_overhead} beside the models, or less than {least_kept} of one request's efficiency");
        ExitCode::FAILURE
    }
}
