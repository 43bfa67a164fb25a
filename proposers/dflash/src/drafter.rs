use std::sync::Arc;

use polyattn_api::{
    AttentionKernel, BackendError, BatchLayout, Buffer, Candidate, Commands, CommittedRows, DType, Device, Draft,
    Drafter, LoadContext, Marginals, Outcome, Plan, PrefixReuse, Proposal, ProposeContext, ProposerError, Sampling,
    TapSpec, TreeWish,
};
use polyattn_nn::{
    NnError, WeightLoader,
    layer::{DecoderLayer, LayerAttention, LayerScratch, LayerShape, Rows},
    load::{Checkpoint, LayerWeight},
    ops::{self, LinearCall, Matrix, Norm, RopeCall, RopeTable, Vector},
};

use crate::DFlashConfig;

/// Tokens verified a step on a GPU where the user asked for no number: the fastest width of the trained drafter on an
/// H100, where a few more rows of the target cost little.
const DEFAULT_TOKENS: u32 = 7;

/// The same on the CPU, where each row of the target costs arithmetic: the fastest on two cores. Both are measured with
/// `polyattn bench generate`, see `tests/bench/results`.
const DEFAULT_TOKENS_ON_CPU: u32 = 3;

/// A loaded DFlash drafter.
#[derive(Debug)]
pub struct DFlashDrafter {
    config: DFlashConfig,
    device: Device,
    taps: TapSpec,
    shape: LayerShape,
    fc: Matrix,
    hidden_norm: Vector,
    /// Keys' and values' projections of all layers, one below the other: context rows go through one product.
    context_kv: Matrix,
    context_bias: Option<Vector>,
    layers: Vec<DraftLayerState>,
    norm: Vector,
    rope: RopeTable,
    page_size: u32,
    pool_pages: u32,
    /// Of the target, whose head it borrows.
    vocab: u32,
    kernels: Vec<Arc<dyn AttentionKernel>>,
    memory: Memory,
}

#[derive(Debug)]
struct DraftLayerState {
    layer: DecoderLayer,
    /// The place of its kernel.
    kind: usize,
    k_cache: Buffer,
    v_cache: Buffer,
}

/// Memory of a step.
#[derive(Debug)]
struct Memory {
    max_rows: u32,
    features: Buffer,
    feature_rows: Buffer,
    fused: Buffer,
    context: Buffer,
    positions: Buffer,
    /// Blocks of a step at the most.
    max_blocks: u32,
    /// Ids of the blocks, one behind the other, and their positions.
    block: Buffer,
    block_positions: Buffer,
    hidden: Buffer,
    normed: Buffer,
    /// Which rows of the blocks the head sees, and the rows.
    head_places: Buffer,
    head_rows: Buffer,
    /// What the head finds for them, and where each id of a block comes from.
    best: Buffer,
    sources: Buffer,
    drafted: Buffer,
    layer: LayerScratch,
}

/// What the stages of a step left behind, for tests against an independent implementation.
#[derive(Debug)]
#[non_exhaustive]
pub struct Stages<'a> {
    /// `fc` of the rows committed last, before its norm, `[rows, hidden]` f32.
    pub fused: &'a Buffer,
    /// Caches of keys and of values, layer by layer, in the layout and format of the draft's kernels.
    pub caches: Vec<[&'a Buffer; 2]>,
    /// Output of the last layer for the block drafted last, `[block, hidden]` f32.
    pub hidden: &'a Buffer,
    /// The same behind the final norm.
    pub normed: &'a Buffer,
}

impl DFlashDrafter {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// A checkpoint that is broken or does not fit the target; a number of tokens it was not trained for; no memory.
    pub fn load(context: &LoadContext<'_>) -> Result<Self, ProposerError> {
        let path = context.checkpoint.ok_or(ProposerError::NoCheckpoint("dflash"))?;
        let config = DFlashConfig::open(path)?;
        config.check(context.target)?;
        if let Some(tokens) = context.num_speculative_tokens
            && tokens >= config.block_size
        {
            return Err(ProposerError::Unsupported(format!(
                "num_speculative_tokens is {tokens}, a block of {} drafts at most {}",
                config.block_size,
                config.block_size - 1
            )));
        }
        let checkpoint =
            Checkpoint::open(&config.folder).map_err(|error| ProposerError::Checkpoint(error.to_string()))?;
        let folder = config.folder.clone();
        Self::build(context, config, &checkpoint).map_err(|error| match error {
            NnError::Shape(message) => ProposerError::Checkpoint(format!("{}: {message}", folder.display())),
            error => from_nn(error),
        })
    }

