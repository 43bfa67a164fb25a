//! One pass of the target: rows in, logits out, in one command stream.

use std::sync::Arc;

use polyattn_api::{AttentionKernel, BatchLayout, Phase, Plan, ProposerError, ResolvedMoe, Role, TargetServices};
use polyattn_device::{Buffer, BufferSlice, Commands, DType, Device};
use polyattn_nn::{
    NnError,
    decoder::{Decoder, DecoderScratch, Taps},
    layer::LayerAttention,
    ops,
};

use crate::{EngineError, attention::Kernels};

/// Where the ids of a pass come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ids<'a> {
    Host(&'a [u32]),
    /// Already on the device, `rows` of them.
    Device {
        ids: BufferSlice<'a>,
        rows: u32,
    },
}

impl Ids<'_> {
    pub(crate) fn rows(&self) -> u32 {
        match self {
            Self::Host(ids) => ids.len() as u32,
            Self::Device { rows, .. } => *rows,
        }
    }
}

/// Which rows' logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    None,
    Last,
    All,
}

/// Sizes of a runner.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunnerSizes {
    /// Rows of a pass at the most.
    pub(crate) rows: u32,
    /// Rows with logits at the most.
    pub(crate) head_rows: u32,
    pub(crate) pool_pages: u32,
    pub(crate) page_size: u32,
}

/// The target on its device, with its cache.
#[derive(Debug)]
pub(crate) struct Runner {
    device: Device,
    decoder: Arc<Decoder>,
    sizes: RunnerSizes,
    scratch: DecoderScratch,
    /// Keys and values of each layer, one buffer twice where they share it.
    cache: Vec<(Buffer, Buffer)>,
    /// The place of each layer's kind among the kinds of a phase.
    layer_kinds: Vec<usize>,
    ids: Buffer,
    positions: Buffer,
    last_row: Buffer,
    last_hidden: Buffer,
    logits: Buffer,
    best: Buffer,
    taps: Option<(Vec<u32>, Buffer)>,
}

impl Runner {
    pub(crate) fn new(
        device: &Device,
        decoder: Arc<Decoder>,
        layer_kinds: Vec<usize>,
        sizes: RunnerSizes,
        dtype: DType,
        taps: &[u32],
        moe: Option<&ResolvedMoe>,
    ) -> Result<Self, EngineError> {
        let config = decoder.config();
        let slots = u64::from(sizes.pool_pages) * u64::from(sizes.page_size);
        let heads = u64::from(config.kv_heads) * u64::from(config.head_dim);
        let cache = (0..config.layers)
            .map(|layer| {
                Ok(match &config.latent {
                    None => {
                        let bytes = slots * heads * dtype.bytes();
                        let keys = device.alloc(bytes, &format!("key cache {layer}"))?;
                        (keys, device.alloc(bytes, &format!("value cache {layer}"))?)
                    }
                    Some(latent) => {
                        let bytes = slots * u64::from(latent.cache_dim()) * dtype.bytes();
                        let rows = device.alloc(bytes, &format!("latent cache {layer}"))?;
                        (rows.clone(), rows)
                    }
                })
            })
            .collect::<Result<_, EngineError>>()?;
        let hidden = u64::from(config.hidden_size) * 4;
        let words = |count: u32| u64::from(count) * 4;
        let tapped = if taps.is_empty() {
            None
        } else {
            let bytes = u64::from(sizes.rows) * taps.len() as u64 * hidden;
            Some((taps.to_vec(), device.alloc(bytes, "taps")?))
        };
        let mut scratch = decoder.scratch(device, sizes.rows, dtype)?;
        if let Some(moe) = moe {
            let kernel = moe.backend.prepare(device, &moe.problem, sizes.rows)?;
            scratch.layer.serve_experts(device, config, kernel, sizes.rows)?;
        }
        Ok(Self {
            scratch,
            cache,
            layer_kinds,
            ids: device.alloc(words(sizes.rows), "ids")?,
            positions: device.alloc(words(sizes.rows), "positions")?,
            last_row: device.alloc(4, "last row")?,
            last_hidden: device.alloc(hidden, "last hidden state")?,
            logits: device.alloc(words(sizes.head_rows) * u64::from(config.vocab_size), "logits")?,
            best: device.alloc(words(sizes.head_rows), "best ids")?,
            taps: tapped,
            device: device.clone(),
            decoder,
            sizes,
        })
    }

    pub(crate) fn sizes(&self) -> RunnerSizes {
        self.sizes
    }

    /// Taps of the pass that ran last.
    pub(crate) fn taps(&self) -> Option<&Buffer> {
        self.taps.as_ref().map(|(_, buffer)| buffer)
    }

