//! One decoder layer, shared by targets and by drafters of the same family.

use polyattn_api::{AttentionIo, AttentionKernel, Plan, StoreKv};
use polyattn_device::{Buffer, BufferSlice, Commands, DType, Device};

use crate::{
    NnError, WeightLoader,
    load::{LayerWeight, RopePairing},
    ops::{self, LinearCall, Matrix, Norm, RopeCall, RopeTable, SwigluCall, Vector},
};

/// The dimensions of a layer.
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
    /// Elements of a row that holds queries, keys and values.
    #[must_use]
    pub const fn qkv_width(&self) -> u32 {
        (self.query_heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// What queries, keys and values of a layer are made from. Drafters that extrapolate a target's hidden states differ
/// from the decoder here, and nowhere else.
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

/// The weights of a layer: attention, then SwiGLU, each behind an RMS norm and added to the residual stream.
#[derive(Debug)]
pub struct DecoderLayer {
    shape: LayerShape,
    attention_norm: Option<Vector>,
    qkv: Matrix,
    qkv_bias: Option<Vector>,
    query_norm: Option<Vector>,
    key_norm: Option<Vector>,
    output: Matrix,
    output_bias: Option<Vector>,
    feed_forward_norm: Vector,
    gate_up: Matrix,
    down: Matrix,
}

/// Memory between the operations of a layer, used by all layers in turn.
#[derive(Debug)]
pub struct LayerScratch {
    qkv: Buffer,
    q: Buffer,
    attention: Buffer,
    mlp: Buffer,
    q_dtype: DType,
}

impl LayerScratch {
    /// Scratch for up to `rows` rows of layers of this shape, whose queries attention takes as `q_dtype`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(device: &Device, shape: &LayerShape, rows: u32, q_dtype: DType) -> Result<Self, NnError> {
        let bytes = |elements: u32| u64::from(rows) * u64::from(elements) * 4;
        let heads = shape.query_heads * shape.head_dim;
        Ok(Self {
            qkv: device.alloc(bytes(shape.qkv_width()), "qkv")?,
            q: device.alloc(bytes(heads), "queries")?,
            attention: device.alloc(bytes(heads), "attention output")?,
            mlp: device.alloc(bytes(shape.intermediate_size), "feed-forward")?,
            q_dtype,
        })
    }

    /// Queries of the layer that ran last, `[rows, query_heads, head_dim]` of the attention's dtype.
    #[must_use]
    pub fn queries(&self) -> &Buffer {
        &self.q
    }

    /// Attention output of the layer that ran last, `[rows, query_heads, head_dim]` f32.
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
    /// Value cache of the layer.
    pub v_cache: &'a Buffer,
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

impl DecoderLayer {
    /// Loads a layer whose tensors `name` names.
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

    /// Loads a layer that takes this input.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_for(
        loader: &mut WeightLoader<'_>,
        shape: LayerShape,
        input: LayerInput,
        name: impl Fn(LayerWeight) -> String,
    ) -> Result<Self, NnError> {
        let names = |weights: &[LayerWeight]| weights.iter().map(|weight| name(*weight)).collect::<Vec<_>>();
        let mut matrix = |weights: &[LayerWeight], cols: u32, rows: u32| -> Result<Matrix, NnError> {
            let names = names(weights);
            let dtype = loader.held_as(&names[0])?;
            let matrix = loader.matrix(&names, cols, dtype)?;
            if matrix.rows != rows {
                return Err(NnError::Shape(format!("tensors {names:?} have {} rows, expected {rows}", matrix.rows)));
            }
            Ok(matrix)
        };
        let heads = shape.query_heads * shape.head_dim;
        use LayerWeight::{
            AttentionNorm, AttentionOutput, AttentionOutputBias, Down, FeedForwardNorm, Gate, Key, KeyBias, KeyNorm,
            Query, QueryBias, QueryNorm, Up, Value, ValueBias,
        };
        let width = match input {
            LayerInput::Apart(width) => width,
            LayerInput::Normed | LayerInput::Bare => shape.hidden_size,
        };
        let qkv = matrix(&[Query, Key, Value], width, shape.qkv_width())?;
        let output = matrix(&[AttentionOutput], heads, shape.hidden_size)?;
        let gate_up = matrix(&[Gate, Up], shape.hidden_size, 2 * shape.intermediate_size)?;
        let down = matrix(&[Down], shape.intermediate_size, shape.hidden_size)?;
        let mut vector = |weights: &[LayerWeight], len: u32| -> Result<Vector, NnError> {
            let names = names(weights);
            let vector = loader.vector(&names)?;
            if vector.len != len {
                return Err(NnError::Shape(format!("tensors {names:?} have {} elements, expected {len}", vector.len)));
            }
            Ok(vector)
        };
        Ok(Self {
            shape,
            attention_norm: match input {
                LayerInput::Normed => Some(vector(&[AttentionNorm], shape.hidden_size)?),
                LayerInput::Bare | LayerInput::Apart(_) => None,
            },
            qkv_bias: if shape.qkv_bias {
                Some(vector(&[QueryBias, KeyBias, ValueBias], shape.qkv_width())?)
            } else {
                None
            },
            output_bias: if shape.output_bias {
                Some(vector(&[AttentionOutputBias], shape.hidden_size)?)
            } else {
                None
            },
            query_norm: if shape.qk_norm { Some(vector(&[QueryNorm], shape.head_dim)?) } else { None },
            key_norm: if shape.qk_norm { Some(vector(&[KeyNorm], shape.head_dim)?) } else { None },
            feed_forward_norm: vector(&[FeedForwardNorm], shape.hidden_size)?,
            qkv,
            output,
            gate_up,
            down,
        })
    }

    /// Bytes of its matrices as held.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        [&self.qkv, &self.output, &self.gate_up, &self.down].iter().map(|matrix| matrix.buffer.bytes()).sum()
    }

    /// The norm of each key head, for keys made outside a layer's own pass.
    #[must_use]
    pub fn key_norm(&self) -> Option<Norm<'_>> {
        self.norm(self.key_norm.as_ref())
    }

    fn norm<'a>(&self, weight: Option<&'a Vector>) -> Option<Norm<'a>> {
        weight.map(|weight| Norm { weight, eps: self.shape.eps })
    }

    /// Records the layer on `x` `[rows, hidden_size]`, in place. The rows' own keys and values are in the cache before
    /// the attention reads it.
    ///
    /// # Errors
    /// Buffers that do not fit.
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

    /// Records the keys and values that `input` makes into the cache, and nothing else: all that later rows see of rows
    /// whose output nobody needs. `input` is that of the layer, see [`LayerInput`].
    ///
    /// # Errors
    /// Buffers that do not fit.
    pub fn store(
        &self,
        commands: &mut Commands,
        input: BufferSlice<'_>,
        rows: Rows<'_>,
        attention: &LayerAttention<'_>,
        scratch: &LayerScratch,
    ) -> Result<(), NnError> {
        let shape = &self.shape;
        ops::linear(
            commands,
            &LinearCall {
                x: input,
                rows: rows.count,
                weight: &self.qkv,
                norm: self.norm(self.attention_norm.as_ref()),
                bias: self.qkv_bias.as_ref(),
                out: scratch.qkv.whole(),
                accumulate: false,
            },
        )?;
        let stride = shape.qkv_width();
        ops::rope(
            commands,
            &RopeCall {
                qkv: scratch.qkv.whole(),
                offset: 0,
                stride,
                rows: rows.count,
                query_heads: shape.query_heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                q_norm: self.norm(self.query_norm.as_ref()),
                k_norm: self.norm(self.key_norm.as_ref()),
                table: rows.rope,
                pairing: shape.pairing,
                positions: rows.positions,
                q_out: scratch.q.whole(),
                q_dtype: scratch.q_dtype,
            },
        )?;
        let k_offset = shape.query_heads * shape.head_dim;
        let v_offset = k_offset + shape.kv_heads * shape.head_dim;
        let store = StoreKv::from_rows(&scratch.qkv, stride, k_offset, v_offset, attention.k_cache, attention.v_cache);
        Ok(attention.kernel.store_kv(commands, attention.plan, &store)?)
    }

    /// [`forward`](Self::forward) of a layer whose attention takes its input from `input`, see [`LayerInput`]; `x` is the
    /// residual stream.
    ///
    /// # Errors
    /// Buffers that do not fit.
    pub fn forward_from(
        &self,
        commands: &mut Commands,
        input: BufferSlice<'_>,
        x: &Buffer,
        rows: Rows<'_>,
        attention: &LayerAttention<'_>,
        scratch: &LayerScratch,
    ) -> Result<(), NnError> {
        self.store(commands, input, rows, attention, scratch)?;
        let io = AttentionIo::new(&scratch.q, attention.k_cache, attention.v_cache, &scratch.attention);
        attention.kernel.encode(commands, attention.plan, &io)?;
        ops::linear(
            commands,
            &LinearCall {
                x: scratch.attention.whole(),
                rows: rows.count,
                weight: &self.output,
                norm: None,
                bias: self.output_bias.as_ref(),
                out: x.whole(),
                accumulate: true,
            },
        )?;
        ops::swiglu(
            commands,
            &SwigluCall {
                x: x.whole(),
                rows: rows.count,
                gate_up: &self.gate_up,
                norm: self.norm(Some(&self.feed_forward_norm)),
                out: scratch.mlp.whole(),
            },
        )?;
        ops::linear(
            commands,
            &LinearCall {
                x: scratch.mlp.whole(),
                rows: rows.count,
                weight: &self.down,
                norm: None,
                bias: None,
                out: x.whole(),
                accumulate: true,
            },
        )?;
        Ok(())
    }
}
