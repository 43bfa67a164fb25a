//! Good inputs to start from.

use std::{fs, path::Path};

use polyattn_nn::load::{Architecture, StoredType, tiny::TinyModel};
use polyattn_replay::random::{self, Spec};

const ENGINE: &str = r#"{
  "target": { "dtype": "f16", "layers": [
    { "name": "full", "count": 28, "kind": "gqa", "query_heads": 16, "kv_heads": 8, "head_dim": 128, "value_dim": 128,
      "window": null, "softcap": 30.0, "sinks": true, "alibi": false },
    { "name": "sliding", "kind": "gqa", "query_heads": 16, "kv_heads": 8, "head_dim": 128, "window": 512 },
    { "name": "latent", "kind": "mla", "query_heads": 16, "latent_dim": 512, "rope_dim": 64 } ] },
  "kv_cache": { "dtype": "q8", "page_size": 16 },
  "attention": { "backend": { "prefer": "cpu" }, "use_non_causal": false, "backend_per_phase": { "decode": "cpu" } },
  "speculative": { "method": "dflash", "num_speculative_tokens": 7,
    "draft": { "dtype": "f16", "layers": [ { "name": "draft", "kind": "gqa", "query_heads": 32, "kv_heads": 8, "head_dim": 128 } ] } }
}"#;

const TOML: &str = "[target]\ndtype = \"bf16\"\n[[target.layers]]\nname = \"full\"\ncount = 2\nkind = \"gqa\"\nquery_heads = 4\nkv_heads = 2\nhead_dim = 64\n";

/// Seeds of a target.
pub fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "gguf" => [(Architecture::Llama, StoredType::F32), (Architecture::Qwen3, StoredType::Q8_0)]
            .into_iter()
            .map(|(architecture, ty)| {
                // Small, so that changes hit the header often.
                TinyModel { ty, layers: 1, hidden_size: 32, intermediate_size: 32, ..TinyModel::new(architecture) }
                    .gguf()
                    .finish()
            })
            .collect(),
        "safetensors" => golden("tests/golden/replay", "safetensors", 6),
        "replay" => {
            let kind = polyattn_api::AttentionKind::Gqa { query_heads: 2, kv_heads: 1, head_dim: 8, value_dim: 8 };
            let small = random::case(1, &Spec::new(kind, polyattn_api::DType::F16, &[(1, 20), (3, 5)]));
            let mut seeds = golden("tests/golden/replay", "safetensors", 200);
            seeds.retain(|seed| seed.len() < 20_000);
            seeds.extend(small.to_bytes());
            seeds
        }
        "configuration" => {
            let tiny = TinyModel::new(Architecture::Llama).config_json();
            let rope = r#"{"rope_theta": 10000, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#;
            [ENGINE, TOML, &tiny, rope].map(|text| text.as_bytes().to_vec()).to_vec()
        }
        _ => batches(),
    }
}

/// The first `most` files of a folder of the repository.
fn golden(folder: &str, extension: &str, most: usize) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(folder);
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    paths.sort();
    paths.iter().take(most).filter_map(|path| fs::read(path).ok()).collect()
}

/// Valid batches, as `page_table` reads them: every element of a list has a 1 before it, and a list a 0 behind it.
fn batches() -> Vec<Vec<u8>> {
    fn list(bytes: &mut Vec<u8>, elements: &[u8]) {
        elements.iter().for_each(|element| bytes.extend([1, *element]));
        bytes.push(0);
    }
    let start = |query_start: &[u8], kv_len: &[u8], pages: &[u8], width: u8| {
        let mut bytes = Vec::new();
        [query_start, kv_len, pages].iter().for_each(|elements| list(&mut bytes, elements));
        bytes.extend([width, 4, 9]);
        bytes
    };
    // Decode, verification and nothing; 255 is page -1. The first two share two pages.
    let shared = [0, 1, 2, 255, 0, 1, 3, 4, 5, 255, 255, 255];
    let plain = || start(&[0, 1, 4, 4], &[9, 14, 3], &shared, 4);
    // Causality of each, tree, spans, the huge number, mask, window.
    let tails: [&[u8]; 5] = [
        &[0, 0, 0, 0, 0, 0],
        &[1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0],
        &[0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 3, 0, 0, 0, 1, 5, 0, 0, 0, 0, 0, 0, 2, 0],
        &[0, 0, 1, 1, 2, 12, 1, 0, 0, 6, 0, 0, 0, 0],
        &[0, 0, 0, 0, 1, 1, 1, 5, 1, 2],
    ];
    tails.iter().map(|tail| [plain(), tail.to_vec()].concat()).collect()
}
