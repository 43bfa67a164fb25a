//! Tiny random models of each family against an independent implementation (`tests/golden/make_tiny.py`).

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use polyattn_e2e::{Margin, assert_same_up_to_ties, devices, engine, greedy, margins, tests_folder};
use polyattn_engine::EngineOptions;
use polyattn_nn::load::{ChatMessage, ModelSource};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    ids: Vec<u32>,
    argmax: Vec<u32>,
    margins: Vec<f64>,
    top5_ids: Vec<Vec<u32>>,
    top5_logits: Vec<Vec<f64>>,
    greedy: Vec<u32>,
    greedy_margins: Vec<f64>,
    text: String,
    text_ids: Vec<u32>,
    chat_user: String,
    chat_ids: Vec<u32>,
}

fn golden(family: &str) -> (ModelSource, Golden) {
    let folder = tests_folder("golden/tiny").join(family);
    let golden = serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
    (ModelSource::open(&folder).unwrap(), golden)
}

fn check(family: &str, tolerance: f64) {
    let (source, golden) = golden(family);
    assert_eq!(source.tokenizer.encode_text(&golden.text).unwrap(), golden.text_ids);
    let template = source.chat_template.as_ref().unwrap();
    let chat = template.encode(&source.tokenizer, &[ChatMessage::user(&golden.chat_user)], true).unwrap();
    assert_eq!(chat, golden.chat_ids);

    let vocab = source.config.vocab_size as usize;
    for device in devices() {
        let name = format!("{family} on {}", device.facts().name);
        let options = EngineOptions::default().with_context(64);
        let mut engine = engine(&source, &device, &options);
        let logits = engine.score(&golden.ids).unwrap();
        for (row, logits) in logits.chunks(vocab).enumerate() {
            for (id, want) in golden.top5_ids[row].iter().zip(&golden.top5_logits[row]) {
                let got = f64::from(logits[*id as usize]);
                assert!((got - want).abs() <= tolerance, "{name}: logit {id} of row {row} is {got}, not {want}");
            }
            let best = (0..vocab).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            assert!(best as u32 == golden.argmax[row] || golden.margins[row] < 2.0 * tolerance, "{name}: row {row}");
        }
        let got = greedy(&mut engine, &golden.ids, golden.greedy.len());
        let margins = Margin::of_gaps(&golden.greedy_margins, 2.0 * tolerance);
        let compared = assert_same_up_to_ties(&got.tokens, &golden.greedy, &margins, &name);
        eprintln!("{name}: {compared} greedy tokens equal");
    }
}

#[test]
fn llama_in_f32() {
    check("llama", 1e-3);
}

#[test]
fn llama_with_scaled_rope_in_shards() {
    check("llama3-scaled", 0.03);
}

#[test]
fn qwen2_with_biases() {
    check("qwen2", 0.03);
}

#[test]
fn qwen3_with_norms_of_heads() {
    check("qwen3", 0.03);
}

/// A prompt in small chunks gives what one in a single pass gives.
#[test]
fn chunks_of_a_prompt_do_not_matter() {
    let (source, golden) = golden("qwen3");
    for device in devices() {
        let run = |chunk| {
            let mut options = EngineOptions::default().with_context(64);
            options.prefill_chunk = chunk;
            greedy(&mut engine(&source, &device, &options), &golden.ids, 12).tokens
        };
        let whole = run(64);
        let mut plain = engine(&source, &device, &EngineOptions::default().with_context(64));
        let margins = margins(&mut plain, &golden.ids, &whole, source.config.vocab_size as usize);
        for chunk in [1, 3, 7] {
            let name = format!("chunks of {chunk} on {}", device.facts().name);
            assert_same_up_to_ties(&run(chunk), &whole, &margins, &name);
        }
    }
}
