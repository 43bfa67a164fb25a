//! `polyattn bench kernels`.

use std::{path::PathBuf, sync::atomic::Ordering, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::plot;
use crate::{
    api::{Device, Phase, Policy, RegisteredBackend, Registry, select},
    bench::{Agreement, BenchError, Ceilings, Shape, Timing, Workload, catalogue},
    failure::{Ended, Failure, Verdict},
    interrupt,
    output::{self, Context},
};

/// How much slower than the fastest backend the selected one may be.
const SELECTION_MARGIN: f64 = 1.10;

/// Attention of real models' shapes, by every backend that serves them: how long a call takes, and what share of the
/// device's ceilings that is.
///
/// Keys, values and queries are random f16, pages lie in random order, and calls take turns on copies of small caches,
/// so that each reads from memory. Times are medians by GPU timestamps, by the wall clock where a device has none. GB/s
/// counts the visible keys and values once, the queries and the output; TFLOP/s counts the two products over what the
/// mask lets through. The ceilings are measured in the same run: bytes read and written by a compute kernel that copies,
/// and matrix products in f32, f16 and by cooperative matrices, of which the fastest counts. Some rows of every timed answer are compared with the f64 reference.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn bench kernels
  polyattn bench kernels --shape llama3-8b/decode --shape 'llama3-8b/verify*8x32k' --plot roofline.svg
  polyattn bench kernels --backend splitkv --shape smollm2 --device gpu --json
  polyattn bench kernels --assert-selection --seconds 1
  polyattn bench kernels --list

Exit code 1 says that an answer is out of tolerance, that a backend failed, or, with --assert-selection, that the \
selected backend is slower than it may be or that there was nothing to compare.")]
pub(super) struct Args {
    /// Shapes whose name contains this, in which * stands for anything; may be given several times. Without, all that
    /// the device has room and speed for.
    #[arg(long, value_name = "PATTERN")]
    shape: Vec<String>,

    /// A backend to measure; may be given several times. Without, every one that serves a shape.
    #[arg(long, value_name = "NAME")]
    backend: Vec<String>,

    /// Tokens of a page.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    page_size: u32,

    /// Seconds to measure each backend on each shape, about.
    #[arg(long, value_name = "S", default_value_t = 0.1, value_parser = seconds)]
    seconds: f64,

    /// Draw a roofline: operations for each byte against operations by the second.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Fail where the selected backend takes more than 1.10 times as long as the fastest.
    #[arg(long)]
    assert_selection: bool,

    /// List the shapes and what they cost at the least, and measure nothing.
    #[arg(long)]
    list: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.001..=60.0).contains(&seconds) => Ok(seconds),
        Ok(seconds) => Err(format!("{seconds} is not between 0.001 and 60")),
        Err(_) => Err("it is no number".into()),
    }
}

#[derive(Serialize)]
pub(super) struct Answer {
    command: String,
    pub(super) device: String,
    driver: String,
    page_size: u32,
    pub(super) ceilings: Ceilings,
    pub(super) shapes: Vec<Measured>,
    skipped: Vec<Skipped>,
}

/// A shape that was measured.
#[derive(Serialize)]
pub(super) struct Measured {
    #[serde(flatten)]
    pub(super) about: About,
    /// Copies of the cache that calls took turns on.
    copies: usize,
    /// Whom automatic selection takes.
    selected: Option<&'static str>,
    pub(super) backends: Vec<Row>,
    declined: Vec<Declined>,
}

/// A shape's numbers.
#[derive(Serialize)]
pub(super) struct About {
    pub(super) shape: String,
    model: &'static str,
    phase: Phase,
    kind: &'static str,
    query_heads: u32,
    kv_heads: u32,
    query_dim: u32,
    output_dim: u32,
    dtype: String,
    scale: f32,
    /// Keys that a row sees, its own included; all before it where absent.
    window: Option<u32>,
    softcap: Option<f32>,
    sinks: bool,
    batch: u32,
    query_rows: u32,
    context: u32,
    pub(super) bytes: u64,
    pub(super) flops: u64,
}

#[derive(Serialize)]
struct Declined {
    backend: &'static str,
    reasons: Vec<String>,
}

#[derive(Serialize)]
struct Skipped {
    shape: String,
    reason: String,
}

