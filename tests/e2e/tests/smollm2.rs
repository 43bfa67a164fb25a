//! The real model, and its trained drafter, against independent implementations (`tests/golden/make_smollm2.py`,
//! `tests/golden/smollm2_dflash.py`). Skipped, with a word, where the model was not fetched.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use polyattn_api::Registry;
use polyattn_conformance::{ProposerSubject, proposer_suite};
use polyattn_device::Device;
use polyattn_e2e::{Margin, assert_same_up_to_ties, devices, engine, greedy, smollm2, tests_folder};
use polyattn_engine::{EngineOptions, SpeculativeOptions};
use polyattn_nn::load::{ChatMessage, ModelSource};
use serde::{Deserialize, de::DeserializeOwned};

#[derive(Deserialize)]
struct Text {
    ids: Vec<u32>,
    argmax: Vec<u32>,
    margins: Vec<f64>,
    top20: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    position: usize,
    ids: Vec<u32>,
    logits: Vec<f64>,
}

#[derive(Deserialize)]
struct Answer {
    user: String,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    margins: Vec<f64>,
}

#[derive(Deserialize)]
struct Golden {
    passage: Text,
    chat: Text,
    greedy: Vec<Answer>,
}

#[derive(Deserialize)]
struct Runs {
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    domain: String,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    margins: Vec<f64>,
    accepted: Vec<u32>,
}

fn golden<T: DeserializeOwned>(file: &str) -> T {
    serde_json::from_str(&std::fs::read_to_string(tests_folder("golden").join(file)).unwrap()).unwrap()
}

fn context(tokens: u32) -> EngineOptions {
    EngineOptions::default().with_context(tokens)
}

fn dflash(width: u32) -> EngineOptions {
    context(512).with_speculative(Some(SpeculativeOptions {
        method: "dflash".into(),
        model: Some(tests_folder("models/smollm2-135m-dflash")),
        num_speculative_tokens: Some(width),
        ..SpeculativeOptions::default()
    }))
}

#[test]
fn logits_agree_with_an_independent_reference() {
    let Some(source) = smollm2() else { return };
    let golden: Golden = golden("smollm2-logits.json");
    let vocab = source.config.vocab_size as usize;
    for device in devices() {
        let mut engine = engine(&source, &device, &context(128));
        for text in [&golden.passage, &golden.chat] {
            let logits = engine.score(&text.ids).unwrap();
            let mut worst = 0f64;
            for row in &text.top20 {
                let got = &logits[row.position * vocab..][..vocab];
                for (id, want) in row.ids.iter().zip(&row.logits) {
                    worst = worst.max((f64::from(got[*id as usize]) - want).abs());
                }
            }
            eprintln!("{}: largest error of a logit {worst:.4}", device.facts().name);
            assert!(worst <= 0.05, "{worst}");
            for (row, want) in logits.chunks(vocab).zip(&text.argmax).enumerate().map(|(at, (r, w))| ((at, r), w)) {
                let best = (0..vocab).max_by(|a, b| row.1[*a].total_cmp(&row.1[*b])).unwrap();
                assert!(best as u32 == *want || text.margins[row.0] < 0.1, "row {}", row.0);
            }
        }
    }
}

fn prompt(source: &ModelSource, user: &str) -> Vec<u32> {
    let template = source.chat_template.as_ref().unwrap();
    template.encode(&source.tokenizer, &[ChatMessage::user(user)], true).unwrap()
}

#[test]
fn greedy_answers_agree_with_an_independent_reference() {
    let Some(source) = smollm2() else { return };
    let golden: Golden = golden("smollm2-logits.json");
    for device in devices() {
        let mut engine = engine(&source, &device, &context(256));
        // A software GPU is slow: two answers are enough there.
        let answers = if device.is_cpu() { golden.greedy.len() } else { 2 };
        for answer in &golden.greedy[..answers] {
            assert_eq!(prompt(&source, &answer.user), answer.prompt_ids);
            let got = greedy(&mut engine, &answer.prompt_ids, answer.ids.len());
            let name = format!("'{}' on {}", answer.user, device.facts().name);
            assert_same_up_to_ties(&got.tokens, &answer.ids, &Margin::of_gaps(&answer.margins, 0.1), &name);
        }
    }
}

#[test]
fn the_capital_of_france_is_paris() {
    let Some(source) = smollm2() else { return };
    for device in devices() {
        let mut engine = engine(&source, &device, &dflash(7));
        let got = greedy(&mut engine, &prompt(&source, "What is the capital of France?"), 10);
        let text = source.tokenizer.decode(&got.tokens);
        assert!(text.contains("Paris"), "{text}");
    }
}

/// The drafter accepts what an independent implementation accepts, so no stage of it is off.
#[test]
fn acceptance_agrees_with_an_independent_implementation() {
    let Some(source) = smollm2() else { return };
    let golden: Runs = golden("smollm2-dflash.json");
    let mut engine = engine(&source, &Device::cpu(), &dflash(15));
    let (mut got_steps, mut got_tokens, mut want_steps, mut want_tokens) = (0.0, 0.0, 0.0, 0.0);
    for run in &golden.runs {
        let got = greedy(&mut engine, &run.prompt_ids, run.ids.len());
        assert_same_up_to_ties(&got.tokens, &run.ids, &Margin::of_gaps(&run.margins, 0.1), &run.domain);
        let acceptance = got.acceptance.unwrap();
        let want = run.accepted.iter().sum::<u32>();
        eprintln!(
            "{}: {:.2} tokens a step, reference {:.2}",
            run.domain,
            acceptance.mean_length,
            1.0 + f64::from(want) / run.accepted.len() as f64
        );
        got_steps += acceptance.drafted_steps as f64;
        got_tokens += acceptance.accepted as f64;
        want_steps += run.accepted.len() as f64;
        want_tokens += f64::from(want);
    }
    let (got, want) = (1.0 + got_tokens / got_steps, 1.0 + want_tokens / want_steps);
    assert!((got / want - 1.0).abs() < 0.07, "mean acceptance length {got:.3}, reference {want:.3}");
}

/// What the kit asks of a drafter holds at a real size too, and as much is accepted as this one was trained for. That its
/// tokens are the target's is seen above.
#[test]
fn the_trained_drafter_passes_the_kit() {
    let Some(source) = smollm2() else { return };
    let golden: Runs = golden("smollm2-dflash.json");
    // Code, prose and maths.
    let prompts = golden.runs.into_iter().skip(3).step_by(3).map(|run| run.prompt_ids).collect();
    let subject = ProposerSubject::new()
        .target(source.path())
        .checkpoint(tests_folder("models/smollm2-135m-dflash"))
        .prompts(prompts)
        .acceptance_floor(2.0);
    let dflash = Registry::global().unwrap().proposer("dflash").unwrap();
    let mut failures = Vec::new();
    for trial in proposer_suite(&dflash, &subject, &Device::cpu()) {
        let name = trial.name().to_owned();
        if name.contains("/generates/") && !name.ends_with("/enough-is-accepted") {
            continue;
        }
        if let Err(failure) = trial.run() {
            failures.push(format!("{name}: {failure}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
