//! polyattn's attention beside its peers: the catalogue's shapes, in one run on one device.
//!
//! Each contestant is a process of its own, so that one that panics or does not end takes nobody with it; the shapes go
//! round, one contestant at a time. All of them are timed alike, by the wall clock from the first launch until the device
//! is done with the last of many, and by GPU timestamps round the same launches where a contestant gives them.

mod child;
mod contest;
mod cubek;
mod own;

use std::{collections::BTreeMap, io::Write, process::ExitCode, time::Duration};

use clap::Parser;
use polyattn::{
    api::{Device, Phase, Registry},
    bench::{Ceilings, Shape, catalogue},
    device::DeviceChoice,
};
use serde::Serialize;

use child::Child;
use contest::{Contestant, Row};

type Error = Box<dyn std::error::Error>;

/// burn's process is another program, `peers-burn`, built with the feature `burn`: its compiler and that of
/// cubek-attention, of another version, do not run in one.
const BURN: &str = "burn";

/// Everybody, ourselves first.
const CONTESTANTS: &[&str] = &[own::NAME, cubek::WGSL, cubek::SPIRV, BURN];

/// The decode and verify shapes of the project's own targets, and some that a processor has done soon.
const DEFAULT: &[&str] = &[
    "llama3-8b/decode/1x1k",
    "llama3-8b/decode/64x8k",
    "llama3-8b/decode/1x128k",
    "llama3-8b/decode/16x8k",
    "llama3-8b/decode/8x32k",
    "llama3-8b/verify-q*/8x32k",
    "llama3-8b/verify-q4/1x1k",
    "smollm2-135m/decode/1x1k",
    "smollm2-135m/decode/4x1k",
    "smollm2-135m/verify-q8/1x1k",
    "smollm2-135m/verify-q4/4x1k",
];

/// polyattn's attention beside cubek-attention and burn.
#[derive(Debug, Parser)]
struct Args {
    /// Shapes whose name contains this, in which * stands for anything; may be given several times.
    #[arg(long, value_name = "PATTERN")]
    shape: Vec<String>,

    /// The device: gpu, an adapter's index or part of its name. The peers take the only adapter of its kind.
    #[arg(long, default_value = "gpu")]
    device: String,

    /// A contestant; may be given several times.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// Seconds to measure each contestant on each shape, about.
    #[arg(long, default_value_t = 0.25)]
    seconds: f64,

    /// Seconds that a contestant may spend on one shape, compilation and tuning included.
    #[arg(long, default_value_t = 120)]
    patience: u64,

    /// Seconds after which no further shape is begun.
    #[arg(long, default_value_t = 3600)]
    limit: u64,

    /// Print one JSON document.
    #[arg(long)]
    json: bool,

    /// Fail unless what polyattn selects is this many times as fast as every cubek-attention on every decode and verify
    /// shape, with an answer of one of them on each.
    #[arg(long, value_name = "RATIO")]
    assert_faster: Option<f64>,

    /// Be this contestant: shapes come by standard input, answers go to standard output.
    #[arg(long, hide = true)]
    be: Option<String>,
}

#[derive(Serialize)]
struct Answer {
    command: String,
    device: String,
    driver: String,
    versions: BTreeMap<&'static str, &'static str>,
    ceilings: Ceilings,
    shapes: Vec<Measured>,
    skipped: Vec<String>,
}