/// One backend on one shape.
#[derive(Serialize)]
pub(super) struct Row {
    pub(super) backend: &'static str,
    #[serde(flatten)]
    pub(super) found: Found,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Found {
    Ran(Numbers),
    Failed { error: String },
}

// serde_json writes what is not finite as null.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Numbers {
    microseconds: f64,
    wall_microseconds: f64,
    calls: u32,
    repetitions: u32,
    gigabytes_per_second: f64,
    pub(super) teraflops: f64,
    share_of_copy: f64,
    share_of_product: f64,
    /// Of what copy and product together allow.
    share_of_ceiling: f64,
    /// Against the same backend's decode call over the same cache.
    over_decode: Option<f64>,
    max_abs_err: f64,
    rel_l2: f64,
    within_tolerance: bool,
}

impl Row {
    pub(super) fn numbers(&self) -> Option<&Numbers> {
        match &self.found {
            Found::Ran(numbers) => Some(numbers),
            Found::Failed { .. } => None,
        }
    }
}

impl Numbers {
    fn of(shape: &Shape, ceilings: &Ceilings, timing: &Timing, agreement: &Agreement) -> Self {
        let (gigabytes, teraflops) =
            (shape.bytes() as f64 / timing.seconds / 1e9, shape.flops() as f64 / timing.seconds / 1e12);
        Self {
            microseconds: timing.seconds * 1e6,
            wall_microseconds: timing.wall_seconds * 1e6,
            calls: timing.calls,
            repetitions: timing.repetitions,
            gigabytes_per_second: gigabytes,
            teraflops,
            share_of_copy: gigabytes / ceilings.copy_gigabytes_per_second,
            share_of_product: teraflops / ceilings.product_teraflops(),
            share_of_ceiling: ceilings.share(shape, timing.seconds),
            over_decode: None,
            max_abs_err: agreement.max_abs_err,
            rel_l2: agreement.rel_l2,
            within_tolerance: agreement.within_tolerance,
        }
    }
}

impl About {
    fn of(shape: &Shape) -> Self {
        let kind = shape.problem.kind;
        Self {
            shape: shape.name.clone(),
            model: shape.model,
            phase: shape.problem.phase,
            kind: if shape.token_elements().1 == 0 { "mla" } else { "gqa" },
            query_heads: kind.query_heads(),
            kv_heads: kind.kv_heads(),
            query_dim: kind.query_dim(),
            output_dim: kind.output_dim(),
            dtype: shape.problem.dtype.to_string(),
            scale: shape.problem.scale,
            window: shape.problem.window.and_then(|window| window.left).map(|left| left + 1),
            softcap: shape.problem.softcap,
            sinks: shape.problem.sinks,
            batch: shape.batch,
            query_rows: shape.rows,
            context: shape.context,
            bytes: shape.bytes(),
            flops: shape.flops(),
        }
    }
}

