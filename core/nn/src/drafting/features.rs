//! Drafting token by token from extrapolated hidden states.

use std::sync::Arc;

use polyattn_api::{
    AttentionKernel, BatchLayout, CommittedRows, DraftSequence, Drafter, LoadContext, Outcome, Plan, PrefixReuse,
    Proposal, ProposeContext, ProposerError, TapSpec, TargetServices,
};
use polyattn_device::{Buffer, BufferSlice, Commands, Device};

use super::{ChainOrder, Chains, NewRow, RowStore, trees::TreeMemory};
use crate::{
    NnError,
    layer::{DecoderLayer, LayerAttention, LayerScratch, LayerShape, Rows},
    ops::{self, LinearCall, Matrix, Norm, RopeTable, Vector},
};

/// How a layer's input is made of a token's embedding and a hidden state, the embedding in front.
#[derive(Debug)]
pub enum FeatureEntry {
    /// One product of both side by side, `[hidden, 2 · hidden]`, into the residual stream.
    Project {
        /// Norm of the embedding.
        embedding_norm: Option<Vector>,
        /// Norm of the hidden state.
        feature_norm: Option<Vector>,
        /// The product.
        weight: Matrix,
        /// Its bias.
        bias: Option<Vector>,
    },
    /// Both side by side are the attention's input ([`LayerInput::Apart`](crate::layer::LayerInput::Apart)), and the
    /// hidden state is the residual stream.
    Beside {
        /// Norm of the embedding.
        embedding_norm: Vector,
        /// Norm of the hidden state.
        feature_norm: Vector,
        /// Whether the residual stream is the normed hidden state.
        residual_normed: bool,
    },
}

/// Which hidden state goes into the next pass of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextFeature {
    /// The layer's output.
    Output,
    /// The layer's output behind the final norm.
    Normed,
}

/// The output head of a drafter.
#[derive(Debug)]
pub enum FeatureHead {
    /// The target's.
    Target,
    /// Its own.
    Own {
        /// `[draft vocabulary, hidden]`.
        weight: Matrix,
        /// The target's id of each id of the draft vocabulary; `None` where the vocabularies are one.
        target_ids: Option<Vec<u32>>,
    },
}

/// A network of one layer that says from a hidden state and the token behind it which hidden state comes next.
#[derive(Debug)]
pub struct FeatureNetwork {
    /// The dimensions of its layer; the target's embedding is as wide.
    pub shape: LayerShape,
    /// What makes one hidden state of several tapped ones, `[hidden, taps · hidden]`; `None` for a single tap.
    pub fuse: Option<Matrix>,
    /// What the layer begins with.
    pub entry: FeatureEntry,
    /// The layer.
    pub layer: DecoderLayer,
    /// The norm before the output head, where there is one.
    pub norm: Option<Vector>,
    /// What goes on to the next token.
    pub next: NextFeature,
    /// The output head.
    pub head: FeatureHead,
    /// Whether the row at position 0 has zeros for an embedding.
    pub zero_first: bool,
    /// The rotations, for all positions of the cache.
    pub rope: RopeTable,
}

/// Drafts by a [`FeatureNetwork`].
///
/// The row at position p has the target's hidden state of p and the token at p + 1, and leads to the token at p + 2; keys
/// and values of the layer lie at p, on the target's page tables. What is committed goes through the layer's keys and
/// values alone, made from true hidden states: it replaces what drafts left at these positions. A draft begins with the
/// last of these rows, which it runs in full, and goes on from its own output. Of a chain, no pass is read back.
#[derive(Debug)]
pub struct FeatureDrafter {
    pub(super) network: FeatureNetwork,
    pub(super) device: Device,
    pub(super) page_size: u32,
    pub(super) pool_pages: u32,
    /// Ids of the target's head.
    pub(super) target_vocab: u32,
    kernel: Arc<dyn AttentionKernel>,
    /// The same over a tree mask and memory for it, where trees are asked for.
    trees: Option<(Arc<dyn AttentionKernel>, TreeMemory)>,
    pub(super) kept: RowStore,
    chains: Chains,
    taps: TapSpec,
    default_tokens: u32,
    pub(super) memory: Memory,
}

