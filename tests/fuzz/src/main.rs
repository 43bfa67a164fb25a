//! Runs the targets without libFuzzer, on any toolchain: changed seeds, no coverage.
//!
//! `polyattn-fuzz [TARGET|all] [SECONDS]`; `polyattn-fuzz seeds FOLDER` writes a corpus for cargo-fuzz;
//! `polyattn-fuzz TARGET FILE` runs one input again.

#![forbid(unsafe_code)]

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use arbitrary::Unstructured;
use polyattn_fuzz::{TARGETS, seeds};

/// An input may take this long.
const SLOW: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wanted = arguments.first().map_or("all", String::as_str);
    let second = arguments.get(1).map(String::as_str);
    if let ("seeds", Some(folder)) = (wanted, second) {
        return match write_seeds(Path::new(folder)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("{folder}: {error}")),
        };
    }
    let targets: Vec<_> = TARGETS.into_iter().filter(|(name, _)| wanted == "all" || wanted == *name).collect();
    if targets.is_empty() {
        let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
        return fail(&format!("'{wanted}' is no target; there are {}, and all", names.join(", ")));
    }
    let seconds = match second.map(|text| (text, text.parse::<u64>())) {
        None => 5,
        Some((_, Ok(seconds))) => seconds,
        Some((path, Err(_))) => match fs::read(path) {
            Ok(input) => {
                targets.iter().for_each(|(_, target)| target(&input));
                return ExitCode::SUCCESS;
            }
            Err(error) => return fail(&format!("{path} is neither seconds nor a file: {error}")),
        },
    };
    let mut found = false;
    for (name, target) in targets {
        found |= !run(name, target, Duration::from_secs(seconds));
    }
    if found { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("{message}");
    ExitCode::from(2)
}

fn write_seeds(folder: &Path) -> std::io::Result<()> {
    for (name, _) in TARGETS {
        fs::create_dir_all(folder.join(name))?;
        for (at, seed) in seeds::of(name).into_iter().enumerate() {
            fs::write(folder.join(name).join(format!("seed-{at}")), seed)?;
        }
    }
    Ok(())
}

/// Whether nothing was found. What makes the target panic or dawdle is written into the current folder.
fn run(name: &str, target: fn(&[u8]), time: Duration) -> bool {
    let seeds = seeds::of(name);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (start, mut runs) = (Instant::now(), 0u64);
    while start.elapsed() < time {
        let input = match (runs as usize) < seeds.len() {
            true => seeds[runs as usize].clone(),
            false => change(&mut random, &seeds),
        };
        let began = Instant::now();
        let panicked = std::panic::catch_unwind(|| target(&input)).is_err();
        if panicked || began.elapsed() > SLOW {
            let file = format!("{name}-{runs}.input");
            let written = fs::write(&file, &input).map_or_else(|error| error.to_string(), |()| file);
            eprintln!("{name}: {} at run {runs}: {written}", if panicked { "panicked" } else { "slow" });
            return false;
        }
        runs += 1;
    }
    println!("{name}: {runs} inputs in {:?}, nothing found", start.elapsed());
    true
}

/// A seed with some changes: bytes, words, pieces taken out, doubled or taken from another seed.
fn change(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut input = seeds[random.below(seeds.len())].clone();
    for _ in 0..1 + random.below(6) {
        let length = input.len();
        // Headers come first and decide most.
        let reach = if random.below(3) == 0 { length } else { length.min(1024) };
        let at = random.below(reach.max(1));
        let size = (1 + random.below(16)).min(length.saturating_sub(at));
        match random.below(8) {
            0 if length > 0 => input[at] = random.next() as u8,
            1 if length > 0 => input[at] ^= 1 << random.below(8),
            2 => {
                let words = [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fff_ffff, u64::from(u32::MAX), 1 << 40, u64::MAX];
                let word = words[random.below(words.len())].to_le_bytes();
                let size = [1, 2, 4, 8][random.below(4)].min(length.saturating_sub(at));
                input[at..at + size].copy_from_slice(&word[..size]);
            }
            3 => drop(input.drain(at..at + size)),
            4 => input.truncate(at),
            5 => {
                let piece = input[at..at + size].to_vec();
                input.splice(at..at, piece);
            }
            6 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len().max(1));
                let piece = other[from..(from + 64).min(other.len())].to_vec();
                input.splice(at..at + size, piece);
            }
            // A digit of a text.
            _ => {
                if let Some(digit) = input[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                    *digit = b"0123456789-"[random.below(11)];
                }
            }
        }
    }
    input
}

/// A xorshift generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        let bytes = self.next().to_le_bytes();
        Unstructured::new(&bytes).choose_index(limit).unwrap_or(0)
    }
}
