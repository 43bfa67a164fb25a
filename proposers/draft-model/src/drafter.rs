use std::{collections::HashMap, sync::Arc};

use polyattn_api::{
    AttentionKernel, BatchLayout, Buffer, BufferSlice, Commands, Device, DraftSequence, Drafter, LoadContext, Outcome,
    Plan, PrefixReuse, Proposal, ProposeContext, ProposerError, TapSpec,
};
use polyattn_nn::{
    NnError,
    decoder::{Decoder, DecoderScratch},
    drafting::{ChainOrder, Chains},
    layer::LayerAttention,
    load::ModelSource,
    ops,
};

/// Tokens of a step at the most.
const MAX_TOKENS: u32 = 16;

/// Tokens of a step where the user asked for no number: each costs a pass of the draft model.
const DEFAULT_TOKENS: u32 = 4;

/// A loaded draft model with its cache.
#[derive(Debug)]
pub struct ModelDrafter {
    device: Device,
    taps: TapSpec,
    decoder: Decoder,
    /// The place of each layer's kernel.
    kinds: Vec<usize>,
    kernels: Vec<Arc<dyn AttentionKernel>>,
    cache: Vec<(Buffer, Buffer)>,
    page_size: u32,
    pool_pages: u32,
    max_tokens: u32,
    /// Tokens of each sequence whose keys and values are in the cache.
    seen: HashMap<u64, u32>,
    chains: Chains,
    memory: Memory,
}

/// Memory of a pass.
#[derive(Debug)]
struct Memory {
    rows: u32,
    /// What was committed and what is drafted next may be of one recording, before which both are written.
    committed: Feed,
    drafted: Feed,
    last_rows: Buffer,
    chain_positions: Buffer,
    last_hidden: Buffer,
    logits: Buffer,
    scratch: DecoderScratch,
}

/// Rows that the host knows, on their way to the device.
#[derive(Debug)]
struct Feed {
    ids: Buffer,
    positions: Buffer,
}

/// A run of tokens of one sequence.
struct Part<'a> {
    tokens: &'a [u32],
    position: u32,
    pages: &'a [i32],
}

impl ModelDrafter {
    pub(crate) fn load(context: &LoadContext<'_>, source: &ModelSource) -> Result<Self, ProposerError> {
        let max_tokens = match context.num_speculative_tokens {
            Some(tokens) if tokens == 0 || tokens > MAX_TOKENS => {
                return Err(ProposerError::Unsupported(format!(
                    "num_speculative_tokens is {tokens}, a draft model drafts 1 to {MAX_TOKENS}"
                )));
            }
            Some(tokens) => tokens,
            None => MAX_TOKENS,
        };
        Ok(Self::build(context, source, max_tokens)?)
    }

    fn build(context: &LoadContext<'_>, source: &ModelSource, max_tokens: u32) -> Result<Self, NnError> {
        let device = context.device;
        let (layers, places) = source.attention_layers()?;
        let kernel = |layer: &polyattn_api::LayerConfig| {
            let found = context.attention.iter().find(|attention| *attention.layer == *layer.name);
            let kernel = found.map(|attention| Arc::clone(&attention.kernel));
            kernel.ok_or_else(|| NnError::Shape(format!("no kernel for layer kind '{}'", layer.name)))
        };
        let kernels = layers.iter().map(kernel).collect::<Result<Vec<_>, _>>()?;
        let slots = context.pool_pages * context.page_size;
        let decoder = Decoder::load(source, device, slots, &mut |_| {})?;
        let config = decoder.config();
        let cache = decoder.cache(device, u64::from(slots), context.kv_dtype, "draft")?;
        // Beside the rows of a pass of the target's, each sequence may have a page of tokens that waits to be run.
        let rows = context.max_rows + context.max_sequences * context.page_size;
        let words = |count: u32| u64::from(count) * 4;
        let sequences = context.max_sequences;
        let hidden = words(sequences) * u64::from(config.hidden_size);
        let feed = || -> Result<Feed, NnError> {
            let ids = device.alloc(words(rows), "draft ids")?;
            Ok(Feed { ids, positions: device.alloc(words(rows), "draft positions")? })
        };
        let chains = Chains::new(device, sequences, max_tokens)?;
        let memory = Memory {
            rows,
            committed: feed()?,
            drafted: feed()?,
            last_rows: device.alloc(words(sequences), "draft last rows")?,
            chain_positions: device.alloc(words(chains.stride()) * u64::from(max_tokens), "draft chain positions")?,
            last_hidden: device.alloc(hidden, "draft last hidden states")?,
            logits: device.alloc(words(sequences) * u64::from(config.vocab_size), "draft logits")?,
            scratch: decoder.scratch(device, rows, context.config.model.dtype, context.moe)?,
        };
        Ok(Self {
            taps: TapSpec::default(),
            kinds: places,
            kernels,
            cache,
            page_size: context.page_size,
            pool_pages: context.pool_pages,
            max_tokens,
            seen: HashMap::new(),
            chains,
            memory,
            decoder,
            device: device.clone(),
        })
    }

