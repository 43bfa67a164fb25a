//! Writes small drafters for tests (feature `test-support`).

use std::{io, path::Path};

use ::safetensors::{Dtype, SafeTensorError, tensor::TensorView};
use polyattn_api::TargetFacts;

use crate::load::Checkpoint;

/// A tensor of f32.
#[derive(Clone, Debug)]
pub struct TinyTensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its dimensions, the outermost first.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Vec<f32>,
}

/// Random weights, the same for the same seed.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// Another seed gives other weights.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d)
    }

    /// A number from −1 to 1.
    pub fn number(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// A matrix that keeps magnitudes about as they are.
    pub fn matrix(&mut self, name: String, rows: usize, cols: usize) -> TinyTensor {
        let scale = 1.5 / (cols as f32).sqrt();
        let values = (0..rows * cols).map(|_| scale * self.number()).collect();
        TinyTensor { name, shape: vec![rows, cols], values }
    }

    /// A vector around `middle`: 1 for norms, 0 for biases.
    pub fn vector(&mut self, name: String, len: usize, middle: f32) -> TinyTensor {
        let values = (0..len).map(|_| middle + 0.1 * self.number()).collect();
        TinyTensor { name, shape: vec![len], values }
    }
}

/// Writes `config.json` and `model.safetensors` into a folder, which is made where it is not there. `maps` are tensors of
/// whole numbers.
///
/// # Errors
/// If a file cannot be written.
pub fn write_checkpoint_with(
    folder: &Path,
    config: &serde_json::Value,
    tensors: &[TinyTensor],
    maps: &[(String, Vec<i64>)],
) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let floats = tensors.iter().map(|TinyTensor { name, shape, values }| {
        (name, Dtype::F32, shape.clone(), values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    });
    let maps = maps.iter().map(|(name, values)| {
        (name, Dtype::I64, vec![values.len()], values.iter().flat_map(|value| value.to_le_bytes()).collect())
    });
    let stored: Vec<_> = floats.chain(maps).collect();
    let views = stored
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, SafeTensorError>>()
        .map_err(io::Error::other)?;
    let file = ::safetensors::serialize(views, None).map_err(io::Error::other)?;
    std::fs::write(folder.join("model.safetensors"), file)
}

/// [`write_checkpoint_with`] without maps.
///
/// # Errors
/// If a file cannot be written.
pub fn write_checkpoint(folder: &Path, config: &serde_json::Value, tensors: &[TinyTensor]) -> io::Result<()> {
    write_checkpoint_with(folder, config, tensors, &[])
}

/// A target whose next token depends on the last one alone, read from its checkpoint: what a drafter must know to be
/// right every time, so that a test sees drafts accepted.
#[derive(Debug)]
pub struct CountingTarget {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the output head.
    pub head: Vec<Vec<f32>>,
    /// The token behind each.
    pub next: Vec<u32>,
}

impl CountingTarget {
    /// Reads embedding and output head of a target that was loaded from a Hugging Face folder and whose layers add
    /// nothing. Of another target it says what such a one would.
    ///
    /// # Errors
    /// No checkpoint, or one that cannot be read.
    pub fn open(target: &TargetFacts) -> io::Result<Self> {
        let folder = target.checkpoint.as_ref().ok_or_else(|| io::Error::other("the target has no checkpoint"))?;
        let checkpoint = Checkpoint::open(folder).map_err(io::Error::other)?;
        let (vocab, hidden) = (target.vocab_size as usize, target.hidden_size as usize);
        let read = |name: &str| {
            let mut values = vec![0.0; vocab * hidden];
            checkpoint.read_rows(name, 0..vocab, &mut values).map_err(io::Error::other)?;
            Ok::<_, io::Error>(values.chunks(hidden).map(<[f32]>::to_vec).collect::<Vec<_>>())
        };
        let embedding = read("model.embed_tokens.weight")?;
        let head = if checkpoint.has("lm_head.weight") { read("lm_head.weight")? } else { embedding.clone() };
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let next = |row: &Vec<f32>| {
            let best =
                (0..vocab as u32).max_by(|a, b| dot(&head[*a as usize], row).total_cmp(&dot(&head[*b as usize], row)));
            best.unwrap_or(0)
        };
        let next = embedding.iter().map(next).collect();
        Ok(Self { hidden, head, next })
    }

    /// An output head that says what comes `further` tokens behind the next one.
    #[must_use]
    pub fn head_further(&self, further: u32) -> Vec<f32> {
        let mut rows = vec![0.0; self.head.len() * self.hidden];
        for (id, row) in (0..).zip(&self.head) {
            let later = (0..further).fold(id, |id: u32, _| self.next[id as usize]) as usize;
            rows[later * self.hidden..][..self.hidden].copy_from_slice(row);
        }
        rows
    }
}

/// A matrix of square blocks side by side, each a multiple of the identity.
#[must_use]
pub fn identities(name: String, size: usize, factors: &[f32]) -> TinyTensor {
    let cols = size * factors.len();
    let mut values = vec![0.0; size * cols];
    for row in 0..size {
        for (block, factor) in factors.iter().enumerate() {
            values[row * cols + block * size + row] = *factor;
        }
    }
    TinyTensor { name, shape: vec![size, cols], values }
}

/// The tensors of a layer like Llama's behind `prefix`, of random weights; `input` is the width that its attention takes,
/// and `input_norm` whether there is a norm before it.
#[must_use]
pub fn layer(random: &mut Random, prefix: &str, shape: &TinyLayer, input: usize, input_norm: bool) -> Vec<TinyTensor> {
    let TinyLayer { hidden, wide, heads, kv_heads, head_dim } = *shape;
    let mut tensors = Vec::new();
    for (name, rows, cols) in [
        ("self_attn.q_proj", heads * head_dim, input),
        ("self_attn.k_proj", kv_heads * head_dim, input),
        ("self_attn.v_proj", kv_heads * head_dim, input),
        ("self_attn.o_proj", hidden, heads * head_dim),
        ("mlp.gate_proj", wide, hidden),
        ("mlp.up_proj", wide, hidden),
        ("mlp.down_proj", hidden, wide),
    ] {
        tensors.push(random.matrix(format!("{prefix}{name}.weight"), rows, cols));
    }
    if input_norm {
        tensors.push(random.vector(format!("{prefix}input_layernorm.weight"), hidden, 1.0));
    }
    tensors.push(random.vector(format!("{prefix}post_attention_layernorm.weight"), hidden, 1.0));
    tensors
}

/// The dimensions of [`layer`].
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are those of `LayerShape`")]
pub struct TinyLayer {
    pub hidden: usize,
    pub wide: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Sets tensors whose names end like this to zeros, so that a layer adds nothing there.
pub fn clear(tensors: &mut [TinyTensor], ends: &[&str]) {
    for TinyTensor { name, values, .. } in tensors {
        if ends.iter().any(|end| name.ends_with(end)) {
            values.fill(0.0);
        }
    }
}
