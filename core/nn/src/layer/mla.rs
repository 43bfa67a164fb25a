//! Latent attention of a layer, in absorbed form (DeepSeek-V2, arXiv 2405.04434): keys and values of a head are products
//! of one latent with the head's matrices, so that the key's matrix can be applied to the query instead, and the
//! value's to the attention's output. The cache holds the latent and one rotated key for all heads.

use polyattn_api::{AttentionIo, HeadPart};
use polyattn_device::{Buffer, Commands, Device};

use super::{LayerAttention, LayerLoader, LayerScratch, Rows};
use crate::{
    NnError,
    load::{DecoderConfig, LatentConfig, LayerWeight as W, RopePairing},
    ops::{self, HeadsCall, LinearCall, Matrix, Norm, RopeCall, Vector},
};

/// The weights of latent attention and the norm before it.
#[derive(Debug)]
pub(super) struct Mla {
    latent: LatentConfig,
    heads: u32,
    eps: f32,
    pairing: RopePairing,
    norm: Vector,
    /// Projection to the queries' own latent and its norm, where they have one.
    query_down: Option<(Matrix, Vector)>,
    query: Matrix,
    latent_down: Matrix,
    latent_norm: Vector,
    /// For each head `[latent, nope]`: the key's projection, transposed.
    absorb_key: Matrix,
    /// For each head `[value, latent]`: the value's projection.
    value: Matrix,
    output: Matrix,
}

/// Memory that latent attention needs besides that of any layer.
#[derive(Debug)]
pub(super) struct LatentScratch {
    /// Queries' latent, `[rows, query_latent]`.
    query_latent: Option<Buffer>,
    /// Queries before they meet the key's projection, `[rows, heads, nope + rope]`.
    heads: Buffer,
    /// Their first part behind it, `[rows, heads, latent]`.
    absorbed: Buffer,
    /// Values, `[rows, heads, value]`.
    values: Buffer,
}

impl LatentScratch {
    pub(super) fn new(
        device: &Device,
        config: &DecoderConfig,
        latent: &LatentConfig,
        rows: u32,
    ) -> Result<Self, NnError> {
        let bytes = |elements: u32| u64::from(rows) * u64::from(elements) * 4;
        let heads = config.query_heads;
        Ok(Self {
            query_latent: match latent.query_latent_dim {
                Some(dim) => Some(device.alloc(bytes(dim), "queries' latent")?),
                None => None,
            },
            heads: device.alloc(bytes(heads * config.head_dim), "queries of heads")?,
            absorbed: device.alloc(bytes(heads * latent.latent_dim), "absorbed queries")?,
            values: device.alloc(bytes(heads * latent.value_dim), "values of heads")?,
        })
    }
}

impl Mla {
    pub(super) fn load(
        loader: &mut LayerLoader<'_, '_>,
        config: &DecoderConfig,
        latent: &LatentConfig,
    ) -> Result<Self, NnError> {
        let (hidden, heads) = (config.hidden_size, config.query_heads);
        let query_rows = heads * config.head_dim;
        let (query_down, query) = match latent.query_latent_dim {
            None => (None, loader.matrix(&[W::Query], hidden, query_rows)?),
            Some(dim) => {
                let down = (loader.matrix(&[W::QueryDown], hidden, dim)?, loader.vector(&[W::QueryLatentNorm], dim)?);
                (Some(down), loader.matrix(&[W::QueryUp], dim, query_rows)?)
            }
        };
        let (nope, value, width) = (latent.nope_dim, latent.value_dim, latent.latent_dim);
        let up = loader.values(W::LatentUp, heads * (nope + value), width)?;
        let per_head = || up.chunks_exact(((nope + value) * width) as usize);
        let mut keys = Vec::with_capacity((heads * width * nope) as usize);
        for head in per_head() {
            // Row i of the head's key projection becomes column i.
            for column in 0..width {
                keys.extend((0..nope).map(|row| head[(row * width + column) as usize]));
            }
        }
        let absorb_key = loader.matrix_of(W::LatentUp, &keys, heads * width, nope)?;
        let values: Vec<f32> = per_head().flat_map(|head| &head[(nope * width) as usize..]).copied().collect();
        let value_up = loader.matrix_of(W::LatentUp, &values, heads * value, width)?;
        Ok(Self {
            heads,
            eps: config.rms_norm_eps,
            pairing: config.rope.pairing,
            norm: loader.vector(&[W::AttentionNorm], hidden)?,
            query_down,
            query,
            latent_down: loader.matrix(&[W::LatentDown], hidden, latent.cache_dim())?,
            latent_norm: loader.vector(&[W::LatentNorm], width)?,
            absorb_key,
            value: value_up,
            output: loader.matrix(&[W::AttentionOutput], heads * value, hidden)?,
            latent: latent.clone(),
        })
    }