    /// The most likely ids of the pass that ran last, where [`best`](Self::best) was recorded.
    pub(crate) fn best_ids(&self) -> &Buffer {
        &self.best
    }

    /// Records a pass of one sequence over rows whose first stands at `position`.
    #[expect(clippy::too_many_arguments, reason = "one pass: what, where, with whom")]
    pub(crate) fn pass(
        &self,
        commands: &mut Commands,
        kernels: &Kernels,
        phase: Phase,
        ids: Ids<'_>,
        position: u32,
        pages: &[i32],
        head: Head,
    ) -> Result<(), EngineError> {
        let rows = ids.rows();
        let ids = match ids {
            Ids::Host(ids) => {
                self.device.write(&self.ids, 0, ids)?;
                self.ids.whole()
            }
            Ids::Device { ids, .. } => ids,
        };
        let positions: Vec<u32> = (position..position + rows).collect();
        self.device.write(&self.positions, 0, &positions)?;

        let length = position + rows;
        let mut batch = BatchLayout::new(self.sizes.page_size, self.sizes.pool_pages);
        batch.push(rows, length, &pages[..length.div_ceil(self.sizes.page_size) as usize]);
        let served: Vec<_> = kernels.of(Role::Target, phase).collect();
        let plans = served.iter().map(|kernel| kernel.plan(&batch)).collect::<Result<Vec<Plan>, _>>()?;
        let attention = |layer: u32| {
            let kind = self.layer_kinds[layer as usize];
            let (k_cache, v_cache) = &self.cache[layer as usize];
            LayerAttention { kernel: served[kind].as_ref(), plan: &plans[kind], k_cache, v_cache }
        };
        let taps = self.taps.as_ref().map(|(layers, out)| Taps { layers, out });
        self.decoder.forward(commands, ids, rows, self.positions.whole(), attention, taps, &self.scratch)?;

        let (hidden, rows) = match head {
            Head::None => return Ok(()),
            Head::Last if rows > 1 => {
                self.device.write(&self.last_row, 0, &[rows - 1])?;
                let width = self.decoder.config().hidden_size;
                let (from, row, to) = (&self.scratch.hidden, &self.last_row, &self.last_hidden);
                ops::gather_rows(commands, from.whole(), width, row.whole(), 1, to.whole())?;
                (&self.last_hidden, 1)
            }
            Head::Last | Head::All => (&self.scratch.hidden, rows),
        };
        Ok(self.decoder.logits(commands, hidden.whole(), rows, false, self.logits.whole())?)
    }

    /// Records the logits of all `rows` rows of the pass that was just recorded, in memory of their own.
    pub(crate) fn all_logits(&self, commands: &mut Commands, rows: u32) -> Result<Buffer, EngineError> {
        let vocab = u64::from(self.decoder.config().vocab_size);
        let logits = self.device.alloc(u64::from(rows) * vocab * 4, "logits of all rows")?;
        self.decoder.logits(commands, self.scratch.hidden.whole(), rows, false, logits.whole())?;
        Ok(logits)
    }

    /// Records the choice of the most likely id of each of `rows` rows of logits.
    pub(crate) fn best(&self, commands: &mut Commands, rows: u32) -> Result<BufferSlice<'_>, EngineError> {
        let vocab = self.decoder.config().vocab_size;
        ops::argmax(commands, self.logits.whole(), 0..rows, vocab, self.best.whole())?;
        Ok(self.best.slice(0, u64::from(rows) * 4)?)
    }

    /// The logits of `rows` rows.
    pub(crate) fn logits(&self, rows: u32) -> Result<BufferSlice<'_>, EngineError> {
        Ok(self.logits.slice(0, u64::from(rows) * u64::from(self.decoder.config().vocab_size) * 4)?)
    }
}

/// A drafter runs before the target's pass in the same stream, so it may use the same memory for its logits.
impl TargetServices for Runner {
    fn embed(
        &self,
        commands: &mut Commands,
        ids: BufferSlice<'_>,
        rows: u32,
        out: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        self.decoder.embed(commands, ids, rows, out).map_err(lent)
    }

    fn head_argmax(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        first: u32,
        ids: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        let vocab = self.decoder.config().vocab_size;
        self.decoder.logits(commands, hidden, rows, true, self.logits.whole()).map_err(lent)?;
        ops::argmax(commands, self.logits.whole(), first..rows, vocab, ids).map_err(|error| lent(error.into()))
    }
}

fn lent(error: NnError) -> ProposerError {
    match error {
        NnError::Backend(error) => error.into(),
        NnError::Device(error) => error.into(),
        other => ProposerError::Unsupported(other.to_string()),
    }
}
