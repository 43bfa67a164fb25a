//! What the end-to-end tests share: devices, models, and the rule by which greedy tokens are compared.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test's help may fail the test")]

use std::{
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use polyattn_api::{Registry, TargetFacts};
use polyattn_device::{Device, DeviceChoice};
use polyattn_dflash::tiny as dflash;
use polyattn_eagle::tiny as eagle;
use polyattn_engine::{Engine, EngineOptions, Generation, Request};
use polyattn_medusa::tiny as medusa;
use polyattn_mtp::{Form, tiny as mtp};
use polyattn_nn::load::ModelSource;
// Registers every plugin.
use polyattn as _;

/// The gap between the best and the second logit below which two summation orders may choose differently.
const TIE: f64 = 0.01;

/// What stands against a greedy token.
#[derive(Clone, Copy, Debug)]
pub struct Margin {
    /// The second best, where it is known.
    pub second: Option<u32>,
    /// How far its logit lies below the best.
    pub gap: f64,
    /// The gap below which the two tie.
    pub tie: f64,
}

impl Margin {
    /// The gaps that another implementation tells, whose logits may be off by as much as half of `tie`.
    #[must_use]
    pub fn of_gaps(gaps: &[f64], tie: f64) -> Vec<Self> {
        gaps.iter().map(|gap| Self { second: None, gap: *gap, tie }).collect()
    }

    fn lets(&self, token: u32) -> bool {
        self.gap < self.tie && self.second.is_none_or(|second| second == token)
    }
}

/// The CPU, and a GPU where there is one; says so where there is none.
#[must_use]
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    devices
}

/// A path below the folder of tests.
#[must_use]
pub fn tests_folder(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// What a proposer is tried with: a checkpoint of its own, and a target if it needs another than the tiny one.
#[derive(Clone, Debug, Default)]
pub struct Drafted {
    /// The target, where it is not the one that was given.
    pub target: Option<PathBuf>,
    /// The drafter's checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Writes what a proposer is tried with into an empty folder, for the target at a path.
pub type WriteTiny = fn(&Path, &Path) -> io::Result<Drafted>;

/// The proposers that need a checkpoint, each with who writes a tiny random one in its own format.
pub const TINY_DRAFTERS: &[(&str, WriteTiny)] = &[
    ("combine", |target, folder| random(target, folder, |target, folder| dflash::write_random(target, folder, false))),
    ("dflash", |target, folder| random(target, folder, |target, folder| dflash::write_random(target, folder, false))),
    // A model that drafts for itself.
    ("draft-model", |target, _| Ok(Drafted { target: None, checkpoint: Some(target.to_owned()) })),
    ("eagle", |target, folder| random(target, folder, eagle::write_random)),
    ("eagle3", |target, folder| random(target, folder, eagle::write_random3)),
    ("medusa", |target, folder| random(target, folder, medusa::write_random)),
    ("mtp", |target, folder| {
        random(target, folder, |target, folder| mtp::write_random(target, folder, Form::DeepSeek))
    }),
];

fn random(target: &Path, folder: &Path, write: impl Fn(&TargetFacts, &Path) -> io::Result<()>) -> io::Result<Drafted> {
    write(&facts(target), folder)?;
    Ok(Drafted { target: None, checkpoint: Some(folder.to_owned()) })
}

/// What a proposer knows of the target at a path.
#[must_use]
pub fn facts(target: &Path) -> TargetFacts {
    let model = ModelSource::open(target).unwrap().config;
    TargetFacts::new(model.layers, model.hidden_size, model.vocab_size, model.context_length).loaded_from(target)
}

/// SmolLM2-135M-Instruct, if it was fetched; says how to fetch it where it was not.
#[must_use]
pub fn smollm2() -> Option<ModelSource> {
    match polyattn::models::locate("smollm2") {
        Some(path) => Some(ModelSource::open(&path).unwrap()),
        None => {
            eprintln!("skipped: SmolLM2 is not in the cache; fetch it with 'polyattn fetch smollm2'");
            None
        }
    }
}

/// An engine with every registered plugin at hand.
#[must_use]
pub fn engine(source: &ModelSource, device: &Device, options: &EngineOptions) -> Engine {
    Engine::load(source, device, Registry::global().unwrap(), options, &mut |_| {}).unwrap()
}

/// Greedy tokens of a prompt, without regard to end tokens.
#[must_use]
pub fn greedy(engine: &mut Engine, prompt: &[u32], tokens: usize) -> Generation {
    let mut request = Request::new(prompt.to_vec(), tokens);
    request.stop = Some(Vec::new());
    engine.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// The margins along a text, to tell ties.
#[must_use]
pub fn margins(engine: &mut Engine, prompt: &[u32], tokens: &[u32], vocab: usize) -> Vec<Margin> {
    let text = [prompt, tokens].concat();
    let logits = engine.score(&text[..text.len() - 1]).unwrap();
    logits
        .chunks(vocab)
        .skip(prompt.len() - 1)
        .map(|row| {
            let mut sorted: Vec<usize> = (0..vocab).collect();
            sorted.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            Margin { second: Some(sorted[1] as u32), gap: f64::from(row[sorted[0]] - row[sorted[1]]), tie: TIE }
        })
        .collect()
}

/// Asserts that two runs chose the same tokens, up to the first place where the best and the second token tie and the
/// second was chosen. Answers how many tokens were compared.
pub fn assert_same_up_to_ties(got: &[u32], want: &[u32], margins: &[Margin], what: &str) -> usize {
    for (place, (a, b)) in got.iter().zip(want).enumerate() {
        if a != b {
            assert!(
                margins[place].lets(*a),
                "{what}: token {place} is {a} instead of {b}, and no tie: {:?}",
                margins[place]
            );
            eprintln!("{what}: token {place} is {a} instead of {b}, a tie: {:?}", margins[place]);
            return place;
        }
    }
    assert_eq!(got.len(), want.len(), "{what}: another number of tokens");
    got.len()
}

/// The README's own code, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
#[derive(Debug)]
pub struct Readme;

#[cfg(test)]
mod tests {
    use super::{Margin, assert_same_up_to_ties};

    const WANT: [u32; 3] = [5, 6, 7];

    fn compared(got: &[u32], second: Option<u32>, gap: f64) -> Option<usize> {
        let margins = [Margin { second, gap, tie: 0.01 }; 3];
        std::panic::catch_unwind(|| assert_same_up_to_ties(got, &WANT, &margins, "planted")).ok()
    }

    #[test]
    fn only_the_second_of_a_tie_is_let_through() {
        assert_eq!(compared(&WANT, Some(9), 0.0), Some(3));
        assert_eq!(compared(&[5, 9, 1], Some(9), 0.001), Some(1));
        assert_eq!(compared(&[5, 8, 7], Some(9), 0.001), None, "not the second");
        assert_eq!(compared(&[5, 9, 7], Some(9), 0.02), None, "no tie");
        assert_eq!(compared(&[5, 9, 7], None, 0.001), Some(1));
        assert_eq!(compared(&[5, 9, 7], None, 0.02), None);
        assert_eq!(compared(&WANT[..2], Some(9), 0.0), None, "a token is missing");
    }
}