#[derive(Debug)]
pub(super) struct Memory {
    rows: u32,
    k_cache: Buffer,
    v_cache: Buffer,
    tapped: Buffer,
    tapped_rows: Buffer,
    pub(super) features: Buffer,
    ids: Buffer,
    positions: Buffer,
    embedded: Buffer,
    part: Buffer,
    wide: Buffer,
    pub(super) hidden: Buffer,
    normed: Buffer,
    zeros: Buffer,
    logits: Option<Buffer>,
    target_ids: Option<Buffer>,
    draft_ids: Buffer,
    chain_positions: Buffer,
    pub(super) layer: LayerScratch,
}

/// What the last pass of a step left behind, for tests against an independent implementation.
#[derive(Debug)]
#[non_exhaustive]
pub struct FeatureStages<'a> {
    /// The hidden states committed last, fused, `[rows, hidden]` f32; the first one is that of the last draft.
    pub features: &'a Buffer,
    /// Output of the layer, `[rows, hidden]` f32.
    pub hidden: &'a Buffer,
    /// The same behind the final norm, where there is one.
    pub normed: &'a Buffer,
    /// Logits of the drafter's own head, where it has one.
    pub logits: Option<&'a Buffer>,
}

impl FeatureDrafter {
    /// A drafter by this network from these taps, whose attention is that of the only layer kind that was described. Its
    /// chains have `default_tokens` tokens where the user asked for no number, and `tokens` at the most.
    ///
    /// # Errors
    /// No kernel for it, no memory.
    pub fn new(
        context: &LoadContext<'_>,
        network: FeatureNetwork,
        taps: TapSpec,
        default_tokens: u32,
        tokens: u32,
    ) -> Result<Self, NnError> {
        let device = context.device;
        let [attention] = context.attention else {
            return Err(NnError::Shape(format!(
                "{} attention kernels for a drafter of one layer",
                context.attention.len()
            )));
        };
        let shape = network.shape;
        let hidden = shape.hidden_size;
        let sequences = context.max_sequences.max(1);
        let tree_rows = sequences * (context.tree_nodes + 1);
        let rows = context.max_rows.max(tree_rows);
        let chains = Chains::new(device, sequences, tokens)?;
        let words = |rows: u32, width: u32| u64::from(rows) * u64::from(width) * 4;
        let kv_row = u64::from(shape.kv_heads) * u64::from(shape.head_dim);
        let cache = u64::from(context.pool_pages) * u64::from(context.page_size) * kv_row * context.kv_dtype.bytes();
        let tapped = network.fuse.as_ref().map_or(hidden, |fuse| fuse.cols);
        let (logits, target_ids) = match &network.head {
            FeatureHead::Target => (None, None),
            FeatureHead::Own { weight, target_ids } => (
                Some(device.alloc(words(sequences, weight.rows), "draft logits")?),
                target_ids.as_ref().map(|ids| device.upload(ids, "target ids of the draft vocabulary")).transpose()?,
            ),
        };
        let memory = Memory {
            rows,
            k_cache: device.alloc(cache, "draft key cache")?,
            v_cache: device.alloc(cache, "draft value cache")?,
            tapped: device.alloc(words(rows, tapped), "draft taps")?,
            tapped_rows: device.alloc(words(rows, 1), "draft tap rows")?,
            features: device.alloc(words(rows, hidden), "draft features")?,
            ids: device.alloc(words(rows, 1), "draft context ids")?,
            positions: device.alloc(words(rows, 1), "draft context positions")?,
            embedded: device.alloc(words(rows, hidden), "draft embeddings")?,
            part: device.alloc(words(rows, hidden), "draft normed input")?,
            wide: device.alloc(words(rows, 2 * hidden), "draft layer input")?,
            hidden: device.alloc(words(rows, hidden), "draft hidden states")?,
            normed: device.alloc(words(tree_rows, hidden), "draft normed states")?,
            zeros: device.upload(&vec![0f32; hidden as usize], "draft zeros")?,
            logits,
            target_ids,
            draft_ids: device.alloc(words(sequences, 1), "draft vocabulary ids")?,
            chain_positions: device.alloc(words(chains.stride(), tokens), "draft positions")?,
            layer: LayerScratch::new(device, &shape, rows, context.config.model.dtype)?,
        };
        let own_vocab = match &network.head {
            FeatureHead::Target => None,
            FeatureHead::Own { weight, .. } => Some(weight.rows),
        };
        let trees = match &attention.tree {
            Some(kernel) if context.tree_nodes > 0 => {
                let memory = TreeMemory::new(device, sequences, context.tree_nodes, hidden, own_vocab)?;
                Some((Arc::clone(kernel), memory))
            }
            _ => None,
        };
        Ok(Self {
            kept: RowStore::new(device, hidden, sequences)?,
            kernel: Arc::clone(&attention.kernel),
            trees,
            target_vocab: context.target.vocab_size,
            network,
            device: device.clone(),
            chains,
            taps,
            default_tokens,
            page_size: context.page_size,
            pool_pages: context.pool_pages,
            memory,
        })
    }