    fn build(context: &LoadContext<'_>, config: DFlashConfig, checkpoint: &Checkpoint) -> Result<Self, NnError> {
        let device = context.device;
        let hidden = config.hidden_size;
        let features = config.target_layers.len() as u32 * hidden;
        let shape = LayerShape {
            hidden_size: hidden,
            query_heads: config.query_heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            intermediate_size: config.intermediate_size,
            eps: config.rms_norm_eps,
            pairing: config.rope.pairing,
            qkv_bias: config.attention_bias,
            output_bias: config.attention_bias,
            qk_norm: true,
        };
        let mut ignore = |_: u64| {};
        let mut loader = WeightLoader::new(checkpoint, device, &mut ignore);
        let name = |layer: usize, weight: LayerWeight| format!("layers.{layer}.{}", weight.hf_suffix());
        let layer_count = config.layers.len();

        let fc_name = ["fc.weight".to_owned()];
        let (fc_rows, fc_cols) = checkpoint.rows_and_columns(&fc_name[0])?;
        if (fc_rows, fc_cols) != (hidden as usize, features as usize) {
            return Err(NnError::Shape(format!(
                "fc.weight is [{fc_rows}, {fc_cols}], {} taps of a target {hidden} wide need [{hidden}, {features}]: \
                 the drafter belongs to another target",
                config.target_layers.len()
            )));
        }
        let held = loader.held_as(&fc_name[0])?;
        let fc = loader.matrix(&fc_name, features, held)?;
        let stacked = |weights: [LayerWeight; 2]| -> Vec<String> {
            (0..layer_count).flat_map(|layer| weights.map(|weight| name(layer, weight))).collect()
        };
        let context_kv = loader.matrix(&stacked([LayerWeight::Key, LayerWeight::Value]), hidden, held)?;
        let context_bias = if config.attention_bias {
            Some(loader.vector(&stacked([LayerWeight::KeyBias, LayerWeight::ValueBias]))?)
        } else {
            None
        };
        let kv_row = u64::from(config.kv_heads) * u64::from(config.head_dim);
        let cache_bytes =
            u64::from(context.pool_pages) * u64::from(context.page_size) * kv_row * context.kv_dtype.bytes();
        let mut layers = Vec::new();
        for (number, layer) in config.layers.iter().enumerate() {
            let kind = context.attention.iter().position(|attention| *attention.layer == *layer.kind());
            layers.push(DraftLayerState {
                layer: DecoderLayer::load(&mut loader, shape, |weight| name(number, weight))?,
                kind: kind.ok_or_else(|| NnError::Shape(format!("no kernel for layer kind '{}'", layer.kind())))?,
                k_cache: device.alloc(cache_bytes, &format!("draft key cache {number}"))?,
                v_cache: device.alloc(cache_bytes, &format!("draft value cache {number}"))?,
            });
        }
        let floats = |rows: u32, width: u64| u64::from(rows) * width * 4;
        let (max_rows, max_blocks) = (context.max_rows, context.max_sequences.max(1));
        let block = config.block_size * max_blocks;
        let memory = Memory {
            max_rows,
            max_blocks,
            features: device.alloc(floats(max_rows, u64::from(features)), "draft features")?,
            feature_rows: device.alloc(floats(max_rows, 1), "draft feature rows")?,
            fused: device.alloc(floats(max_rows, u64::from(hidden)), "draft fused features")?,
            context: device.alloc(floats(max_rows, layer_count as u64 * 2 * kv_row), "draft context")?,
            positions: device.alloc(floats(max_rows, 1), "draft context positions")?,
            block: device.alloc(floats(block, 1), "draft block")?,
            block_positions: device.alloc(floats(block, 1), "draft block positions")?,
            hidden: device.alloc(floats(block, u64::from(hidden)), "draft hidden states")?,
            normed: device.alloc(floats(block, u64::from(hidden)), "draft normed states")?,
            head_places: device.alloc(floats(block, 1), "draft head places")?,
            head_rows: device.alloc(floats(block, u64::from(hidden)), "draft head rows")?,
            best: device.alloc(floats(block, 1), "draft best ids")?,
            sources: device.alloc(floats(block, 1), "draft id sources")?,
            drafted: device.alloc(floats(block, 1), "drafted ids")?,
            layer: LayerScratch::new(device, &shape, block, context.config.model.dtype)?,
        };
        Ok(Self {
            taps: TapSpec::of_layers(config.target_layers.clone()),
            shape,
            fc,
            hidden_norm: loader.vector(&["hidden_norm.weight".to_owned()])?,
            context_kv,
            context_bias,
            layers,
            norm: loader.vector(&["norm.weight".to_owned()])?,
            rope: RopeTable::new(device, &config.rope.inv_freq(), context.pool_pages * context.page_size)?,
            page_size: context.page_size,
            pool_pages: context.pool_pages,
            vocab: context.target.vocab_size,
            kernels: context.attention.iter().map(|attention| Arc::clone(&attention.kernel)).collect(),
            memory,
            device: device.clone(),
            config,
        })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &DFlashConfig {
        &self.config
    }

    /// What the last step left behind.
    #[must_use]
    pub fn stages(&self) -> Stages<'_> {
        let memory = &self.memory;
        let caches = self.layers.iter().map(|layer| [&layer.k_cache, &layer.v_cache]).collect();
        Stages { fused: &memory.fused, caches, hidden: &memory.hidden, normed: &memory.normed }
    }

