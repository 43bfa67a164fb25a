//! A decoder: embedding, layers, final norm and output head.

use polyattn_api::{KvDType, ResolvedMoe};
use polyattn_device::{Buffer, BufferSlice, Commands, DType, Device};

use crate::{
    NnError, WeightLoader,
    layer::{DecoderLayer, LayerAttention, LayerScratch, Rows},
    load::{DecoderConfig, ModelSource, WeightName},
    ops::{self, LinearCall, Matrix, Norm, RopeTable, Vector},
};

/// The weights of a decoder on a device.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    embedding: Matrix,
    layers: Vec<DecoderLayer>,
    norm: Vector,
    /// `None` where the embedding is the head too.
    head: Option<Matrix>,
    rope: RopeTable,
    weight_bytes: u64,
}

/// Memory of a pass over up to a fixed number of rows.
#[derive(Debug)]
pub struct DecoderScratch {
    /// The residual stream `[rows, hidden_size]`, f32; after a pass, the output of the last layer.
    pub hidden: Buffer,
    /// Between the operations of a layer.
    pub layer: LayerScratch,
}

/// Hidden states that a pass hands out: the output of each of `layers` and, where asked for, the last hidden state behind
/// the final norm, side by side in rows of as many times `hidden_size`.
#[derive(Clone, Copy, Debug)]
pub struct Taps<'a> {
    /// Layer ids.
    pub layers: &'a [u32],
    /// Memory for the last hidden state `[rows, hidden_size]`, f32, where it is wanted.
    pub last_hidden: Option<&'a Buffer>,
    /// `[rows, (layers.len() + 1 with the last hidden state) · hidden_size]`, f32.
    pub out: &'a Buffer,
}

