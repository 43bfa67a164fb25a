//! One pass of the target: rows in, logits out, in one command stream.

use std::sync::Arc;

use polyattn_api::{
    AttentionKernel, BatchLayout, Draft, MoveKv, Phase, Plan, ProposerError, ResolvedMoe, Role, TapSpec,
    TargetServices, TreeMask,
};
use polyattn_device::{Buffer, BufferSlice, Commands, DType, Device, DeviceError, DeviceFacts};
use polyattn_nn::{
    NnError,
    decoder::{Decoder, DecoderScratch, Taps},
    layer::LayerAttention,
    load::DecoderConfig,
    ops,
};

use crate::{EngineError, attention::Kernels};

/// Where the ids of a pass come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ids<'a> {
    Host(&'a [u32]),
    /// Already on the device, as they lie.
    Device(BufferSlice<'a>),
    /// Some on the device: for each row a place in `ids`, or a [`given_id`](ops::given_id).
    Gathered {
        ids: BufferSlice<'a>,
        sources: &'a [u32],
    },
}

/// Rows of one sequence in a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PassSequence<'a> {
    /// Place of the first row in the sequence.
    pub(crate) position: u32,
    pub(crate) rows: u32,
    pub(crate) pages: &'a [i32],
    /// What stands behind the first row, where that is a tree.
    pub(crate) tree: Option<&'a Draft>,
}

/// Rows of a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a> {
    pub(crate) phase: Phase,
    pub(crate) ids: Ids<'a>,
    /// Rows of each sequence, one sequence behind the other.
    pub(crate) sequences: &'a [PassSequence<'a>],
    pub(crate) head: Head<'a>,
}

