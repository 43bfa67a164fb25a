//! One decoder layer, shared by targets and by drafters: attention, then a feed-forward part, each behind an RMS norm and
//! added to the residual stream. Attention is grouped-query or latent, the feed-forward part a SwiGLU or a mixture of
//! experts, in any combination.

mod feed_forward;
mod gqa;
mod mla;

use std::sync::Arc;

use polyattn_api::{AttentionKernel, MoeKernel, Plan, QuerySource, RotatedQueries, StoreKv, StoreRotated};
use polyattn_device::{Buffer, BufferSlice, Commands, DType, Device};

use crate::{
    NnError, WeightLoader,
    load::{DecoderConfig, LayerWeight, RopePairing, WeightName},
    ops::{self, Matrix, Norm, RopeCall, RopeTable, Vector},
};
use feed_forward::{Experts, ExpertsScratch, FeedForward, Swiglu};
use gqa::Gqa;
use mla::{LatentScratch, Mla};

/// The dimensions of a layer of grouped-query attention and a SwiGLU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerShape {
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Query heads.
    pub query_heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Width of the SwiGLU.
    pub intermediate_size: u32,
    /// Epsilon of every norm.
    pub eps: f32,
    /// Which two elements of a head RoPE rotates together.
    pub pairing: RopePairing,
    /// Whether query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether queries and keys are normed by head.
    pub qk_norm: bool,
}

impl LayerShape {
    /// That of a decoder's layers, as far as they are of grouped-query attention and a SwiGLU.
    fn of(config: &DecoderConfig) -> Self {
        Self {
            hidden_size: config.hidden_size,
            query_heads: config.query_heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            intermediate_size: config.intermediate_size,
            eps: config.rms_norm_eps,
            pairing: config.rope.pairing,
            qkv_bias: config.qkv_bias,
            output_bias: false,
            qk_norm: config.qk_norm,
        }
    }

    /// Elements of a row that holds queries, keys and values.
    #[must_use]
    pub const fn qkv_width(&self) -> u32 {
        (self.query_heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// What grouped-query attention is made from. Drafters that extrapolate a target's hidden states differ from the decoder
/// here, and nowhere else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LayerInput {
    /// The residual stream behind an RMS norm, as in a decoder.
    #[default]
    Normed,
    /// The residual stream as it is.
    Bare,
    /// Rows of this width beside the residual stream, normed by whoever makes them.
    Apart(u32),
}

/// The weights of a layer.
#[derive(Debug)]
pub struct DecoderLayer {
    eps: f32,
    attention: Attention,
    feed_forward_norm: Vector,
    feed_forward: FeedForward,
}

#[derive(Debug)]
enum Attention {
    Gqa(Box<Gqa>),
    Mla(Box<Mla>),
}

/// Memory between the operations of a layer, used by all layers in turn.
#[derive(Debug)]
pub struct LayerScratch {
    /// Queries, keys and values; with latent attention the rows of the cache.
    rows: Buffer,
    q: Buffer,
    attention: Buffer,
    mlp: Buffer,
    q_dtype: DType,
    latent: Option<LatentScratch>,
    experts: Option<ExpertsScratch>,
}

impl LayerScratch {
    /// Scratch for up to `rows` rows of layers of this shape, whose queries attention takes as `q_dtype`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(device: &Device, shape: &LayerShape, rows: u32, q_dtype: DType) -> Result<Self, NnError> {
        let heads = shape.query_heads * shape.head_dim;
        let widths = [shape.qkv_width(), heads, heads, shape.intermediate_size];
        Self::of_widths(device, widths, rows, q_dtype)
    }

    /// Scratch for up to `rows` rows of all layers of a decoder, whose queries attention takes as `q_dtype`. Those with
    /// experts need somebody who serves them too, as [`Decoder::scratch`](crate::decoder::Decoder::scratch) has.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn of_decoder(
        device: &Device,
        config: &DecoderConfig,
        rows: u32,
        q_dtype: DType,
    ) -> Result<Self, NnError> {
        let shared = config.experts.as_ref().and_then(|experts| experts.shared_size).unwrap_or(0);
        let wide = config.intermediate_size.max(shared);
        let Some(latent) = &config.latent else {
            let mut shape = LayerShape::of(config);
            shape.intermediate_size = wide;
            return Self::new(device, &shape, rows, q_dtype);
        };
        let (heads, cache_dim) = (config.query_heads, latent.cache_dim());
        let widths = [cache_dim, heads * cache_dim, heads * latent.latent_dim, wide];
        let scratch = Self::of_widths(device, widths, rows, q_dtype)?;
        Ok(Self { latent: Some(LatentScratch::new(device, config, latent, rows)?), ..scratch })
    }

