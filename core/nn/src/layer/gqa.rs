//! Grouped-query attention of a layer.

use polyattn_api::AttentionIo;
use polyattn_device::{Buffer, BufferSlice, Commands};

use super::{LayerAttention, LayerInput, LayerLoader, LayerScratch, LayerShape, Rows};
use crate::{
    NnError,
    load::{LayerWeight as W, RopePairing},
    ops::{self, LinearCall, Matrix, Norm, RopeCall, Vector},
};

/// The weights of grouped-query attention and the norm before it.
#[derive(Debug)]
pub(super) struct Gqa {
    query_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    eps: f32,
    pairing: RopePairing,
    norm: Option<Vector>,
    qkv: Matrix,
    qkv_bias: Option<Vector>,
    query_norm: Option<Vector>,
    key_norm: Option<Vector>,
    output: Matrix,
    output_bias: Option<Vector>,
}

impl Gqa {
    pub(super) fn load(
        loader: &mut LayerLoader<'_, '_>,
        shape: &LayerShape,
        input: LayerInput,
    ) -> Result<Self, NnError> {
        let width = match input {
            LayerInput::Apart(width) => width,
            LayerInput::Normed | LayerInput::Bare => shape.hidden_size,
        };
        let heads = shape.query_heads * shape.head_dim;
        Ok(Self {
            query_heads: shape.query_heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            eps: shape.eps,
            pairing: shape.pairing,
            norm: match input {
                LayerInput::Normed => Some(loader.vector(&[W::AttentionNorm], width)?),
                LayerInput::Bare | LayerInput::Apart(_) => None,
            },
            qkv: loader.matrix(&[W::Query, W::Key, W::Value], width, shape.qkv_width())?,
            qkv_bias: if shape.qkv_bias {
                Some(loader.vector(&[W::QueryBias, W::KeyBias, W::ValueBias], shape.qkv_width())?)
            } else {
                None
            },
            query_norm: if shape.qk_norm { Some(loader.vector(&[W::QueryNorm], shape.head_dim)?) } else { None },
            key_norm: if shape.qk_norm { Some(loader.vector(&[W::KeyNorm], shape.head_dim)?) } else { None },
            output: loader.matrix(&[W::AttentionOutput], heads, shape.hidden_size)?,
            output_bias: if shape.output_bias {
                Some(loader.vector(&[W::AttentionOutputBias], shape.hidden_size)?)
            } else {
                None
            },
        })
    }

    pub(super) fn matrices(&self) -> [&Matrix; 2] {
        [&self.qkv, &self.output]
    }

    pub(super) fn key_norm(&self) -> Option<Norm<'_>> {
        self.norm(self.key_norm.as_ref())
    }

    fn norm<'a>(&self, weight: Option<&'a Vector>) -> Option<Norm<'a>> {
        weight.map(|weight| Norm { weight, eps: self.eps })
    }

    /// Queries into scratch, keys and values into the cache.
    pub(super) fn store(
        &self,
        commands: &mut Commands,
        input: BufferSlice<'_>,
        rows: Rows<'_>,
        attention: &LayerAttention<'_>,
        scratch: &LayerScratch,
    ) -> Result<(), NnError> {
        ops::linear(
            commands,
            &LinearCall {
                x: input,
                rows: rows.count,
                weight: &self.qkv,
                norm: self.norm(self.norm.as_ref()),
                bias: self.qkv_bias.as_ref(),
                out: scratch.rows.whole(),
                accumulate: false,
            },
        )?;
        attention.rotate_and_store(
            commands,
            &RopeCall {
                qkv: scratch.rows.whole(),
                offset: 0,
                stride: self.qkv.rows,
                rows: rows.count,
                query_heads: self.query_heads,
                kv_heads: self.kv_heads,
                head_dim: self.head_dim,
                parts: None,
                q_norm: self.norm(self.query_norm.as_ref()),
                k_norm: self.norm(self.key_norm.as_ref()),
                table: rows.rope,
                pairing: self.pairing,
                positions: rows.positions,
                q_out: scratch.q.whole(),
                q_dtype: scratch.q_dtype,
            },
        )
    }

    /// Adds attention to `x`.
    pub(super) fn forward(
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
        Ok(())
    }
}
