//! Small random drafters for tests (feature `test-support`).

use std::{io, path::Path};

use polyattn_api::TargetFacts;
use safetensors::{Dtype, SafeTensorError, tensor::TensorView};

/// Writes a DFlash drafter of random weights for a target, in the released checkpoint format: two layers, blocks of 8;
/// with `sliding` the first layer is causal behind a window. The folder is made where it is not there.
///
/// # Errors
/// If a file cannot be written.
pub fn write_random(target: &TargetFacts, folder: &Path, sliding: bool) -> io::Result<()> {
    let (hidden, wide, heads, kv_heads, dim) = (target.hidden_size as usize, 96usize, 4usize, 2usize, 32usize);
    let taps = [0, target.layers - 1];
    let json = serde_json::json!({
        "block_size": 8,
        "dflash_config": { "mask_token_id": 3, "target_layer_ids": taps },
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": 2, "num_target_layers": target.layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "vocab_size": target.vocab_size, "dtype": "float16", "sliding_window": 6,
        "layer_types": [if sliding { "sliding_attention" } else { "full_attention" }, "full_attention"],
    });
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), json.to_string())?;

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
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, SafeTensorError>>()
        .map_err(io::Error::other)?;
    let file = safetensors::serialize(views, None).map_err(io::Error::other)?;
    std::fs::write(folder.join("model.safetensors"), file)
}