    fn of_widths(
        device: &Device,
        [rows_width, q, attention, mlp]: [u32; 4],
        rows: u32,
        q_dtype: DType,
    ) -> Result<Self, NnError> {
        let bytes = |elements: u32| u64::from(rows) * u64::from(elements) * 4;
        Ok(Self {
            rows: device.alloc(bytes(rows_width), "qkv")?,
            q: device.alloc(bytes(q), "queries")?,
            attention: device.alloc(bytes(attention), "attention output")?,
            mlp: device.alloc(bytes(mlp), "feed-forward")?,
            q_dtype,
            latent: None,
            experts: None,
        })
    }

    /// Has `kernel`, prepared for as many rows, serve the experts of this decoder.
    ///
    /// # Errors
    /// A decoder without experts, or with others than the kernel was prepared for; no memory.
    pub(crate) fn serve_experts(
        &mut self,
        device: &Device,
        config: &DecoderConfig,
        kernel: Arc<dyn MoeKernel>,
        rows: u32,
    ) -> Result<(), NnError> {
        let Some(experts) = &config.experts else {
            return Err(NnError::Shape("a decoder without experts needs nobody who serves them".into()));
        };
        let problem = kernel.problem();
        let served = [problem.hidden_size, problem.intermediate_size, problem.experts, problem.experts_per_token];
        let wanted = [config.hidden_size, experts.intermediate_size, experts.experts, experts.per_token];
        if served != wanted {
            return Err(NnError::Shape(format!("experts of shape {wanted:?}, their backend was asked for {served:?}")));
        }
        self.experts = Some(ExpertsScratch::new(device, config.hidden_size, experts, kernel, rows)?);
        Ok(())
    }

    /// Queries of the layer that ran last, `[rows, query_heads, query_dim]` of the attention's dtype.
    #[must_use]
    pub fn queries(&self) -> &Buffer {
        &self.q
    }

    /// Attention output of the layer that ran last, `[rows, query_heads, output_dim]` f32.
    #[must_use]
    pub fn attention(&self) -> &Buffer {
        &self.attention
    }
}

/// Who computes a layer's attention, over which cache.
#[derive(Clone, Copy, Debug)]
pub struct LayerAttention<'a> {
    /// The kernel.
    pub kernel: &'a dyn AttentionKernel,
    /// Its plan of this step's batch.
    pub plan: &'a Plan,
    /// Key cache of the layer.
    pub k_cache: &'a Buffer,
    /// Value cache of the layer; with latent attention the key cache once more.
    pub v_cache: &'a Buffer,
}

impl LayerAttention<'_> {
    /// Records [`ops::rope`] and the writing of keys and values into the caches; the values of a row stand behind its
    /// key heads, with latent attention in its one key. In one dispatch where the kernel offers it
    /// ([`AttentionKernel::store_rotated`]): the keys in `call.qkv` are normed and rotated or not afterwards.
    ///
    /// # Errors
    /// As [`ops::rope`]; caches that do not fit.
    pub fn rotate_and_store(&self, commands: &mut Commands, call: &RopeCall<'_>) -> Result<(), NnError> {
        ops::check_rope(call)?;
        let k_offset = call.offset + if call.parts.is_some() { 0 } else { call.query_heads * call.head_dim };
        let v_offset = k_offset + call.kv_heads * call.head_dim;
        let store = StoreKv::from_rows(call.qkv, call.stride, k_offset, v_offset, self.k_cache, self.v_cache);
        // A kernel knows rows, heads and formats from its plan and its problem.
        let problem = self.kernel.problem();
        let kind = problem.kind;
        let alike = (kind.kv_heads(), kind.query_dim()) == (call.kv_heads, call.head_dim)
            && (call.query_heads == 0 || (kind.query_heads(), problem.dtype) == (call.query_heads, call.q_dtype));
        if alike && self.plan.batch().rows() == call.rows {
            let mut io = StoreRotated::new(store, call.table.rotation(call.pairing, call.positions));
            io.k_norm = call.k_norm.map(Into::into);
            io.queries = (call.query_heads > 0).then(|| RotatedQueries {
                source: call.parts.map_or(QuerySource::KeyRows(call.offset), QuerySource::Parts),
                norm: call.q_norm.map(Into::into),
                out: call.q_out,
            });
            if self.kernel.store_rotated(commands, self.plan, &io)? {
                return Ok(());
            }
        }
        ops::rope(commands, call)?;
        Ok(self.kernel.store_kv(commands, self.plan, &store)?)
    }
}