    fn pages<'a>(&self, pages: &'a [i32], tokens: u32) -> Result<&'a [i32], NnError> {
        let needed = tokens.div_ceil(self.page_size) as usize;
        pages.get(..needed).ok_or_else(|| {
            NnError::Shape(format!("{tokens} tokens need {needed} pages, the sequence has {}", pages.len()))
        })
    }

    /// Records a pass over `rows` ids of a batch.
    fn pass(
        &self,
        commands: &mut Commands,
        batch: &BatchLayout,
        ids: BufferSlice<'_>,
        positions: BufferSlice<'_>,
    ) -> Result<(), NnError> {
        let plans = self.kernels.iter().map(|kernel| kernel.plan(batch)).collect::<Result<Vec<Plan>, _>>()?;
        let attention = |layer: u32| {
            let kind = self.kinds[layer as usize];
            let (k_cache, v_cache) = &self.cache[layer as usize];
            LayerAttention { kernel: self.kernels[kind].as_ref(), plan: &plans[kind], k_cache, v_cache }
        };
        self.decoder.forward(commands, ids, batch.rows(), positions, attention, None, &self.memory.scratch)
    }

    /// Records a pass over tokens that the host knows.
    fn run(&self, commands: &mut Commands, feed: &Feed, parts: &[Part<'_>]) -> Result<(), NnError> {
        let mut batch = BatchLayout::new(self.page_size, self.pool_pages);
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        for Part { tokens, position, pages } in parts {
            let length = position + tokens.len() as u32;
            batch.push(tokens.len() as u32, length, self.pages(pages, length)?);
            ids.extend_from_slice(tokens);
            positions.extend(*position..length);
        }
        if ids.len() > self.memory.rows as usize {
            return Err(NnError::Shape(format!("{} rows in one pass, at most {}", ids.len(), self.memory.rows)));
        }
        self.device.write(&feed.ids, 0, &ids)?;
        self.device.write(&feed.positions, 0, &positions)?;
        self.pass(commands, &batch, feed.ids.whole(), feed.positions.whole())
    }

    /// Records the likeliest ids behind `rows` hidden states.
    fn choose(&self, commands: &mut Commands, hidden: &Buffer, rows: u32, ids: BufferSlice<'_>) -> Result<(), NnError> {
        let logits = self.memory.logits.whole();
        self.decoder.logits(commands, hidden.whole(), rows, false, logits)?;
        Ok(ops::argmax(commands, logits, 0..rows, self.decoder.config().vocab_size, ids)?)
    }

    fn draft(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, NnError> {
        // A sequence without an anchor has nothing to draft behind.
        let wanted = |sequence: &DraftSequence<'_>| if sequence.tokens.is_empty() { 0 } else { sequence.width };
        let counts = context.sequences.iter().map(|sequence| wanted(sequence).min(self.max_tokens)).collect();
        let order = ChainOrder::new(counts);
        if order.longest() == 0 {
            return Ok(order.nothing());
        }
        let lent = |error: ProposerError| NnError::Shape(error.to_string());
        self.chains.begin(context.sequences, &order).map_err(lent)?;
        let commands = &mut *context.commands;
        let memory = &self.memory;
        let rows: Vec<_> = order.rows().iter().map(|place| &context.sequences[*place]).collect();

        // What was committed since the last draft, the anchor at its end.
        let parts: Vec<Part<'_>> = rows
            .iter()
            .map(|sequence| {
                // The anchor runs in any case, for what comes behind it.
                let seen = self.seen.get(&sequence.id).copied().unwrap_or(0).min(sequence.tokens.len() as u32 - 1);
                let tokens = sequence.tokens.get(seen as usize..).unwrap_or(&[]);
                Part { tokens, position: seen, pages: sequence.pages }
            })
            .collect();
        self.run(commands, &memory.drafted, &parts)?;
        let mut last_rows: Vec<u32> = Vec::with_capacity(parts.len());
        for part in &parts {
            last_rows.push(last_rows.last().map_or(0, |last| last + 1) + part.tokens.len() as u32 - 1);
        }
        self.device.write(&memory.last_rows, 0, &last_rows)?;
        let width = self.decoder.config().hidden_size;
        let (hidden, indices) = (memory.scratch.hidden.whole(), memory.last_rows.whole());
        ops::gather_rows(commands, hidden, width, indices, rows.len() as u32, memory.last_hidden.whole())?;
        self.choose(commands, &memory.last_hidden, rows.len() as u32, self.chains.column(1)?)?;

        // Each further token from the one before, in as many rows as want it.
        let stride = self.chains.stride();
        let mut positions = vec![0; (stride * order.longest()) as usize];
        for pass in 1..order.longest() {
            for (row, sequence) in rows.iter().enumerate() {
                positions[(pass * stride) as usize + row] = sequence.tokens.len() as u32 - 1 + pass;
            }
        }
        self.device.write(&memory.chain_positions, 0, &positions)?;
        for pass in 1..order.longest() {
            let count = order.rows_beyond(pass);
            let mut batch = BatchLayout::new(self.page_size, self.pool_pages);
            for sequence in &rows[..count as usize] {
                let length = sequence.tokens.len() as u32 + pass;
                batch.push(1, length, self.pages(sequence.pages, length)?);
            }
            let bytes = u64::from(stride) * 4;
            let positions = memory.chain_positions.slice(u64::from(pass) * bytes, bytes)?;
            self.pass(commands, &batch, self.chains.column(pass)?, positions)?;
            self.choose(commands, &memory.scratch.hidden, count, self.chains.column(pass + 1)?)?;
        }
        for sequence in rows {
            self.seen.insert(sequence.id, sequence.tokens.len() as u32);
        }
        self.chains.finish(commands, order)
    }

    /// Runs committed tokens: those of a page that is full, as another sequence may go on from it, and those of a prompt.
    /// Others wait for the next draft's first pass.
    fn catch_up(&mut self, outcome: &mut Outcome<'_>) -> Result<(), NnError> {
        let mut parts = Vec::new();
        for sequence in outcome.sequences {
            let end = sequence.position + sequence.count();
            // Nothing known of it: what lies below was run for another sequence on the same pages.
            let seen = *self.seen.entry(sequence.id).or_insert(sequence.position);
            let full = end / self.page_size * self.page_size;
            let Some(tokens) = sequence.tokens.get(seen as usize..end as usize) else { continue };
            if seen < full {
                parts.push(Part { tokens, position: seen, pages: sequence.pages });
                self.seen.insert(sequence.id, end);
            }
        }
        if parts.is_empty() {
            return Ok(());
        }
        self.run(outcome.commands, &self.memory.committed, &parts)
    }
}

impl Drafter for ModelDrafter {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        self.max_tokens
    }

    fn default_tokens(&self) -> u32 {
        self.max_tokens.min(DEFAULT_TOKENS)
    }

    fn reuse(&self) -> PrefixReuse {
        PrefixReuse::Pages
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        Ok(self.draft(context)?)
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        Ok(self.catch_up(outcome)?)
    }

    fn forget(&mut self, sequence: u64) {
        self.seen.remove(&sequence);
    }
}