impl Decoder {
    /// Loads a decoder for sequences of up to `positions` tokens; `progress` hears of bytes read.
    ///
    /// # Errors
    /// Weights that are missing or of another shape; no memory.
    pub fn load(
        source: &ModelSource,
        device: &Device,
        positions: u32,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, NnError> {
        let config = source.config.clone();
        let checkpoint = &source.checkpoint;
        config.check_weights(checkpoint)?;
        let format = checkpoint.format();
        let mut loader = WeightLoader::new(checkpoint, device, progress);
        let mut table = |name: WeightName| {
            let name = [name.in_format(format)];
            let dtype = loader.held_as(&name[0])?;
            loader.matrix(&name, config.hidden_size, dtype)
        };
        let embedding = table(WeightName::TokenEmbedding)?;
        let head = if config.tied_embedding { None } else { Some(table(WeightName::Output)?) };
        let norm = loader.vector(&[WeightName::OutputNorm.in_format(format)])?;
        let layers = (0..config.layers)
            .map(|layer| DecoderLayer::of_decoder(&mut loader, &config, layer))
            .collect::<Result<Vec<_>, _>>()?;
        let rope = RopeTable::new(device, &config.inv_freq(), positions)?;
        let tables = [Some(&embedding), head.as_ref()].into_iter().flatten();
        let weight_bytes = tables.map(|matrix| matrix.buffer.bytes()).sum::<u64>()
            + layers.iter().map(DecoderLayer::weight_bytes).sum::<u64>();
        Ok(Self { config, embedding, layers, norm, head, rope, weight_bytes })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Bytes of its matrices as held on the device.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Allocates keys and values of each layer for `slots` tokens, one buffer twice where they share it (latent
    /// attention); `whose` tells them apart from another decoder's in messages.
    ///
    /// # Errors
    /// No memory.
    pub fn cache(
        &self,
        device: &Device,
        slots: u64,
        kv_dtype: KvDType,
        whose: &str,
    ) -> Result<Vec<(Buffer, Buffer)>, NnError> {
        let bytes = slots * self.config.slot_bytes(kv_dtype);
        let tensor = |what: &str, layer: u32| device.alloc(bytes, &format!("{whose} {what} cache {layer}"));
        (0..self.config.layers)
            .map(|layer| {
                Ok(match &self.config.latent {
                    None => (tensor("key", layer)?, tensor("value", layer)?),
                    Some(_) => {
                        let rows = tensor("latent", layer)?;
                        (rows.clone(), rows)
                    }
                })
            })
            .collect()
    }

    /// Scratch for passes of up to `rows` rows, whose queries attention takes as `q_dtype`, and whose experts, where the
    /// decoder has some, `moe` serves.
    ///
    /// # Errors
    /// Experts that the decoder does not have, or others than `moe` was chosen for; no memory.
    pub fn scratch(
        &self,
        device: &Device,
        rows: u32,
        q_dtype: DType,
        moe: Option<&ResolvedMoe>,
    ) -> Result<DecoderScratch, NnError> {
        let mut layer = LayerScratch::of_decoder(device, &self.config, rows, q_dtype)?;
        if let Some(moe) = moe {
            let kernel = moe.backend.prepare(device, &moe.problem, rows)?;
            layer.serve_experts(device, &self.config, kernel, rows)?;
        }
        let hidden = device.alloc(u64::from(rows) * u64::from(self.config.hidden_size) * 4, "hidden states")?;
        Ok(DecoderScratch { hidden, layer })
    }

    /// Records the embedding of `rows` ids into `out` `[rows, hidden_size]`.
    ///
    /// # Errors
    /// Buffers that do not fit.
    pub fn embed(
        &self,
        commands: &mut Commands,
        ids: BufferSlice<'_>,
        rows: u32,
        out: BufferSlice<'_>,
    ) -> Result<(), NnError> {
        Ok(ops::embed(commands, &self.embedding, ids, rows, out)?)
    }

    /// Records all layers on `rows` ids and leaves the last one's output in `scratch.hidden`. `attention` serves layer
    /// by layer.
    ///
    /// # Errors
    /// Buffers that do not fit.
    #[expect(clippy::too_many_arguments, reason = "one pass: what, where, with whom")]
    pub fn forward<'a>(
        &self,
        commands: &mut Commands,
        ids: BufferSlice<'_>,
        rows: u32,
        positions: BufferSlice<'_>,
        attention: impl Fn(u32) -> LayerAttention<'a>,
        taps: Option<Taps<'_>>,
        scratch: &DecoderScratch,
    ) -> Result<(), NnError> {
        let hidden = &scratch.hidden;
        self.embed(commands, ids, rows, hidden.whole())?;
        for (layer, number) in self.layers.iter().zip(0..) {
            let rows = Rows { count: rows, positions, rope: &self.rope };
            layer.forward(commands, hidden, rows, &attention(number), &scratch.layer)?;
            if let Some(taps) = &taps {
                let width = self.config.hidden_size;
                let stride = (taps.layers.len() as u32 + u32::from(taps.last_hidden.is_some())) * width;
                for (place, _) in taps.layers.iter().enumerate().filter(|(_, tapped)| **tapped == number) {
                    let offset = place as u32 * width;
                    ops::copy_columns(commands, hidden.whole(), width, rows.count, taps.out.whole(), stride, offset)?;
                }
            }
        }
        if let Some(Taps { layers, last_hidden: Some(last), out }) = &taps {
            let width = self.config.hidden_size;
            let norm = Norm { weight: &self.norm, eps: self.config.rms_norm_eps };
            ops::rms_norm(commands, hidden.whole(), norm, rows, last.whole())?;
            let offset = layers.len() as u32 * width;
            ops::copy_columns(commands, last.whole(), width, rows, out.whole(), offset + width, offset)?;
        }
        Ok(())
    }

    /// Records final norm and output head on `rows` hidden states into `logits` `[rows, vocab_size]`; `normed` says that
    /// they carry a final norm already.
    ///
    /// # Errors
    /// Buffers that do not fit.
    pub fn logits(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        normed: bool,
        logits: BufferSlice<'_>,
    ) -> Result<(), NnError> {
        let norm = Norm { weight: &self.norm, eps: self.config.rms_norm_eps };
        ops::linear(
            commands,
            &LinearCall {
                x: hidden,
                rows,
                weight: self.head.as_ref().unwrap_or(&self.embedding),
                norm: (!normed).then_some(norm),
                bias: None,
                out: logits,
                accumulate: false,
            },
        )?;
        Ok(())
    }
}