/// The rows of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// How many.
    pub count: u32,
    /// Position of each, u32.
    pub positions: BufferSlice<'a>,
    /// The rotations.
    pub rope: &'a RopeTable,
}

/// Loads the weights of one layer by their roles.
struct LayerLoader<'a, 'b> {
    loader: &'a mut WeightLoader<'b>,
    name: &'a dyn Fn(LayerWeight) -> String,
    expert: &'a dyn Fn(u32, LayerWeight) -> String,
}

impl LayerLoader<'_, '_> {
    fn names(&self, weights: &[LayerWeight]) -> Vec<String> {
        weights.iter().map(|weight| (self.name)(*weight)).collect()
    }

    /// The rows of these tensors, one below the other.
    fn matrix(&mut self, weights: &[LayerWeight], cols: u32, rows: u32) -> Result<Matrix, NnError> {
        self.stacked(&self.names(weights), cols, rows)
    }

    /// The rows of these tensors of each of `count` experts, one below the other.
    fn experts(&mut self, weights: &[LayerWeight], count: u32, cols: u32, rows: u32) -> Result<Matrix, NnError> {
        let names = (0..count).flat_map(|expert| weights.iter().map(move |weight| (expert, *weight)));
        let names: Vec<_> = names.map(|(expert, weight)| (self.expert)(expert, weight)).collect();
        self.stacked(&names, cols, rows)
    }

    fn stacked(&mut self, names: &[String], cols: u32, rows: u32) -> Result<Matrix, NnError> {
        let dtype = self.loader.held_as(&names[0])?;
        let matrix = self.loader.matrix(names, cols, dtype)?;
        if matrix.rows != rows {
            let all = match names {
                [first, .., last] => format!("'{first}' to '{last}'"),
                _ => format!("{names:?}"),
            };
            return Err(NnError::Shape(format!("tensors {all} have {} rows, expected {rows}", matrix.rows)));
        }
        Ok(matrix)
    }

    /// The elements of a tensor of this shape.
    fn values(&mut self, weight: LayerWeight, rows: u32, cols: u32) -> Result<Vec<f32>, NnError> {
        self.loader.values(&(self.name)(weight), rows, cols)
    }

    /// A matrix made of a tensor's elements, held as that would be.
    fn matrix_of(&mut self, weight: LayerWeight, values: &[f32], rows: u32, cols: u32) -> Result<Matrix, NnError> {
        let name = (self.name)(weight);
        let dtype = self.loader.held_as(&name)?;
        self.loader.matrix_of(values, rows, cols, dtype, &name)
    }

    fn vector(&mut self, weights: &[LayerWeight], len: u32) -> Result<Vector, NnError> {
        let names = self.names(weights);
        let vector = self.loader.vector(&names)?;
        if vector.len != len {
            return Err(NnError::Shape(format!("tensors {names:?} have {} elements, expected {len}", vector.len)));
        }
        Ok(vector)
    }
}

impl DecoderLayer {
    /// Loads a layer of grouped-query attention and a SwiGLU whose tensors `name` names.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape; no memory.
    pub fn load(
        loader: &mut WeightLoader<'_>,
        shape: LayerShape,
        name: impl Fn(LayerWeight) -> String,
    ) -> Result<Self, NnError> {
        Self::load_for(loader, shape, LayerInput::Normed, name)
    }