pub(super) fn run(args: &Args, context: &Context) -> Ended {
    let registry = Registry::global()?;
    let backends = backends(&args.backend, registry)?;
    let shapes = shapes(&args.shape)?;
    if args.list {
        let all: Vec<About> = shapes.iter().map(About::of).collect();
        context.answer(&all, || list(&all))?;
        return Ok(Verdict::Holds);
    }
    let device = context.open()?;
    let mut answer = Answer {
        command: output::command_line(),
        device: device.facts().name.clone(),
        driver: device.facts().driver.clone(),
        page_size: args.page_size,
        ceilings: Ceilings::measure(&device)?,
        shapes: Vec::new(),
        skipped: Vec::new(),
    };

    let stopped = interrupt::flag();
    let bar = ProgressBar::new(shapes.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{pos}/{len} {wide_bar} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    for shape in &shapes {
        let slow = if args.shape.is_empty() { shape.too_slow_for(device.facts()) } else { None };
        let measured = match slow {
            Some(reason) => Err(BenchError::NoRoom(reason)),
            None => measure(args, &device, registry, &backends, shape, &answer.ceilings, |backend| {
                bar.set_message(format!("{}: {backend}", shape.name));
                !stopped.load(Ordering::SeqCst)
            }),
        };
        if stopped.load(Ordering::SeqCst) {
            bar.finish_and_clear();
            return Err(Failure::new(format!("stopped after {} shapes", answer.shapes.len())));
        }
        match measured {
            Ok(measured) => answer.shapes.push(measured),
            Err(BenchError::NoRoom(reason)) => answer.skipped.push(Skipped { shape: shape.name.clone(), reason }),
            Err(error) => return Err(Failure::new(format!("{}: {error}", shape.name))),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    compare_with_decode(&mut answer.shapes, &shapes);

    if let Some(file) = &args.plot {
        std::fs::write(file, plot::roofline(&answer))
            .map_err(|error| Failure::new(format!("--plot {}: {error}", file.display())))?;
    }
    let offenders = if args.assert_selection { offenders(&answer.shapes, &answer.device) } else { Vec::new() };
    context.answer(&answer, || table(&answer))?;
    for offender in &offenders {
        output::complain(offender);
    }
    let right = |row: &Row| row.numbers().is_some_and(|numbers| numbers.within_tolerance);
    let all_right = answer.shapes.iter().flat_map(|shape| &shape.backends).all(right);
    if !all_right {
        output::complain("an answer is out of tolerance or missing");
    }
    Ok(if all_right && offenders.is_empty() { Verdict::Holds } else { Verdict::Fails })
}

/// Those named, or all.
fn backends(names: &[String], registry: &Registry) -> Result<Vec<RegisteredBackend>, Failure> {
    let all = registry.backends();
    for name in names {
        if !all.iter().any(|backend| backend.name().eq_ignore_ascii_case(name)) {
            let registered = registry.backend_names();
            return Err(Failure::new(format!("unknown attention backend '{name}'; registered are: {registered}")));
        }
    }
    let wanted = |backend: &&RegisteredBackend| {
        names.is_empty() || names.iter().any(|name| backend.name().eq_ignore_ascii_case(name))
    };
    Ok(all.iter().filter(wanted).cloned().collect())
}

/// Those that match, and the decode calls that verification is compared with.
fn shapes(patterns: &[String]) -> Result<Vec<Shape>, Failure> {
    let all = catalogue();
    for pattern in patterns {
        if !all.iter().any(|shape| shape.matches(pattern)) {
            let message = format!("--shape '{pattern}' fits no shape; 'polyattn bench kernels --list' shows them");
            return Err(Failure::new(message));
        }
    }
    let matches = |shape: &&Shape| patterns.is_empty() || patterns.iter().any(|pattern| shape.matches(pattern));
    let decode: Vec<String> = all.iter().filter(matches).filter_map(Shape::decode).collect();
    Ok(all.iter().filter(|shape| matches(shape) || decode.contains(&shape.name)).cloned().collect())
}

/// Every backend on one shape, as long as `goes_on` says so when it is told whose turn it is.
fn measure(
    args: &Args,
    device: &Device,
    registry: &Registry,
    backends: &[RegisteredBackend],
    shape: &Shape,
    ceilings: &Ceilings,
    mut goes_on: impl FnMut(&str) -> bool,
) -> Result<Measured, BenchError> {
    let problem = shape.problem.clone().page_size(args.page_size);
    let (mut serving, mut declined) = (Vec::new(), Vec::new());
    for backend in backends {
        let reasons: Vec<_> = backend.declines(&problem, device.facts()).iter().map(ToString::to_string).collect();
        match reasons.is_empty() {
            true => serving.push(backend),
            false => declined.push(Declined { backend: backend.name(), reasons }),
        }
    }
    if serving.is_empty() {
        let reasons = declined.iter().map(|one| format!("{}: {}", one.backend, one.reasons.join("; ")));
        return Err(BenchError::NoRoom(format!("nobody serves it: {}", reasons.collect::<Vec<_>>().join(" | "))));
    }
    let selected = select(&problem, device.facts(), registry, &Policy::Auto).ok().map(|taken| taken.backend.name());
    let workload = Workload::new(device, shape, args.page_size)?;
    let samples = workload.samples()?;
    let mut rows = Vec::new();
    for backend in serving {
        if !goes_on(backend.name()) {
            break;
        }
        let found = workload.time(backend, Duration::from_secs_f64(args.seconds)).and_then(|timing| {
            let agreement = workload.check(backend, &samples)?;
            Ok(Numbers::of(shape, ceilings, &timing, &agreement))
        });
        let found = match found {
            Ok(numbers) => Found::Ran(numbers),
            Err(error) => Found::Failed { error: error.to_string() },
        };
        rows.push(Row { backend: backend.name(), found });
    }
    Ok(Measured { about: About::of(shape), copies: workload.copies(), selected, backends: rows, declined })
}

fn compare_with_decode(measured: &mut [Measured], shapes: &[Shape]) {
    let time = |measured: &[Measured], shape: &str, backend: &str| {
        let row = measured.iter().find(|one| one.about.shape == shape)?;
        Some(row.backends.iter().find(|row| row.backend == backend)?.numbers()?.microseconds)
    };
    for at in 0..measured.len() {
        let shape = shapes.iter().find(|shape| shape.name == measured[at].about.shape);
        let Some(decode) = shape.and_then(Shape::decode) else { continue };
        for row in 0..measured[at].backends.len() {
            let base = time(measured, &decode, measured[at].backends[row].backend);
            if let Found::Ran(numbers) = &mut measured[at].backends[row].found {
                numbers.over_decode = base.map(|base| numbers.microseconds / base);
            }
        }
    }
}

/// A sentence for each shape whose selected backend is slower than it may be, or one where there is nothing to compare.
fn offenders(shapes: &[Measured], device: &str) -> Vec<String> {
    if shapes.iter().flat_map(|shape| &shape.backends).all(|row| row.numbers().is_none()) {
        return vec![format!("--assert-selection compared nothing: no backend was measured on any shape on {device}")];
    }
    let mut out = Vec::new();
    for shape in shapes {
        let times = || shape.backends.iter().filter_map(|row| Some((row.backend, row.numbers()?.microseconds)));
        let best = times().min_by(|a, b| a.1.total_cmp(&b.1));
        let selected = times().find(|(name, _)| Some(*name) == shape.selected);
        let name = &shape.about.shape;
        match (selected, best) {
            (Some((selected, took)), Some((best, least))) if took > least * SELECTION_MARGIN => {
                let times = took / least;
                out.push(format!(
                    "{name}: '{selected}' is selected and takes {took:.1} µs, {times:.2} times the {least:.1} µs of '{best}'"
                ));
            }
            (None, Some(_)) => {
                let selected = shape.selected.unwrap_or("nobody");
                out.push(format!("{name}: '{selected}' is selected and was not measured"));
            }
            _ => {}
        }
    }
    out
}

fn list(shapes: &[About]) -> String {
    let mut table = output::table(&["shape", "kind", "heads", "dims", "MB", "GFLOP", "FLOP/byte"]);
    for shape in shapes {
        table.add_row([
            shape.shape.clone(),
            shape.kind.to_owned(),
            format!("{}/{}", shape.query_heads, shape.kv_heads),
            format!("{}/{}", shape.query_dim, shape.output_dim),
            format!("{:.1}", shape.bytes as f64 / 1e6),
            format!("{:.2}", shape.flops as f64 / 1e9),
            format!("{:.1}", shape.flops as f64 / shape.bytes as f64),
        ]);
    }
    table.to_string()
}

fn table(answer: &Answer) -> String {
    let ceilings = &answer.ceilings;
    let products: Vec<String> =
        ceilings.products().map(|(name, reached)| format!("{} in {name}", significant(reached))).collect();
    let mut text = format!(
        "{}, pages of {}, {}\nceilings of this run: copy {} GB/s read and written, matrix product (TFLOP/s) {}\n",
        format!("{} {}", answer.device, answer.driver).trim_end(),
        answer.page_size,
        match ceilings.clock {
            crate::bench::Clock::GpuTimestamps => "GPU timestamps",
            crate::bench::Clock::WallClock => "wall clock",
        },
        significant(ceilings.copy_gigabytes_per_second),
        products.join(", "),
    );
    let mut table =
        output::table(&["shape", "backend", "µs", "GB/s", "of copy", "TFLOP/s", "of product", "÷ decode", "error"]);
    for shape in &answer.shapes {
        for row in &shape.backends {
            let selected = if shape.selected == Some(row.backend) { " ←" } else { "" };
            let mut cells = vec![shape.about.shape.clone(), format!("{}{selected}", row.backend)];
            match &row.found {
                Found::Ran(numbers) => cells.extend([
                    significant(numbers.microseconds),
                    significant(numbers.gigabytes_per_second),
                    format!("{:.0} %", numbers.share_of_copy * 100.0),
                    significant(numbers.teraflops),
                    format!("{:.0} %", numbers.share_of_product * 100.0),
                    numbers.over_decode.map_or("–".into(), |over| format!("{over:.2}")),
                    format!("{:.1e}{}", numbers.rel_l2, if numbers.within_tolerance { "" } else { " WRONG" }),
                ]),
                Found::Failed { error } => cells.push(error.clone()),
            }
            table.add_row(cells);
        }
    }
    text += &table.to_string();
    if answer.shapes.iter().any(|shape| shape.selected.is_some()) {
        text += "\n← selected";
    }
    let mut skipped: Vec<(&str, Vec<&str>)> = Vec::new();
    for one in &answer.skipped {
        match skipped.iter_mut().find(|(reason, _)| *reason == one.reason) {
            Some((_, shapes)) => shapes.push(&one.shape),
            None => skipped.push((&one.reason, vec![&one.shape])),
        }
    }
    for (reason, shapes) in skipped {
        text += &format!("\nskipped, {reason}: {}", shapes.join(", "));
    }
    text
}

/// A number with at least three significant digits and no more behind the point than that takes.
pub(super) fn significant(number: f64) -> String {
    let behind = (2.0 - number.abs().log10().floor()).clamp(0.0, 6.0);
    format!("{number:.*}", behind as usize)
}