    pub(super) fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let own = [&self.query, &self.latent_down, &self.absorb_key, &self.value, &self.output];
        own.into_iter().chain(self.query_down.as_ref().map(|(matrix, _)| matrix))
    }

    /// Adds attention to `x`.
    pub(super) fn forward(
        &self,
        commands: &mut Commands,
        x: &Buffer,
        rows: Rows<'_>,
        attention: &LayerAttention<'_>,
        scratch: &LayerScratch,
        memory: &LatentScratch,
    ) -> Result<(), NnError> {
        let (heads, latent, cache_dim) = (self.heads, &self.latent, self.latent.cache_dim());
        let head_dim = latent.nope_dim + latent.rope_dim;
        let norm = |weight| Some(Norm { weight, eps: self.eps });
        let mut linear = |x: &Buffer, weight: &Matrix, norm, out: &Buffer, accumulate| {
            let (x, out) = (x.whole(), out.whole());
            ops::linear(commands, &LinearCall { x, rows: rows.count, weight, norm, bias: None, out, accumulate })
        };
        match (&self.query_down, &memory.query_latent) {
            (Some((down, down_norm)), Some(between)) => {
                linear(x, down, norm(&self.norm), between, false)?;
                linear(between, &self.query, norm(down_norm), &memory.heads, false)?;
            }
            _ => linear(x, &self.query, norm(&self.norm), &memory.heads, false)?,
        }
        linear(x, &self.latent_down, norm(&self.norm), &scratch.rows, false)?;

        let by_head = HeadsCall {
            x: memory.heads.whole(),
            rows: rows.count,
            weight: &self.absorb_key,
            matrices: heads,
            first: 0,
            heads,
            x_stride: head_dim,
            gated: false,
            out: memory.absorbed.whole(),
            out_stride: latent.latent_dim,
        };
        ops::linear_by_head(commands, &by_head)?;
        // A query is what became of its first elements, then its rope part.
        let (front, back) = (latent.latent_dim, latent.rope_dim);
        let absorbed = HeadPart { rows: memory.absorbed.whole(), offset: 0, stride: front, dim: front };
        let rope = HeadPart { rows: memory.heads.whole(), offset: latent.nope_dim, stride: head_dim, dim: back };
        let rotate = RopeCall {
            qkv: scratch.rows.whole(),
            offset: 0,
            stride: cache_dim,
            rows: rows.count,
            query_heads: heads,
            kv_heads: 1,
            head_dim: cache_dim,
            parts: Some([absorbed, rope]),
            q_norm: None,
            k_norm: norm(&self.latent_norm),
            table: &rows.rope.from_element(latent.latent_dim),
            pairing: self.pairing,
            positions: rows.positions,
            q_out: scratch.q.whole(),
            q_dtype: scratch.q_dtype,
        };
        attention.rotate_and_store(commands, &rotate)?;
        let io = AttentionIo::new(&scratch.q, attention.k_cache, attention.v_cache, &scratch.attention);
        attention.kernel.encode(commands, attention.plan, &io)?;
        let values = HeadsCall {
            x: scratch.attention.whole(),
            weight: &self.value,
            x_stride: latent.latent_dim,
            out: memory.values.whole(),
            out_stride: latent.value_dim,
            ..by_head
        };
        ops::linear_by_head(commands, &values)?;
        let (rows, x, values) = (rows.count, x.whole(), memory.values.whole());
        let output =
            LinearCall { x: values, rows, weight: &self.output, norm: None, bias: None, out: x, accumulate: true };
        Ok(ops::linear(commands, &output)?)
    }
}
