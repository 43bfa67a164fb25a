//! Small drafters for tests (feature `test-support`).

use std::{fs, io, path::Path};

use polyattn_api::TargetFacts;
use polyattn_nn::{
    drafting::tiny::{Random, TinyLayer, TinyTensor, clear, layer, write_checkpoint},
    load::DecoderConfig,
};
use serde_json::Value;

use crate::Form;

/// Writes a layer of random weights for a target that was loaded from a Hugging Face folder, into a folder of its own
/// with the target's configuration.
///
/// # Errors
/// A target without such a folder; if a file cannot be read or written.
pub fn write_random(target: &TargetFacts, folder: &Path, form: Form) -> io::Result<()> {
    let (config, tensors) = tensors(target, form)?;
    write_checkpoint(folder, &config, &tensors)
}

/// Writes a layer for a target that counts, whose layers add nothing: the hidden state behind a token is the token's
/// embedding. The hidden state handed in disturbs it a little.
///
/// # Errors
/// As [`write_random`].
pub fn write_counting(target: &TargetFacts, folder: &Path, form: Form) -> io::Result<()> {
    let (config, mut tensors) = tensors(target, form)?;
    clear(&mut tensors, &["o_proj.weight", "down_proj.weight"]);
    for TinyTensor { name, shape, values } in &mut tensors {
        if name.ends_with("eh_proj.weight") || name.ends_with("mtp.fc.weight") {
            values.iter_mut().for_each(|value| *value *= 0.25);
            values.chunks_mut(shape[1]).enumerate().for_each(|(row, values)| {
                values[..shape[0]].fill(0.0);
                values[row] = 1.0;
            });
        }
    }
    write_checkpoint(folder, &config, &tensors)
}

fn tensors(target: &TargetFacts, form: Form) -> io::Result<(Value, Vec<TinyTensor>)> {
    let of = target.checkpoint.as_ref().ok_or_else(|| io::Error::other("the target has no checkpoint"))?;
    let model = DecoderConfig::from_hf_folder(of).map_err(io::Error::other)?;
    let mut config: Value = serde_json::from_slice(&fs::read(of.join("config.json"))?)?;
    let [hidden, wide, heads, kv_heads, head_dim] =
        [model.hidden_size, model.intermediate_size, model.query_heads, model.kv_heads, model.head_dim]
            .map(|size| size as usize);
    let dims = TinyLayer { hidden, wide, heads, kv_heads, head_dim };
    let mut random = Random::new(41);
    let (field, prefix, norms, project) = match form {
        Form::DeepSeek => {
            let at = format!("model.layers.{}.", model.layers);
            let norms = ["enorm", "hnorm", "shared_head.norm"].map(|name| format!("{at}{name}.weight"));
            let project = format!("{at}eh_proj.weight");
            ("num_nextn_predict_layers", at, norms, project)
        }
        Form::Qwen => {
            let norms =
                ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"].map(|name| format!("mtp.{name}.weight"));
            ("mtp_num_hidden_layers", "mtp.layers.0.".to_owned(), norms, "mtp.fc.weight".to_owned())
        }
    };
    config[field] = 1.into();
    let mut tensors = layer(&mut random, &prefix, &dims, hidden, true);
    let per_head = [("q", heads), ("k", kv_heads), ("v", kv_heads)];
    if model.qkv_bias {
        let bias = |(name, heads): (&str, usize)| {
            random.vector(format!("{prefix}self_attn.{name}_proj.bias"), heads * head_dim, 0.0)
        };
        tensors.extend(per_head.map(bias));
    }
    if model.qk_norm {
        let norm = |name: &str| random.vector(format!("{prefix}self_attn.{name}_norm.weight"), head_dim, 1.0);
        tensors.extend(["q", "k"].map(norm));
    }
    tensors.extend(norms.map(|name| random.vector(name, hidden, 1.0)));
    tensors.push(random.matrix(project, hidden, 2 * hidden));
    Ok((config, tensors))
}