    fn plans(&self, batch: &BatchLayout) -> Result<Vec<Plan>, BackendError> {
        self.kernels.iter().map(|kernel| kernel.plan(batch)).collect()
    }

    fn pages<'a>(&self, pages: &'a [i32], tokens: u32) -> Result<&'a [i32], ProposerError> {
        let needed = tokens.div_ceil(self.page_size) as usize;
        pages.get(..needed).ok_or_else(|| {
            ProposerError::Unsupported(format!("{tokens} tokens need {needed} pages, the sequence has {}", pages.len()))
        })
    }

    /// Projects the features of committed rows into every layer's cache.
    fn inject(&mut self, outcome: &mut Outcome<'_>) -> Result<(), NnError> {
        let Some(taps) = outcome.taps else { return Err(NnError::Shape("dflash was given no taps".into())) };
        let commands = &mut *outcome.commands;
        let memory = &self.memory;
        let rows: u32 = outcome.sequences.iter().map(CommittedRows::count).sum();
        if rows > memory.max_rows {
            return Err(NnError::Shape(format!("{rows} rows committed at once, at most {}", memory.max_rows)));
        }
        let mut batch = BatchLayout::new(self.page_size, self.pool_pages);
        let mut positions = Vec::with_capacity(rows as usize);
        for committed @ CommittedRows { position, pages, .. } in outcome.sequences {
            let length = position + committed.count();
            batch.push(
                committed.count(),
                length,
                self.pages(pages, length).map_err(|error| NnError::Shape(error.to_string()))?,
            );
            positions.extend(*position..length);
        }
        self.device.write(&memory.positions, 0, &positions)?;
        let features = match outcome.sequences {
            [only] if only.is_contiguous() && only.rows.first() == Some(&0) => taps,
            several => {
                let from: Vec<u32> = several.iter().flat_map(|one| one.rows).copied().collect();
                self.device.write(&memory.feature_rows, 0, &from)?;
                let width = self.fc.cols;
                let (rows_of, to) = (memory.feature_rows.whole(), memory.features.whole());
                ops::gather_rows(commands, taps.whole(), width, rows_of, rows, to)?;
                &memory.features
            }
        };
        let mut linear = |x: &Buffer, weight: &Matrix, norm, bias, out: &Buffer| {
            let call = LinearCall { x: x.whole(), rows, weight, norm, bias, out: out.whole(), accumulate: false };
            ops::linear(commands, &call)
        };
        linear(features, &self.fc, None, None, &memory.fused)?;
        let norm = Norm { weight: &self.hidden_norm, eps: self.shape.eps };
        linear(&memory.fused, &self.context_kv, Some(norm), self.context_bias.as_ref(), &memory.context)?;

        let plans = self.plans(&batch)?;
        let half = self.shape.kv_heads * self.shape.head_dim;
        let stride = self.context_kv.rows;
        for (state, number) in self.layers.iter().zip(0..) {
            let offset = number * 2 * half;
            let (k_cache, v_cache) = (&state.k_cache, &state.v_cache);
            let kernel = self.kernels[state.kind].as_ref();
            LayerAttention { kernel, plan: &plans[state.kind], k_cache, v_cache }.rotate_and_store(
                commands,
                &RopeCall {
                    qkv: memory.context.whole(),
                    offset,
                    stride,
                    rows,
                    query_heads: 0,
                    kv_heads: self.shape.kv_heads,
                    head_dim: self.shape.head_dim,
                    parts: None,
                    q_norm: None,
                    k_norm: state.layer.key_norm(),
                    table: &self.rope,
                    pairing: self.shape.pairing,
                    positions: memory.positions.whole(),
                    q_out: memory.normed.whole(),
                    q_dtype: DType::F32,
                },
            )?;
        }
        Ok(())
    }

    /// Runs one block for each sequence and leaves their states, behind the final norm, in memory.
    fn run_blocks(&mut self, context: &mut ProposeContext<'_>) -> Result<(), NnError> {
        let commands = &mut *context.commands;
        let memory = &self.memory;
        let block = self.config.block_size;
        let blocks = context.sequences.len() as u32;
        if blocks > memory.max_blocks {
            return Err(NnError::Shape(format!("{blocks} sequences in a step, at most {}", memory.max_blocks)));
        }
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let mut batch = BatchLayout::new(self.page_size, self.pool_pages);
        for sequence in context.sequences {
            let Some(anchor) = sequence.tokens.last() else {
                return Err(NnError::Shape(format!("sequence {} has no tokens", sequence.id)));
            };
            let position = sequence.tokens.len() as u32 - 1;
            ids.push(*anchor);
            ids.resize(ids.len() + block as usize - 1, self.config.mask_token);
            positions.extend(position..position + block);
            let pages = self.pages(sequence.pages, position + block);
            batch.push(block, position + block, pages.map_err(|error| NnError::Shape(error.to_string()))?);
        }
        self.device.write(&memory.block, 0, &ids)?;
        self.device.write(&memory.block_positions, 0, &positions)?;
        let plans = self.plans(&batch)?;
        let rows = blocks * block;
        context.target.embed(commands, memory.block.whole(), rows, memory.hidden.whole()).map_err(lent)?;
        for state in &self.layers {
            let attention = LayerAttention {
                kernel: self.kernels[state.kind].as_ref(),
                plan: &plans[state.kind],
                k_cache: &state.k_cache,
                v_cache: &state.v_cache,
            };
            let rows = Rows { count: rows, positions: memory.block_positions.whole(), rope: &self.rope };
            state.layer.forward(commands, &memory.hidden, rows, &attention, &memory.layer)?;
        }
        let norm = Norm { weight: &self.norm, eps: self.shape.eps };
        Ok(ops::rms_norm(commands, memory.hidden.whole(), norm, rows, memory.normed.whole())?)
    }

    /// The most likely id of each wanted slot, on the device. Rows beyond what is verified shape the block, but nobody
    /// asks for their tokens.
    fn most_likely(&self, context: &mut ProposeContext<'_>, widths: &[u32]) -> Result<Proposal, NnError> {
        let commands = &mut *context.commands;
        let (memory, block) = (&self.memory, self.config.block_size);
        if let [width] = *widths {
            // The masks were read by the embedding, so the drafted ids may take their place behind the anchor.
            let (hidden, ids) = (memory.normed.whole(), memory.block.whole());
            context.target.head_argmax(commands, hidden, width + 1, 1, ids).map_err(lent)?;
            return Ok(Proposal::Device { ids: memory.block.clone(), stride: block, counts: vec![width] });
        }
        let rows = self.gather_head_rows(commands, widths)?;
        context.target.head_argmax(commands, memory.head_rows.whole(), rows, 0, memory.best.whole()).map_err(lent)?;
        let (mut sources, mut next) = (Vec::new(), 0);
        for (sequence, width) in context.sequences.iter().zip(widths) {
            sources.extend(sequence.tokens.last().map(|anchor| ops::given_id(*anchor)));
            sources.extend(next..next + width);
            sources.resize(sources.len().next_multiple_of(block as usize), ops::given_id(0));
            next += width;
        }
        self.device.write(&memory.sources, 0, &sources)?;
        let (best, from, to) = (memory.best.whole(), memory.sources.whole(), memory.drafted.whole());
        ops::gather_ids(commands, best, from, sources.len() as u32, to)?;
        Ok(Proposal::Device { ids: memory.drafted.clone(), stride: block, counts: widths.to_vec() })
    }

    /// The states of the slots that are wanted, one behind the other. Answers how many.
    fn gather_head_rows(&self, commands: &mut Commands, widths: &[u32]) -> Result<u32, NnError> {
        let (memory, block) = (&self.memory, self.config.block_size);
        let places: Vec<u32> = (0..)
            .zip(widths)
            .flat_map(|(sequence, width)| (1..=*width).map(move |slot| sequence * block + slot))
            .collect();
        self.device.write(&memory.head_places, 0, &places)?;
        let (from, places_of, to) = (memory.normed.whole(), memory.head_places.whole(), memory.head_rows.whole());
        ops::gather_rows(commands, from, self.shape.hidden_size, places_of, places.len() as u32, to)?;
        Ok(places.len() as u32)
    }

    /// What the head thinks likely in each wanted slot.
    fn marginals(
        &self,
        context: &mut ProposeContext<'_>,
        widths: &[u32],
        tree: TreeWish<'_>,
    ) -> Result<Vec<Marginals>, NnError> {
        let commands = &mut *context.commands;
        let rows = self.gather_head_rows(commands, widths)?;
        let k = tree.candidates.clamp(1, self.vocab);
        let bytes = u64::from(rows * k).max(1) * 4;
        let ids = self.device.alloc(bytes, "candidates")?;
        let logs = self.device.alloc(bytes, "log-probabilities of candidates")?;
        let hidden = self.memory.head_rows.whole();
        context.target.head_top_k(commands, hidden, rows, k, ids.whole(), logs.whole()).map_err(lent)?;
        let (ids, logs) = (commands.read_back(ids.whole())?, commands.read_back(logs.whole())?);
        commands.flush()?;
        let (ids, logs) = (ids.wait_as::<u32>()?, logs.wait_as::<f32>()?);
        let mut slots = ids.chunks(k as usize).zip(logs.chunks(k as usize)).map(|(ids, logs)| {
            let of = |(id, log): (&u32, &f32)| Candidate { id: *id, log_probability: f64::from(*log) };
            ids.iter().zip(logs).filter(|(id, _)| **id < self.vocab).map(of).collect()
        });
        Ok(widths.iter().map(|width| Marginals { slots: slots.by_ref().take(*width as usize).collect() }).collect())
    }

    /// Tokens drawn from the head's distribution in each wanted slot, with that distribution; the most likely where a
    /// sequence wants those.
    fn drawn(&self, context: &mut ProposeContext<'_>, widths: &[u32]) -> Result<Vec<Draft>, NnError> {
        let commands = &mut *context.commands;
        let rows = self.gather_head_rows(commands, widths)?;
        let logits = self.device.alloc(u64::from(rows) * u64::from(self.vocab) * 4, "draft logits")?;
        context.target.head_logits(commands, self.memory.head_rows.whole(), rows, logits.whole()).map_err(lent)?;
        let logits = commands.read_back(logits.whole())?;
        commands.flush()?;
        let logits = logits.wait_as::<f32>()?;
        let mut rows = logits.chunks(self.vocab as usize);
        let drafts = context.sequences.iter().zip(widths).map(|(sequence, width)| {
            let likeliest = Sampling::default();
            let sampling = sequence.sampling.unwrap_or(&likeliest);
            let mut draft = Draft::default();
            for (row, slot) in rows.by_ref().take(*width as usize).zip(0..) {
                let from = sampling.distribution(row, &[sequence.tokens]);
                draft.tokens.push(from.draw(sequence.noise(slot)));
                draft.drawn_from.extend(sequence.sampling.is_some().then_some(from));
            }
            draft
        });
        Ok(drafts.collect())
    }

    fn draft(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, NnError> {
        let widths: Vec<u32> =
            context.sequences.iter().map(|sequence| sequence.width.min(self.config.block_size - 1)).collect();
        if widths.iter().all(|width| *width == 0) {
            return Ok(Proposal::Host(vec![Draft::default(); widths.len()]));
        }
        self.run_blocks(context)?;
        match context.tree {
            Some(tree) => Ok(Proposal::Marginals(self.marginals(context, &widths, tree)?)),
            None if context.sequences.iter().any(|sequence| sequence.sampling.is_some()) => {
                Ok(Proposal::Host(self.drawn(context, &widths)?))
            }
            None => self.most_likely(context, &widths),
        }
    }
}

impl Drafter for DFlashDrafter {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        self.config.block_size - 1
    }

    fn default_tokens(&self) -> u32 {
        self.max_tokens().min(if self.device.is_cpu() { DEFAULT_TOKENS_ON_CPU } else { DEFAULT_TOKENS })
    }

    fn reuse(&self) -> PrefixReuse {
        PrefixReuse::Pages
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        self.draft(context).map_err(from_nn)
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        self.inject(outcome).map_err(from_nn)
    }
}

fn lent(error: ProposerError) -> NnError {
    NnError::Shape(error.to_string())
}

fn from_nn(error: NnError) -> ProposerError {
    match error {
        NnError::Backend(error) => error.into(),
        NnError::Device(error) => error.into(),
        NnError::Shape(message) => ProposerError::Mismatch(message),
        other => ProposerError::Checkpoint(other.to_string()),
    }
}