#[derive(Serialize)]
struct Measured {
    shape: String,
    phase: Phase,
    bytes: u64,
    flops: u64,
    rows: Vec<Row>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.be {
        Some(name) => be(name, &args).map(|()| true),
        None => hold(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn be(name: &str, args: &Args) -> Result<(), Error> {
    let device = open(args)?;
    let budget = Duration::from_secs_f64(args.seconds);
    let mut contestant: Box<dyn Contestant> = match name {
        own::NAME => Box::new(own::Own::new(device, Registry::global()?)),
        cubek::WGSL | cubek::SPIRV => Box::new(cubek::Cubek::new(device.facts(), name == cubek::WGSL)),
        other => return Err(format!("unknown contestant '{other}'; there are: {}", CONTESTANTS.join(", ")).into()),
    };
    contest::serve(contestant.as_mut(), budget)
}

fn open(args: &Args) -> Result<Device, Error> {
    let choice: DeviceChoice = args.device.parse()?;
    Ok(Device::open(&choice)?)
}

fn hold(args: &Args) -> Result<bool, Error> {
    let begin = std::time::Instant::now();
    let device = open(args)?;
    let facts = device.facts().clone();
    if facts.is_cpu() {
        return Err("the peers run on GPUs; the software GPU will do".into());
    }
    let ceilings = Ceilings::measure(&device)?;
    drop(device);
    let names: Vec<&str> = match args.only.as_slice() {
        [] => CONTESTANTS.to_vec(),
        some => some.iter().map(String::as_str).collect(),
    };
    let mut children = Vec::new();
    for name in names {
        let seconds = args.seconds.to_string();
        let mut program = std::env::current_exe()?;
        if name == BURN {
            program.set_file_name(format!("peers-burn{}", std::env::consts::EXE_SUFFIX));
            if !program.exists() {
                eprintln!("without burn: it is built with --features burn");
                continue;
            }
        }
        children.push(Child::new(name, program, &["--be", name, "--device", &args.device, "--seconds", &seconds]));
    }
    let mut answer = Answer {
        command: std::iter::once("peers".to_owned()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" "),
        device: facts.name.clone(),
        driver: facts.driver.clone(),
        versions: BTreeMap::from([("cubecl", "0.12.0-pre.1"), ("cubek-attention", "0.4.0-pre.1"), ("burn", "0.22.1")]),
        ceilings,
        shapes: Vec::new(),
        skipped: Vec::new(),
    };
    let wanted = |shape: &Shape| match args.shape.as_slice() {
        [] => DEFAULT.iter().any(|pattern| shape.matches(pattern)) && shape.too_slow_for(&facts).is_none(),
        patterns => patterns.iter().any(|pattern| shape.matches(pattern)),
    };
    for shape in catalogue().into_iter().filter(wanted) {
        if begin.elapsed().as_secs() > args.limit {
            answer.skipped.push(shape.name);
            continue;
        }
        let mut rows = Vec::new();
        for child in &mut children {
            eprint!("\r\x1b[K{}: {}", shape.name, child.name());
            let _ = std::io::stderr().flush();
            rows.extend(child.measure(&shape.name, Duration::from_secs(args.patience)));
        }
        child::compare(&mut rows);
        let (bytes, flops) = (shape.bytes(), shape.flops());
        answer.shapes.push(Measured { phase: shape.problem.phase, shape: shape.name, bytes, flops, rows });
    }
    eprint!("\r\x1b[K");
    if args.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        print(&answer);
    }
    Ok(holds(&answer, args.assert_faster))
}

/// Whether every answer is right, and ours as much faster as is asked for.
fn holds(answer: &Answer, wanted: Option<f64>) -> bool {
    let mut holds = true;
    for shape in &answer.shapes {
        for row in &shape.rows {
            let ours = row.contestant.starts_with(own::NAME);
            if row.within_tolerance == Some(false) || (ours && row.error.is_some()) {
                eprintln!("{}: {} is wrong or failed", shape.shape, row.contestant);
                holds &= !ours;
            }
        }
    }
    wanted.is_none_or(|wanted| is_faster(answer, wanted)) && holds
}

/// Whether ours is so many times as fast as every cubek-attention on every decode and verify shape, of which there is
/// one, and one of them answered on each.
fn is_faster(answer: &Answer, wanted: f64) -> bool {
    let mut faults = Vec::new();
    let mut shapes = answer.shapes.iter().filter(|shape| shape.phase != Phase::Prefill).peekable();
    if shapes.peek().is_none() {
        faults.push("no decode or verify shape to compare on".to_owned());
    }
    for Measured { shape, rows, .. } in shapes {
        let mut compared = false;
        for row in rows.iter().filter(|row| row.contestant.starts_with("cubek")) {
            // The smaller of the two clocks' ratios, so that neither recording nor the GPU alone flatters.
            let Some(ratio) = [row.ratio, row.wall_ratio].into_iter().flatten().reduce(f64::min) else { continue };
            compared = true;
            if ratio < wanted {
                faults.push(format!("{shape}: {ratio:.2} times as fast as {}, not {wanted}", row.contestant));
            }
        }
        if !compared {
            faults.push(format!("{shape}: cubek-attention gave no answer to compare with"));
        }
    }
    if !answer.skipped.is_empty() {
        faults.push(format!("no time was left for {}", answer.skipped.join(", ")));
    }
    faults.iter().for_each(|fault| eprintln!("{fault}"));
    faults.is_empty()
}

fn print(answer: &Answer) {
    println!(
        "{} {}: copy {:.1} GB/s read and written, product {:.2} TFLOP/s",
        answer.device,
        answer.driver,
        answer.ceilings.copy_gigabytes_per_second,
        answer.ceilings.product_teraflops()
    );
    println!(
        "{:<32} {:<20} {:>11} {:>11} {:>8} {:>7} {:>7} {:>8}",
        "shape", "contestant", "µs", "wall µs", "GB/s", "ratio", "wall", "error"
    );
    for shape in &answer.shapes {
        for row in &shape.rows {
            let name = format!("{}{}", row.contestant, if row.selected { " ←" } else { "" });
            let number = |value: Option<f64>, digits| value.map_or("–".into(), |value| format!("{value:.digits$}"));
            match &row.error {
                Some(error) => println!("{:<32} {name:<20} {error}", shape.shape),
                None => println!(
                    "{:<32} {name:<20} {:>11} {:>11} {:>8} {:>7} {:>7} {:>8}",
                    shape.shape,
                    number(row.microseconds, 1),
                    number(row.wall_microseconds, 1),
                    number(row.microseconds.map(|us| shape.bytes as f64 / us / 1e3), 1),
                    number(row.ratio, 2),
                    number(row.wall_ratio, 2),
                    row.rel_l2.map_or("–".into(), |error| format!("{error:.1e}")),
                ),
            }
        }
    }
    println!("← selected; ratio: its time into the contestant's, so that above 1 polyattn is the faster");
}
