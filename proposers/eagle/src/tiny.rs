//! Small drafters for tests (feature `test-support`).

use std::{io, path::Path};

use polyattn_api::TargetFacts;
use polyattn_nn::drafting::tiny::{
    CountingTarget, Random, TinyLayer, TinyTensor, clear, identities, layer, write_checkpoint, write_checkpoint_with,
};
use serde_json::{Value, json};

/// Elements of a head.
const HEAD_DIM: usize = 16;

fn dims(target: &TargetFacts) -> TinyLayer {
    let hidden = target.hidden_size as usize;
    TinyLayer { hidden, wide: 96, heads: 4, kv_heads: 2, head_dim: HEAD_DIM }
}

fn config(target: &TargetFacts, dims: &TinyLayer, more: Value) -> Value {
    let mut config = json!({
        "hidden_size": dims.hidden, "intermediate_size": dims.wide, "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads, "head_dim": dims.head_dim, "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "vocab_size": target.vocab_size, "torch_dtype": "float16",
    });
    if let (Value::Object(config), Value::Object(more)) = (&mut config, more) {
        config.extend(more);
    }
    config
}

/// Writes an EAGLE drafter of random weights for a target, in the released checkpoint format. The folder is made where it
/// is not there.
///
/// # Errors
/// If a file cannot be written.
pub fn write_random(target: &TargetFacts, folder: &Path) -> io::Result<()> {
    let (dims, mut random) = (dims(target), Random::new(21));
    let mut tensors = layer(&mut random, "layers.0.", &dims, dims.hidden, false);
    tensors.push(random.matrix("fc.weight".into(), dims.hidden, 2 * dims.hidden));
    tensors.push(random.vector("fc.bias".into(), dims.hidden, 0.0));
    write_checkpoint(folder, &config(target, &dims, json!({ "bias": true })), &tensors)
}

/// Writes an EAGLE drafter for a target that counts, whose layers add nothing: the hidden state behind a token is the
/// token's embedding. The hidden state handed in disturbs it a little.
///
/// # Errors
/// If a file cannot be written.
pub fn write_counting(target: &TargetFacts, folder: &Path) -> io::Result<()> {
    let (dims, mut random) = (dims(target), Random::new(22));
    let mut tensors = layer(&mut random, "layers.0.", &dims, dims.hidden, false);
    clear(&mut tensors, &["o_proj.weight", "down_proj.weight"]);
    tensors.push(disturbed(&mut random, identities("fc.weight".into(), dims.hidden, &[1.0, 0.0])));
    write_checkpoint(folder, &config(target, &dims, json!({ "bias": false })), &tensors)
}

/// A quarter of a random matrix in the second half of the columns.
fn disturbed(random: &mut Random, mut tensor: TinyTensor) -> TinyTensor {
    let TinyTensor { shape, values, .. } = &mut tensor;
    let noise = random.matrix(String::new(), shape[0], shape[1]).values;
    for (row, noise) in values.chunks_mut(shape[1]).zip(noise.chunks(shape[1])) {
        row[shape[1] / 2..].iter_mut().zip(&noise[shape[1] / 2..]).for_each(|(value, noise)| *value += 0.25 * noise);
    }
    tensor
}

/// The ids that a draft vocabulary keeps: not every 27th, so that the offsets to the target's rise.
fn kept(target: &TargetFacts) -> Vec<u32> {
    (0..target.vocab_size).filter(|id| id % 27 != 13).collect()
}

fn config3(target: &TargetFacts, dims: &TinyLayer) -> Value {
    let last = target.layers;
    // The layers whose input is tapped; the last names the last layer's output.
    let boundaries = [1, last.div_ceil(2).max(1), last];
    let more = json!({
        "draft_vocab_size": kept(target).len(), "eagle_config": { "eagle_aux_hidden_state_layer_ids": boundaries },
    });
    config(target, dims, more)
}

fn offsets(target: &TargetFacts) -> Vec<(String, Vec<i64>)> {
    let offsets = (0..).zip(kept(target)).map(|(id, target): (i64, u32)| i64::from(target) - id).collect();
    vec![("d2t".into(), offsets)]
}

/// Writes an EAGLE-3 drafter of random weights for a target, with a vocabulary of its own.
///
/// # Errors
/// If a file cannot be written.
pub fn write_random3(target: &TargetFacts, folder: &Path) -> io::Result<()> {
    let (dims, mut random) = (dims(target), Random::new(31));
    let hidden = dims.hidden;
    let mut tensors = layer(&mut random, "midlayer.", &dims, 2 * hidden, true);
    tensors.push(random.vector("midlayer.hidden_norm.weight".into(), hidden, 1.0));
    tensors.push(random.vector("norm.weight".into(), hidden, 1.0));
    tensors.push(random.matrix("fc.weight".into(), hidden, 3 * hidden));
    tensors.push(random.matrix("lm_head.weight".into(), kept(target).len(), hidden));
    write_checkpoint_with(folder, &config3(target, &dims), &tensors, &offsets(target))
}

/// Writes an EAGLE-3 drafter for a target that counts: attention finds the row itself and puts the token's embedding in
/// the place of the hidden state. A hidden size of a multiple of 16.
///
/// # Errors
/// A target without a checkpoint; if a file cannot be written.
pub fn write_counting3(target: &TargetFacts, folder: &Path) -> io::Result<()> {
    let counting = CountingTarget::open(target)?;
    let hidden = counting.hidden;
    let heads = hidden / HEAD_DIM;
    let (dims, mut random) = (TinyLayer { heads, kv_heads: heads, ..dims(target) }, Random::new(32));
    let mut tensors = layer(&mut random, "midlayer.", &dims, 2 * hidden, true);
    clear(&mut tensors, &["down_proj.weight"]);
    let ones = |name: &str| TinyTensor { name: name.to_owned(), shape: vec![hidden], values: vec![1.0; hidden] };
    let planted = [
        identities("midlayer.self_attn.q_proj.weight".into(), hidden, &[2.0, 0.0]),
        identities("midlayer.self_attn.k_proj.weight".into(), hidden, &[2.0, 0.0]),
        identities("midlayer.self_attn.v_proj.weight".into(), hidden, &[1.0, -1.0]),
        identities("midlayer.self_attn.o_proj.weight".into(), hidden, &[1.0]),
        ones("midlayer.input_layernorm.weight"),
    ];
    tensors.retain(|tensor| planted.iter().all(|other| other.name != tensor.name));
    tensors.extend(planted);
    tensors.push(ones("midlayer.hidden_norm.weight"));
    tensors.push(ones("norm.weight"));
    tensors.push(random.matrix("fc.weight".into(), hidden, 3 * hidden));
    let rows = kept(target).into_iter().flat_map(|id| counting.head[id as usize].iter().copied()).collect();
    tensors.push(TinyTensor { name: "lm_head.weight".into(), shape: vec![kept(target).len(), hidden], values: rows });
    write_checkpoint_with(folder, &config3(target, &dims), &tensors, &offsets(target))
}