    /// What the last pass left behind.
    #[must_use]
    pub fn stages(&self) -> FeatureStages<'_> {
        let memory = &self.memory;
        FeatureStages {
            features: &memory.features,
            hidden: &memory.hidden,
            normed: &memory.normed,
            logits: memory.logits.as_ref(),
        }
    }

    pub(super) fn pages<'a>(&self, pages: &'a [i32], tokens: u32) -> Result<&'a [i32], ProposerError> {
        let needed = tokens.div_ceil(self.page_size) as usize;
        pages.get(..needed).ok_or_else(|| {
            ProposerError::Unsupported(format!("{tokens} tokens need {needed} pages, the sequence has {}", pages.len()))
        })
    }

    fn norm<'a>(&self, weight: &'a Vector) -> Norm<'a> {
        Norm { weight, eps: self.network.shape.eps }
    }

    pub(super) fn attention<'a>(&'a self, kernel: &'a dyn AttentionKernel, plan: &'a Plan) -> LayerAttention<'a> {
        let (k_cache, v_cache) = (&self.memory.k_cache, &self.memory.v_cache);
        LayerAttention { kernel, plan, k_cache, v_cache }
    }

    /// Records the embeddings of the tokens behind rows at these positions.
    pub(super) fn embed(
        &self,
        commands: &mut Commands,
        target: &dyn TargetServices,
        ids: BufferSlice<'_>,
        positions: &[u32],
    ) -> Result<(), ProposerError> {
        let (memory, rows) = (&self.memory, positions.len() as u32);
        target.embed(commands, ids, rows, memory.embedded.whole())?;
        if self.network.zero_first {
            let width = self.network.shape.hidden_size;
            for (row, _) in (0..).zip(positions).filter(|(_, position)| **position == 0) {
                let (zeros, out) = (memory.zeros.whole(), memory.embedded.whole());
                // The rows as one long row, of which one part becomes zeros.
                ops::copy_columns(commands, zeros, width, 1, out, rows * width, row * width)?;
            }
        }
        Ok(())
    }

    /// Records what the layer begins with, for `rows` embeddings and hidden states; the residual stream is in `hidden`.
    pub(super) fn enter<'a>(
        &'a self,
        commands: &mut Commands,
        features: &Buffer,
        rows: u32,
    ) -> Result<BufferSlice<'a>, NnError> {
        let memory = &self.memory;
        let width = self.network.shape.hidden_size;
        let (embedding_norm, feature_norm) = match &self.network.entry {
            FeatureEntry::Project { embedding_norm, feature_norm, .. } => {
                (embedding_norm.as_ref(), feature_norm.as_ref())
            }
            FeatureEntry::Beside { embedding_norm, feature_norm, .. } => (Some(embedding_norm), Some(feature_norm)),
        };
        for (x, norm, offset) in [(&memory.embedded, embedding_norm, 0), (features, feature_norm, width)] {
            let part = match norm {
                Some(weight) => {
                    ops::rms_norm(commands, x.whole(), self.norm(weight), rows, memory.part.whole())?;
                    &memory.part
                }
                None => x,
            };
            ops::copy_columns(commands, part.whole(), width, rows, memory.wide.whole(), 2 * width, offset)?;
        }
        match &self.network.entry {
            FeatureEntry::Project { weight, bias, .. } => {
                let (x, out, bias) = (memory.wide.whole(), memory.hidden.whole(), bias.as_ref());
                ops::linear(commands, &LinearCall { x, rows, weight, norm: None, bias, out, accumulate: false })?;
                Ok(memory.hidden.whole())
            }
            FeatureEntry::Beside { residual_normed, .. } => {
                // The normed hidden states are what `part` holds now.
                let residual = if *residual_normed { Some(&memory.part) } else { Some(features) };
                // A chain's own output lies there already.
                let elsewhere = residual.filter(|from| !std::ptr::eq(*from, &memory.hidden));
                if let Some(from) = elsewhere {
                    ops::copy_columns(commands, from.whole(), width, rows, memory.hidden.whole(), width, 0)?;
                }
                Ok(memory.wide.whole())
            }
        }
    }

    /// Records the final norm of the layer's outputs, and answers what the head takes.
    pub(super) fn normed(&self, commands: &mut Commands, rows: u32) -> Result<&Buffer, NnError> {
        let memory = &self.memory;
        let Some(weight) = &self.network.norm else { return Ok(&memory.hidden) };
        ops::rms_norm(commands, memory.hidden.whole(), self.norm(weight), rows, memory.normed.whole())?;
        Ok(&memory.normed)
    }

    /// Records the most likely id behind each of the layer's outputs.
    fn choose(
        &self,
        commands: &mut Commands,
        target: &dyn TargetServices,
        rows: u32,
        ids: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        let memory = &self.memory;
        let hidden = self.normed(commands, rows)?;
        let (FeatureHead::Own { weight, .. }, Some(logits)) = (&self.network.head, &memory.logits) else {
            return target.head_argmax(commands, hidden.whole(), rows, 0, ids);
        };
        let (x, out) = (hidden.whole(), logits.whole());
        ops::linear(commands, &LinearCall { x, rows, weight, norm: None, bias: None, out, accumulate: false })?;
        match &memory.target_ids {
            None => ops::argmax(commands, out, 0..rows, weight.rows, ids)?,
            Some(target_ids) => {
                let draft_ids = memory.draft_ids.whole();
                ops::argmax(commands, out, 0..rows, weight.rows, draft_ids)?;
                ops::gather_ids(commands, target_ids.whole(), draft_ids, rows, ids)?;
            }
        }
        Ok(())
    }
}