    /// Loads such a layer that takes this input.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_for(
        loader: &mut WeightLoader<'_>,
        shape: LayerShape,
        input: LayerInput,
        name: impl Fn(LayerWeight) -> String,
    ) -> Result<Self, NnError> {
        let mut loader = LayerLoader { loader, name: &name, expert: &|_, weight| name(weight) };
        let attention = Attention::Gqa(Box::new(Gqa::load(&mut loader, &shape, input)?));
        Self::of_parts(&mut loader, shape.eps, shape.hidden_size, attention, |loader| {
            Ok(FeedForward::Dense(dense(loader, shape.hidden_size, shape.intermediate_size)?))
        })
    }

    /// Loads layer `layer` of a decoder.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape; no memory.
    pub fn of_decoder(loader: &mut WeightLoader<'_>, config: &DecoderConfig, layer: u32) -> Result<Self, NnError> {
        let format = loader.checkpoint().format();
        let name = |weight| WeightName::Layer(layer, weight).in_format(format);
        let expert = |expert, weight| WeightName::Expert { layer, expert, weight }.in_format(format);
        let mut loader = LayerLoader { loader, name: &name, expert: &expert };
        let attention = match &config.latent {
            None => Attention::Gqa(Box::new(Gqa::load(&mut loader, &LayerShape::of(config), LayerInput::Normed)?)),
            Some(latent) => Attention::Mla(Box::new(Mla::load(&mut loader, config, latent)?)),
        };
        Self::of_parts(&mut loader, config.rms_norm_eps, config.hidden_size, attention, |loader| {
            Ok(match config.experts.as_ref().filter(|_| config.has_experts(layer)) {
                None => FeedForward::Dense(dense(loader, config.hidden_size, config.intermediate_size)?),
                Some(experts) => FeedForward::Experts(Experts::load(loader, config, experts)?),
            })
        })
    }

    fn of_parts<'a, 'b>(
        loader: &mut LayerLoader<'a, 'b>,
        eps: f32,
        hidden_size: u32,
        attention: Attention,
        feed_forward: impl FnOnce(&mut LayerLoader<'a, 'b>) -> Result<FeedForward, NnError>,
    ) -> Result<Self, NnError> {
        let feed_forward_norm = loader.vector(&[LayerWeight::FeedForwardNorm], hidden_size)?;
        Ok(Self { eps, attention, feed_forward_norm, feed_forward: feed_forward(loader)? })
    }

    /// Bytes of its matrices as held.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        let attention: Vec<&Matrix> = match &self.attention {
            Attention::Gqa(gqa) => gqa.matrices().to_vec(),
            Attention::Mla(mla) => mla.matrices().collect(),
        };
        attention.into_iter().chain(self.feed_forward.matrices()).map(|matrix| matrix.buffer.bytes()).sum()
    }

    /// The norm of each key head, for keys made outside a layer's own pass.
    #[must_use]
    pub fn key_norm(&self) -> Option<Norm<'_>> {
        match &self.attention {
            Attention::Gqa(gqa) => gqa.key_norm(),
            Attention::Mla(_) => None,
        }
    }

    /// Records the layer on `x` `[rows, hidden_size]`, in place. The rows' own keys and values are in the cache before
    /// the attention reads it.
    ///
    /// # Errors
    /// Buffers that do not fit, scratch of another shape.
    pub fn forward(
        &self,
        commands: &mut Commands,
        x: &Buffer,
        rows: Rows<'_>,
        attention: &LayerAttention<'_>,
        scratch: &LayerScratch,
    ) -> Result<(), NnError> {
        self.forward_from(commands, x.whole(), x, rows, attention, scratch)
    }

    /// [`forward`](Self::forward) of a layer whose attention takes its input from `input`, see [`LayerInput`]; `x` is the
    /// residual stream. Latent attention takes it from `x` in any case.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_from(
        &self,
        commands: &mut Commands,
        input: BufferSlice<'_>,
        x: &Buffer,
        rows: Rows<'_>,
        attention: &LayerAttention<'_>,
        scratch: &LayerScratch,
    ) -> Result<(), NnError> {
        match (&self.attention, &scratch.latent) {
            (Attention::Gqa(gqa), _) => gqa.forward(commands, input, x, rows, attention, scratch)?,
            (Attention::Mla(mla), Some(memory)) => mla.forward(commands, x, rows, attention, scratch, memory)?,
            (Attention::Mla(_), None) => {
                return Err(NnError::Shape(
                    "scratch for grouped-query attention in a layer of latent attention".into(),
                ));
            }
        }
        self.feed_forward.forward(commands, x, &self.feed_forward_norm, self.eps, rows.count, scratch)
    }

    /// Records the keys and values that `input` makes into the cache, and nothing else: all that later rows see of rows
    /// whose output nobody needs. `input` is that of the layer, see [`LayerInput`].
    ///
    /// # Errors
    /// Buffers that do not fit, a layer of latent attention.
    pub fn store(
        &self,
        commands: &mut Commands,
        input: BufferSlice<'_>,
        rows: Rows<'_>,
        attention: &LayerAttention<'_>,
        scratch: &LayerScratch,
    ) -> Result<(), NnError> {
        match &self.attention {
            Attention::Gqa(gqa) => gqa.store(commands, input, rows, attention, scratch),
            Attention::Mla(_) => {
                Err(NnError::Shape("keys and values alone are made of grouped-query attention only".into()))
            }
        }
    }
}

fn dense(loader: &mut LayerLoader<'_, '_>, hidden_size: u32, intermediate_size: u32) -> Result<Swiglu, NnError> {
    let names = [LayerWeight::Gate, LayerWeight::Up, LayerWeight::Down];
    Swiglu::load(loader, names, hidden_size, intermediate_size)
}