/// Which rows' logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head<'a> {
    None,
    All,
    Rows(&'a [u32]),
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

/// That each tensor of the cache fits one binding of the device, for kernels bind it whole.
///
/// # Errors
/// [`EngineError::CacheTooLarge`].
pub(crate) fn check_cache(
    config: &DecoderConfig,
    device: &DeviceFacts,
    pages: u32,
    page_size: u32,
    dtype: DType,
) -> Result<(), EngineError> {
    let (slot, tokens) = (config.slot_bytes(dtype.into()), u64::from(pages) * u64::from(page_size));
    let (bytes, allowed) = (tokens.saturating_mul(slot), device.limits.binding_bytes.min(device.limits.buffer_bytes));
    if bytes <= allowed {
        return Ok(());
    }
    let most = allowed / (slot * u64::from(page_size)) * u64::from(page_size);
    Err(EngineError::CacheTooLarge { bytes, pages, tokens, device: device.name.clone(), allowed, most })
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
    head_places: Buffer,
    head_hidden: Buffer,
    logits: Buffer,
    best: Buffer,
    /// Sources of ids, and pairs of slots.
    sources: Buffer,
    moves: Buffer,
    taps: Option<Tapped>,
}

#[derive(Debug)]
struct Tapped {
    spec: TapSpec,
    out: Buffer,
    last_hidden: Option<Buffer>,
}

impl Runner {
    pub(crate) fn new(
        device: &Device,
        decoder: Arc<Decoder>,
        layer_kinds: Vec<usize>,
        sizes: RunnerSizes,
        dtype: DType,
        taps: &TapSpec,
        moe: Option<&ResolvedMoe>,
    ) -> Result<Self, EngineError> {
        let config = decoder.config();
        let slots = u64::from(sizes.pool_pages) * u64::from(sizes.page_size);
        let cache = decoder.cache(device, slots, dtype.into(), "target")?;
        let hidden = u64::from(config.hidden_size) * 4;
        let words = |count: u32| u64::from(count) * 4;
        let tapped = if taps.is_empty() {
            None
        } else {
            let bytes = u64::from(sizes.rows) * taps.count() as u64 * hidden;
            let last = |device: &Device| device.alloc(u64::from(sizes.rows) * hidden, "last hidden states");
            Some(Tapped {
                spec: taps.clone(),
                out: device.alloc(bytes, "taps")?,
                last_hidden: if taps.last_hidden { Some(last(device)?) } else { None },
            })
        };
        Ok(Self {
            scratch: decoder.scratch(device, sizes.rows, dtype, moe)?,
            cache,
            layer_kinds,
            ids: device.alloc(words(sizes.rows), "ids")?,
            positions: device.alloc(words(sizes.rows), "positions")?,
            head_places: device.alloc(words(sizes.head_rows), "head places")?,
            head_hidden: device.alloc(u64::from(sizes.head_rows) * hidden, "head rows")?,
            logits: device.alloc(words(sizes.head_rows) * u64::from(config.vocab_size), "logits")?,
            best: device.alloc(words(sizes.head_rows), "best ids")?,
            sources: device.alloc(words(sizes.rows), "id sources")?,
            moves: device.alloc(words(sizes.rows) * 2, "moved slots")?,
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
        self.taps.as_ref().map(|taps| &taps.out)
    }

    /// The most likely ids of the pass that ran last, where [`best`](Self::best) was recorded.
    pub(crate) fn best_ids(&self) -> &Buffer {
        &self.best
    }

    /// Records a pass.
    pub(crate) fn pass(&self, commands: &mut Commands, kernels: &Kernels, pass: &Pass<'_>) -> Result<(), EngineError> {
        let rows: u32 = pass.sequences.iter().map(|sequence| sequence.rows).sum();
        let ids = match pass.ids {
            Ids::Host(ids) => {
                self.device.write(&self.ids, 0, ids)?;
                self.ids.whole()
            }
            Ids::Device(ids) => ids,
            Ids::Gathered { ids, sources } => {
                self.device.write(&self.sources, 0, sources)?;
                ops::gather_ids(commands, ids, self.sources.whole(), rows, self.ids.whole())?;
                self.ids.whole()
            }
        };
        let over_tree = pass.sequences.iter().any(|sequence| sequence.tree.is_some());
        let mut batch = BatchLayout::new(self.sizes.page_size, self.sizes.pool_pages);
        let mut positions: Vec<u32> = Vec::with_capacity(rows as usize);
        for sequence in pass.sequences {
            let length = sequence.position + sequence.rows;
            let pages = length.div_ceil(self.sizes.page_size) as usize;
            batch.push(sequence.rows, length, sequence.pages.get(..pages).unwrap_or(sequence.pages));
            match sequence.tree {
                None => positions.extend(sequence.position..length),
                Some(tree) => {
                    positions.push(sequence.position);
                    positions.extend(tree.depths().iter().map(|depth| sequence.position + depth));
                }
            }
        }
        self.device.write(&self.positions, 0, &positions)?;
        if over_tree {
            batch.tree = Some(tree_mask(pass.sequences));
        }

        let served: Vec<_> = kernels.of(Role::Target, pass.phase, over_tree).collect();
        let plans = served.iter().map(|kernel| kernel.plan(&batch)).collect::<Result<Vec<Plan>, _>>()?;
        let attention = |layer: u32| {
            let kind = self.layer_kinds[layer as usize];
            let (k_cache, v_cache) = &self.cache[layer as usize];
            LayerAttention { kernel: served[kind].as_ref(), plan: &plans[kind], k_cache, v_cache }
        };
        let taps = self.taps.as_ref().map(|taps| Taps {
            layers: &taps.spec.layers,
            last_hidden: taps.last_hidden.as_ref(),
            out: &taps.out,
        });
        self.decoder.forward(commands, ids, rows, self.positions.whole(), attention, taps, &self.scratch)?;

        let (hidden, rows) = match pass.head {
            Head::None => return Ok(()),
            Head::Rows(places) if rows > 1 => {
                self.device.write(&self.head_places, 0, places)?;
                let (width, count) = (self.decoder.config().hidden_size, places.len() as u32);
                let (from, places, to) = (&self.scratch.hidden, &self.head_places, &self.head_hidden);
                ops::gather_rows(commands, from.whole(), width, places.whole(), count, to.whole())?;
                (&self.head_hidden, count)
            }
            Head::Rows(_) | Head::All => (&self.scratch.hidden, rows),
        };
        Ok(self.decoder.logits(commands, hidden.whole(), rows, false, self.logits.whole())?)
    }

    /// Records moves of tokens from slot to slot of the pool, in every layer's cache.
    pub(crate) fn move_slots(
        &self,
        commands: &mut Commands,
        kernels: &Kernels,
        moves: &[[u32; 2]],
    ) -> Result<(), EngineError> {
        self.device.write(&self.moves, 0, moves.as_flattened())?;
        let served: Vec<_> = kernels.of(Role::Target, Phase::Verify, false).collect();
        for (kind, (k_cache, v_cache)) in self.layer_kinds.iter().zip(&self.cache) {
            let page_size = self.sizes.page_size;
            served[*kind].move_kv(commands, &MoveKv::new(moves, &self.moves, page_size, k_cache, v_cache))?;
        }
        Ok(())
    }

    /// The ids of the pass that ran last, where they were not taken as they lie.
    pub(crate) fn ids(&self) -> &Buffer {
        &self.ids
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

    /// The logits of `rows` rows from `first` on.
    pub(crate) fn logits(&self, first: u32, rows: u32) -> Result<BufferSlice<'_>, EngineError> {
        let row = u64::from(self.decoder.config().vocab_size) * 4;
        Ok(self.logits.slice(u64::from(first) * row, u64::from(rows) * row)?)
    }
}

/// Which rows see which: a row itself and its ancestors, the first row being the root; in a chain all rows before.
fn tree_mask(sequences: &[PassSequence<'_>]) -> TreeMask {
    let most = sequences.iter().map(|sequence| sequence.rows).max().unwrap_or(0);
    let words = most.div_ceil(32).max(1) as usize;
    let mut bits: Vec<u32> = Vec::new();
    for sequence in sequences {
        let first = bits.len();
        for row in 0..sequence.rows as usize {
            let parent = row.checked_sub(1).map(|node| match sequence.tree {
                Some(tree) => tree.parent(node as u32).map_or(0, |parent| parent as usize + 1),
                None => node,
            });
            let start = bits.len();
            match parent {
                Some(parent) => bits.extend_from_within(first + parent * words..first + (parent + 1) * words),
                None => bits.resize(start + words, 0),
            }
            bits[start + row / 32] |= 1 << (row % 32);
        }
    }
    TreeMask { words, bits }
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

    fn head_logits(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        logits: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        self.decoder.logits(commands, hidden, rows, true, logits).map_err(lent)
    }

    fn head_top_k(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        k: u32,
        ids: BufferSlice<'_>,
        log_probabilities: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        let config = self.decoder.config();
        let vocab = config.vocab_size;
        // A level of many trees may have more rows than there is room for logits. Parts begin at multiples of 64 rows,
        // which every device can bind.
        let room = self.sizes.head_rows;
        let most = if room < 64 { room } else { room / 64 * 64 };
        for first in (0..rows).step_by(most as usize) {
            let count = most.min(rows - first);
            let hidden = part(hidden, first, count, config.hidden_size)?;
            self.decoder.logits(commands, hidden, count, true, self.logits.whole()).map_err(lent)?;
            let (ids, log_probabilities) = (part(ids, first, count, k)?, part(log_probabilities, first, count, k)?);
            ops::top_k(commands, self.logits.whole(), count, vocab, k, ids, log_probabilities)
                .map_err(|error| lent(error.into()))?;
        }
        Ok(())
    }
}

/// Rows of `width` elements of 4 bytes.
fn part(slice: BufferSlice<'_>, first: u32, rows: u32, width: u32) -> Result<BufferSlice<'_>, DeviceError> {
    let row = u64::from(width) * 4;
    slice.buffer().slice(slice.offset() + u64::from(first) * row, u64::from(rows) * row)
}

fn lent(error: NnError) -> ProposerError {
    match error {
        NnError::Backend(error) => error.into(),
        NnError::Device(error) => error.into(),
        other => ProposerError::Unsupported(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use polyattn_api::Draft;

    use super::{PassSequence, tree_mask};

    #[test]
    fn rows_see_their_ancestors() {
        let tree = Draft::tree(vec![7, 8, 9, 6], vec![None, None, Some(0), Some(1)]);
        let of = |rows, tree| PassSequence { position: 3, rows, pages: &[], tree };
        let mask = tree_mask(&[of(5, Some(&tree)), of(3, None), of(1, None)]);
        assert_eq!(mask.words, 1);
        assert_eq!(mask.bits, [0b1, 0b11, 0b101, 0b1011, 0b10101, 0b1, 0b11, 0b111, 0b1]);
        let long = tree_mask(&[of(40, None)]);
        assert_eq!((long.words, &long.bits[64..66], &long.bits[78..]), (2, &[u32::MAX, 1][..], &[u32::MAX, 0xff][..]));
    }
}