impl Drafter for FeatureDrafter {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        self.chains.tokens()
    }

    fn default_tokens(&self) -> u32 {
        self.default_tokens
    }

    fn reuse(&self) -> PrefixReuse {
        PrefixReuse::AllButTheLastPage
    }

    /// Drafts a chain for each sequence, all on the device; or a tree, where one is wanted and there is a kernel for it.
    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        let sequences = context.sequences;
        // Nothing can be drafted for who was not committed up to the anchor.
        let width = |one: &DraftSequence<'_>| match self.kept.position(one.id) {
            Some(position) if position as usize + 2 == one.tokens.len() => one.width.min(self.chains.tokens()),
            _ => 0,
        };
        let counts: Vec<u32> = sequences.iter().map(width).collect();
        let order = ChainOrder::new(counts.clone());
        if order.longest() == 0 {
            return Ok(order.nothing());
        }
        if let (Some(wish), Some((kernel, memory))) = (context.tree, &self.trees) {
            return self.propose_trees(context, &order, &counts, wish, kernel.as_ref(), memory);
        }
        self.chains.begin(sequences, &order)?;
        let memory = &self.memory;
        let stride = self.chains.stride();
        let mut positions = vec![0; (stride * order.longest()) as usize];
        let mut batches = Vec::new();
        for pass in 0..order.longest() {
            let mut batch = BatchLayout::new(self.page_size, self.pool_pages);
            for (row, place) in (0..order.rows_beyond(pass)).zip(order.rows()) {
                // The first pass is that of the row before the anchor.
                let length = sequences[*place].tokens.len() as u32 - 1 + pass;
                positions[(pass * stride + row) as usize] = length - 1;
                batch.push(1, length, self.pages(sequences[*place].pages, length)?);
            }
            batches.push(batch);
        }
        self.device.write(&memory.chain_positions, 0, &positions)?;

        let commands = &mut *context.commands;
        let drafted: Vec<u64> = order.rows().iter().map(|place| sequences[*place].id).collect();
        self.kept.gather(commands, &drafted, memory.features.whole())?;
        for (pass, batch) in (0..).zip(&batches) {
            let rows = batch.rows();
            let features = match (pass, self.network.next) {
                (0, _) => &memory.features,
                (_, NextFeature::Output) => &memory.hidden,
                (_, NextFeature::Normed) => &memory.normed,
            };
            let plan = self.kernel.plan(batch)?;
            let first = pass * stride;
            let row_positions = &positions[first as usize..(first + rows) as usize];
            self.embed(commands, context.target, self.chains.column(pass)?, row_positions)?;
            let input = self.enter(commands, features, rows)?;
            let at = memory.chain_positions.slice(u64::from(first) * 4, u64::from(stride) * 4)?;
            let at = Rows { count: rows, positions: at, rope: &self.network.rope };
            let attention = self.attention(self.kernel.as_ref(), &plan);
            self.network.layer.forward_from(commands, input, &memory.hidden, at, &attention, &memory.layer)?;
            self.choose(commands, context.target, rows, self.chains.column(pass + 1)?)?;
        }
        Ok(self.chains.finish(commands, order)?)
    }

    /// Writes the keys and values of what was committed, and keeps the last hidden state of each sequence.
    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        let taps =
            outcome.taps.ok_or_else(|| ProposerError::Unsupported("the target's hidden states are missing".into()))?;
        let rows: u32 = outcome.sequences.iter().map(CommittedRows::count).sum();
        if rows == 0 {
            return Ok(());
        }
        if rows > self.memory.rows {
            let most = self.memory.rows;
            return Err(ProposerError::Unsupported(format!("{rows} rows committed at once, at most {most}")));
        }
        let mut batch = BatchLayout::new(self.page_size, self.pool_pages);
        let (mut ids, mut positions, mut from, mut last) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for committed in outcome.sequences.iter().filter(|committed| committed.count() > 0) {
            let length = committed.position + committed.count();
            let next = committed.tokens.get(committed.position as usize + 1..=length as usize).ok_or_else(|| {
                let known = committed.tokens.len();
                ProposerError::Unsupported(format!("{length} positions committed, but only {known} tokens are known"))
            })?;
            batch.push(committed.count(), length, self.pages(committed.pages, length)?);
            ids.extend_from_slice(next);
            positions.extend(committed.position..length);
            from.extend_from_slice(committed.rows);
            last.push(NewRow { sequence: committed.id, row: ids.len() as u32 - 1, position: length - 1 });
        }
        let memory = &self.memory;
        self.device.write(&memory.ids, 0, &ids)?;
        self.device.write(&memory.positions, 0, &positions)?;
        let commands = &mut *outcome.commands;
        let tapped = if from.iter().zip(0..).all(|(row, place)| *row == place) {
            taps
        } else {
            self.device.write(&memory.tapped_rows, 0, &from)?;
            let width = self.network.fuse.as_ref().map_or(self.network.shape.hidden_size, |fuse| fuse.cols);
            ops::gather_rows(commands, taps.whole(), width, memory.tapped_rows.whole(), rows, memory.tapped.whole())?;
            &memory.tapped
        };
        let features = match &self.network.fuse {
            Some(weight) => {
                let (x, out) = (tapped.whole(), memory.features.whole());
                ops::linear(commands, &LinearCall { x, rows, weight, norm: None, bias: None, out, accumulate: false })?;
                &memory.features
            }
            None => tapped,
        };
        let plan = self.kernel.plan(&batch)?;
        self.embed(commands, outcome.target, memory.ids.whole(), &positions)?;
        let input = self.enter(commands, features, rows)?;
        let at = Rows { count: rows, positions: memory.positions.whole(), rope: &self.network.rope };
        self.network.layer.store(commands, input, at, &self.attention(self.kernel.as_ref(), &plan), &memory.layer)?;
        Ok(self.kept.put(commands, features.whole(), &last)?)
    }

    fn forget(&mut self, sequence: u64) {
        self.kept.forget(sequence);
    }
}
