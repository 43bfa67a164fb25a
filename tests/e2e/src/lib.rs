//! What the end-to-end tests share: devices, models, and the rule by which greedy tokens are compared.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test's help may fail the test")]

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use polyattn_api::Registry;
use polyattn_device::{Device, DeviceChoice};
use polyattn_engine::{Engine, EngineOptions, Generation, Request};
use polyattn_nn::load::ModelSource;
// Registers every plugin.
use polyattn as _;

/// The gap between the best and the second logit below which two summation orders may choose differently.
pub const TIE: f64 = 0.1;

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

/// The gaps between best and second logit along a text, to tell ties.
#[must_use]
pub fn margins(engine: &mut Engine, prompt: &[u32], tokens: &[u32], vocab: usize) -> Vec<f64> {
    let text = [prompt, tokens].concat();
    let logits = engine.score(&text[..text.len() - 1]).unwrap();
    logits
        .chunks(vocab)
        .skip(prompt.len() - 1)
        .map(|row| {
            let mut sorted = row.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            f64::from(sorted[0] - sorted[1])
        })
        .collect()
}

/// Asserts that two runs chose the same tokens, up to the first place where `margins`, the gap between best and second
/// logit, is a tie. Answers how many tokens were compared.
pub fn assert_same_up_to_ties(got: &[u32], want: &[u32], margins: &[f64], what: &str) -> usize {
    for (place, (a, b)) in got.iter().zip(want).enumerate() {
        if a != b {
            assert!(
                margins[place] < TIE,
                "{what}: token {place} is {a} instead of {b}, and no tie: the margin is {}",
                margins[place]
            );
            return place;
        }
    }
    assert_eq!(got.len(), want.len(), "{what}: another number of tokens");
    got.len()
}

/// Writes a DFlash drafter of random weights for a target, in the released checkpoint format: two layers, blocks of 8;
/// with `sliding` the first layer is causal behind a window.
pub fn write_random_dflash(target: &ModelSource, folder: &Path, sliding: bool) {
    let config = &target.config;
    let (hidden, wide, heads, kv_heads, dim) = (config.hidden_size as usize, 96usize, 4usize, 2usize, 32usize);
    let taps = [0, config.layers - 1];
    let json = serde_json::json!({
        "block_size": 8,
        "dflash_config": { "mask_token_id": 3, "target_layer_ids": taps },
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": 2, "num_target_layers": config.layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "vocab_size": config.vocab_size, "dtype": "float16", "sliding_window": 6,
        "layer_types": [if sliding { "sliding_attention" } else { "full_attention" }, "full_attention"],
    });
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), json.to_string()).unwrap();

    let mut shapes = vec![
        ("fc.weight".to_owned(), vec![hidden, taps.len() * hidden]),
        ("hidden_norm.weight".to_owned(), vec![hidden]),
        ("norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![heads * dim, hidden]),
            ("self_attn.k_proj", vec![kv_heads * dim, hidden]),
            ("self_attn.v_proj", vec![kv_heads * dim, hidden]),
            ("self_attn.o_proj", vec![hidden, heads * dim]),
            ("self_attn.q_norm", vec![dim]),
            ("self_attn.k_norm", vec![dim]),
            ("mlp.gate_proj", vec![wide, hidden]),
            ("mlp.up_proj", vec![wide, hidden]),
            ("mlp.down_proj", vec![hidden, wide]),
        ] {
            shapes.push((format!("layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let norm = shape.len() == 1;
            let scale = 1.5 / (shape[shape.len() - 1] as f32).sqrt();
            let values = (0..count).flat_map(|_| {
                let value = if norm { 1.0 + 0.1 * random() } else { scale * random() };
                value.to_le_bytes()
            });
            let bytes = values.collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

/// The README's own code, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
#[derive(Debug)]
pub struct Readme;
