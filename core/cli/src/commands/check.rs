//! `polyattn check`.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use polyattn_conformance::{Trial, suite};
use serde::Serialize;

use crate::{
    api::{Decline, RegisteredBackend, Registry},
    failure::{Ended, Failure, Verdict},
    interrupt,
    output::{self, Context},
};

/// Run the conformance kit against a registered backend: what it advertises is what it is tested for.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn check flash --device gpu
  polyattn check all --device cpu --json

A wrong answer leaves a replay file, which 'polyattn replay FILE --backend NAME' runs again; they go to the folder \
POLYATTN_CONFORMANCE_DIR where it is set. POLYATTN_CONFORMANCE_CASES and POLYATTN_CONFORMANCE_SEED change the random \
problems.")]
pub(crate) struct Args {
    /// The backend, or all for every one that runs on the device.
    #[arg(value_name = "NAME|all")]
    backend: String,
}

/// One trial of one backend.
#[derive(Serialize)]
struct Row {
    backend: &'static str,
    device: String,
    trial: String,
    passed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<String>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Ended {
    let registry = Registry::global()?;
    let device = context.open()?;
    let all = registry.backends();
    let usable = |entry: &&RegisteredBackend| declines(entry, device.facts()).is_empty();
    let chosen: Vec<&RegisteredBackend> = if args.backend.eq_ignore_ascii_case("all") {
        all.iter().filter(usable).collect()
    } else {
        let Some(entry) = all.iter().find(|entry| entry.name().eq_ignore_ascii_case(&args.backend)) else {
            let names = registry.backend_names();
            return Err(Failure::new(format!("unknown attention backend '{}'; registered are: {names}", args.backend)));
        };
        let reasons: Vec<_> = declines(entry, device.facts()).iter().map(ToString::to_string).collect();
        if !reasons.is_empty() {
            let (name, device) = (entry.name(), &device.facts().name);
            return Err(Failure::new(format!("backend '{name}' cannot run on {device}: {}", reasons.join("; "))));
        }
        vec![entry]
    };
    if chosen.is_empty() {
        return Err(Failure::new(format!("no registered backend runs on {}", device.facts().name)));
    }

    let place = device.facts().name.clone();
    let trials: Vec<(&'static str, Trial)> =
        chosen.iter().flat_map(|entry| suite(entry, &device).into_iter().map(|trial| (entry.name(), trial))).collect();
    let bar = ProgressBar::new(trials.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{pos}/{len} {wide_bar} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let stopped = interrupt::flag();
    // A backend that panics is told in its trial; the program's own output is no place for traces.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut rows = Vec::new();
    for (backend, trial) in trials {
        if stopped.load(std::sync::atomic::Ordering::SeqCst) {
            break;
        }
        let name = trial.name().to_owned();
        bar.set_message(format!("{backend}: {name}"));
        let failure = trial.run().err();
        bar.inc(1);
        rows.push(Row {
            backend,
            device: place.clone(),
            trial: name,
            passed: failure.is_none(),
            replay: failure.as_ref().and_then(|failure| failure.replay()).map(|file| file.display().to_string()),
            message: failure.map(|failure| failure.message().to_owned()),
        });
    }
    std::panic::set_hook(hook);
    bar.finish_and_clear();
    if stopped.load(std::sync::atomic::Ordering::SeqCst) {
        return Err(Failure::new(format!("stopped after {} trials", rows.len())));
    }
    context.answer(&rows, || text_of(&rows, &place))?;
    Ok(if rows.iter().all(|row| row.passed) { Verdict::Holds } else { Verdict::Fails })
}

fn declines(entry: &RegisteredBackend, device: &crate::device::DeviceFacts) -> Vec<Decline> {
    entry.backend.capabilities().device_declines(device)
}

fn text_of(rows: &[Row], device: &str) -> String {
    let mut out = String::new();
    for row in rows.iter().filter(|row| !row.passed) {
        let message = row.message.as_deref().unwrap_or("it failed");
        out += &format!("{}: {}\n  {message}\n", row.backend, row.trial);
        if let Some(file) = &row.replay {
            out += &format!("  polyattn replay {file} --backend {} shows it\n", row.backend);
        }
    }
    let mut table = output::table(&["backend", "device", "trials", "failed"]);
    let mut names: Vec<_> = rows.iter().map(|row| row.backend).collect();
    names.dedup();
    for name in names {
        let own = || rows.iter().filter(|row| row.backend == name);
        let failed = own().filter(|row| !row.passed).count();
        table.add_row([name, device, &own().count().to_string(), &failed.to_string()]);
    }
    out + &table.to_string()
}
