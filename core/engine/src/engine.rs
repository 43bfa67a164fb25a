use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use polyattn_api::{
    AttentionConfig, AttentionKernel, BackendChoice, BackendName, CommittedRows, DraftAttention, DraftSequence,
    Drafter, EngineConfig, KernelConfig, KvCacheConfig, LayerConfig, LoadContext, ModelConfig, MoeConfig, Outcome,
    Phase, Proposal, ProposeContext, ProposerError, Registry, Resolution, Role, SpeculativeConfig, TargetFacts,
    WindowConfig, resolve,
};
use polyattn_device::{Commands, DType, Device, Readback};
use polyattn_nn::{
    decoder::Decoder,
    load::{DecoderConfig, LayerWeight, ModelSource, StoredType, WeightName},
};

use crate::{
    EngineError, PageAllocator, RecordOptions, Sampler, Sampling, Verified,
    attention::Kernels,
    record::Recorder,
    report::{AcceptanceCounts, Generation, StopReason},
    runner::{Head, Ids, Runner, RunnerSizes},
    verify::{verify_greedy, verify_sampled},
};

/// Tokens beyond the context that the pool has room for: a drafter's block reaches beyond what is emitted.
const BLOCK_ROOM: u32 = 128;

/// Dispatches after which the GPU starts on a step whose answer the host waits for: on an H100 recording one takes about
/// half as long as running it, so the GPU is never short of work.
const HAND_OVER: u64 = 48;

/// How an engine is set up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EngineOptions {
    /// The target's attention.
    pub attention: AttentionConfig,
    /// Other kernels.
    pub kernel: KernelConfig,
    /// Configurations of backends, by name; each is read by its backend.
    pub backend_config: BTreeMap<String, serde_json::Value>,
    /// Tokens a sequence can grow to; the model's context at the most, and 8,192 where unset.
    pub context: Option<u32>,
    /// Prompt tokens of one pass.
    pub prefill_chunk: u32,
    /// Tokens of a cache page.
    pub page_size: u32,
    /// Speculative decoding.
    pub speculative: Option<SpeculativeOptions>,
    /// Attention calls to write down.
    pub record: Option<RecordOptions>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            attention: AttentionConfig::default(),
            kernel: KernelConfig::default(),
            backend_config: BTreeMap::new(),
            context: None,
            prefill_chunk: 512,
            page_size: 16,
            speculative: None,
            record: None,
        }
    }
}

impl EngineOptions {
    /// With room for sequences of this many tokens.
    #[must_use]
    pub fn with_context(mut self, tokens: u32) -> Self {
        self.context = Some(tokens);
        self
    }

    /// With speculative decoding.
    #[must_use]
    pub fn with_speculative(mut self, speculative: Option<SpeculativeOptions>) -> Self {
        self.speculative = speculative;
        self
    }
}

/// Speculative decoding, as a user asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpeculativeOptions {
    /// The proposer's name.
    pub method: String,
    /// The draft's attention backend; automatically selected when unset.
    pub attention_backend: Option<BackendName>,
    /// The draft's attention backend for a layer kind of the draft, by the kind's name.
    pub attention_backend_per_kind: BTreeMap<String, BackendChoice>,
    /// The draft's mixture-of-experts backend; the target's when unset.
    pub moe_backend: Option<String>,
    /// Tokens verified a step; the proposer's own default when unset.
    pub num_speculative_tokens: Option<u32>,
    /// The draft model, a file or a folder.
    pub model: Option<PathBuf>,
}

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Ids of the prompt.
    pub prompt: Vec<u32>,
    /// New tokens at the most.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Ids that end the text; the model's own where `None`.
    pub stop: Option<Vec<u32>>,
}

impl Request {
    /// A greedy request that stops where the model does.
    #[must_use]
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self { prompt, max_tokens, sampling: Sampling::default(), stop: None }
    }
}

/// A model ready to generate, and perhaps a drafter.
#[derive(Debug)]
pub struct Engine {
    device: Device,
    config: EngineConfig,
    resolution: Resolution,
    model: DecoderConfig,
    weight_bytes: u64,
    context: u32,
    kernels: Kernels,
    runner: Runner,
    pages: PageAllocator,
    drafting: Option<Drafting>,
    recorder: Option<Arc<Recorder>>,
    next_sequence: u64,
}

#[derive(Debug)]
struct Drafting {
    drafter: Box<dyn Drafter>,
    name: &'static str,
    /// Tokens verified a step.
    width: u32,
}

/// A sequence under way.
#[derive(Debug, Default)]
struct Sequence {
    id: u64,
    tokens: Vec<u32>,
    pages: Vec<i32>,
}

impl Engine {
    /// Loads a model, resolves who serves it, and loads the drafter that `options` ask for. `progress` hears of the
    /// target's bytes read, of [`Checkpoint::stored_bytes`](polyattn_nn::load::Checkpoint::stored_bytes) in all.
    ///
    /// # Errors
    /// A model, drafter or configuration that does not fit; attention that nobody serves; no memory.
    pub fn load(
        source: &ModelSource,
        device: &Device,
        registry: &Registry,
        options: &EngineOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, EngineError> {
        let model = source.config.clone();
        if options.page_size == 0 || options.prefill_chunk == 0 {
            return Err(EngineError::Request("page size and prefill chunk must be at least 1".into()));
        }
        let context = options.context.unwrap_or(8192).min(model.context_length);
        let dtype = activation_dtype(source)?;
        let facts = TargetFacts::new(model.layers, model.hidden_size, model.vocab_size, model.context_length);
        let (layers, layer_kinds) = layer_kinds(source)?;
        let speculative = options.speculative.as_ref();
        let checkpoint = speculative.and_then(|speculative| speculative.model.as_deref());
        let proposer = speculative.and_then(|speculative| registry.proposer(&speculative.method));
        let draft = match (&proposer, checkpoint) {
            (Some(entry), Some(path)) => entry.proposer.describe(path, &facts)?,
            (Some(entry), None) if entry.proposer.requirements().checkpoint => {
                return Err(ProposerError::NoCheckpoint(entry.proposer.name()).into());
            }
            _ => None,
        };
        let config = EngineConfig {
            model: ModelConfig { dtype, layers },
            kv_cache: KvCacheConfig { dtype: None, page_size: Some(options.page_size) },
            attention: options.attention.clone(),
            kernel: options.kernel.clone(),
            backend_config: options.backend_config.clone(),
            speculative: speculative.map(|speculative| SpeculativeConfig {
                method: speculative.method.clone(),
                num_speculative_tokens: speculative.num_speculative_tokens,
                attention_backend: speculative.attention_backend.clone(),
                attention_backend_per_kind: speculative.attention_backend_per_kind.clone(),
                moe_backend: speculative.moe_backend.clone(),
                draft,
            }),
        };
        let resolution = resolve(&config, device.facts(), registry)?;

        let recorder = options.record.clone().map(Recorder::new).transpose()?.map(Arc::new);
        let mut kernels = Kernels::default();
        kernels.prepare(device, &resolution.target, options.page_size, recorder.as_ref())?;
        kernels.prepare(device, &resolution.draft, options.page_size, recorder.as_ref())?;

        let positions = context + BLOCK_ROOM;
        let decoder = Arc::new(Decoder::load(source, device, positions, progress)?);
        let pool_pages = positions.div_ceil(options.page_size);
        let rows = options.prefill_chunk.min(context);
        let drafting = match (&resolution.proposer, &resolution.draft_config, speculative) {
            (Some(entry), Some(draft_config), Some(speculative)) => {
                let attention: Vec<_> = kernels
                    .of(Role::Draft, Phase::Draft)
                    .map(|served| DraftAttention {
                        layer: Arc::clone(&served.problem().layer),
                        kernel: Arc::clone(served) as Arc<dyn AttentionKernel>,
                    })
                    .collect();
                let mut load = LoadContext::new(device, &facts, draft_config);
                load.checkpoint = checkpoint;
                load.attention = &attention;
                load.num_speculative_tokens = speculative.num_speculative_tokens;
                load.pool_pages = pool_pages;
                load.page_size = options.page_size;
                load.kv_dtype = draft_config.kv_cache.dtype.unwrap_or(draft_config.model.dtype.into());
                load.max_rows = rows.max(BLOCK_ROOM);
                let drafter = entry.load(&load)?;
                Some(Drafting::new(drafter, entry.proposer.name(), &facts, speculative.num_speculative_tokens)?)
            }
            _ => None,
        };

        let (head_rows, taps) = match &drafting {
            Some(drafting) => (drafting.drafter.max_tokens() + 1, drafting.drafter.taps().layers.clone()),
            None => (1, Vec::new()),
        };
        let sizes = RunnerSizes { rows: rows.max(head_rows), head_rows, pool_pages, page_size: options.page_size };
        let runner = Runner::new(
            device,
            Arc::clone(&decoder),
            layer_kinds,
            sizes,
            dtype,
            &taps,
            resolution.moe_of(Role::Target).next(),
        )?;
        Ok(Self {
            device: device.clone(),
            config,
            resolution,
            model,
            weight_bytes: decoder.weight_bytes(),
            context,
            kernels,
            runner,
            pages: PageAllocator::new(pool_pages),
            drafting,
            recorder,
            next_sequence: 0,
        })
    }

    /// Who serves what.
    #[must_use]
    pub fn resolution(&self) -> &Resolution {
        &self.resolution
    }

    /// The configuration that was resolved.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The device it runs on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of the target's matrices as held on the device.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The proposer's name, and the tokens verified a step.
    #[must_use]
    pub fn proposer(&self) -> Option<(&'static str, u32)> {
        self.drafting.as_ref().map(|drafting| (drafting.name, drafting.width))
    }

    /// Changes the number of tokens verified a step.
    ///
    /// # Errors
    /// No proposer, or more than it proposes.
    pub fn set_speculative_tokens(&mut self, tokens: u32) -> Result<(), EngineError> {
        let Some(drafting) = &mut self.drafting else {
            return Err(EngineError::Request("num_speculative_tokens without a proposer".into()));
        };
        drafting.width = checked_width(drafting.name, tokens, drafting.drafter.max_tokens())?;
        Ok(())
    }

    /// Generates from a prompt. `on_tokens` is given each step's new tokens, none between the chunks of the prompt, and
    /// may end the request.
    ///
    /// # Errors
    /// A request that does not fit the model; a device that failed. Its pages are free again in any case.
    pub fn generate(
        &mut self,
        request: &Request,
        on_tokens: &mut dyn FnMut(&[u32]) -> ControlFlow<()>,
    ) -> Result<Generation, EngineError> {
        self.check(request)?;
        let mut sequence = Sequence { id: self.next_sequence, ..Sequence::default() };
        self.next_sequence += 1;
        let mut run = Run::new(self, request, on_tokens);
        let outcome = run.run(&mut sequence);
        let generation = outcome.map(|stop| run.finish(&sequence, stop));
        self.pages.release(&mut sequence.pages);
        if let Some(drafting) = &mut self.drafting {
            drafting.drafter.forget(sequence.id);
        }
        let (backends, calls) = self.kernels.take_counts();
        generation.map(|generation| Generation { backends, calls, ..generation })
    }

    /// The logits behind each token of a text, `[ids, vocab_size]` f32: what the target expects next at every position.
    ///
    /// # Errors
    /// No ids, more than a pass takes or the context holds, an id that is not in the vocabulary; no memory.
    pub fn score(&mut self, ids: &[u32]) -> Result<Vec<f32>, EngineError> {
        let most = self.context.min(self.runner.sizes().rows) as usize;
        if ids.is_empty() || ids.len() > most {
            return Err(EngineError::Request(format!("{} tokens to score, 1 to {most} in one pass", ids.len())));
        }
        self.check_ids(ids)?;
        let mut pages = Vec::new();
        self.pages.grow(&mut pages, ids.len().div_ceil(self.runner.sizes().page_size as usize))?;
        let logits = self.score_on(ids, &pages);
        self.pages.release(&mut pages);
        logits
    }

    fn score_on(&self, ids: &[u32], pages: &[i32]) -> Result<Vec<f32>, EngineError> {
        let mut commands = self.device.commands()?;
        self.runner.pass(&mut commands, &self.kernels, Phase::Prefill, Ids::Host(ids), 0, pages, Head::None)?;
        let logits = self.runner.all_logits(&mut commands, ids.len() as u32)?;
        let readback = commands.read_back(logits.whole())?;
        let _ = commands.submit()?;
        Ok(readback.wait_as::<f32>()?)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), EngineError> {
        match ids.iter().find(|id| **id >= self.model.vocab_size) {
            Some(id) => {
                let vocab = self.model.vocab_size;
                Err(EngineError::Request(format!("token {id} is not in a vocabulary of {vocab}")))
            }
            None => Ok(()),
        }
    }

    fn check(&self, request: &Request) -> Result<(), EngineError> {
        let fail = |message: String| Err(EngineError::Request(message));
        if request.prompt.is_empty() {
            return fail("the prompt has no tokens".into());
        }
        if request.max_tokens == 0 {
            return fail("0 new tokens asked for, at least 1".into());
        }
        if request.prompt.len() >= self.context as usize {
            return fail(format!(
                "the prompt has {} tokens and leaves no room in a context of {}",
                request.prompt.len(),
                self.context
            ));
        }
        self.check_ids(&request.prompt)?;
        match request.sampling.fault() {
            Some(fault) => fail(fault),
            None => Ok(()),
        }
    }
}

impl Drafting {
    fn new(
        drafter: Box<dyn Drafter>,
        name: &'static str,
        target: &TargetFacts,
        asked: Option<u32>,
    ) -> Result<Self, EngineError> {
        if let Some(tap) = drafter.taps().layers.iter().find(|tap| **tap >= target.layers) {
            let message = format!("it taps layer {tap}, the target has {} layers", target.layers);
            return Err(ProposerError::Mismatch(message).into());
        }
        let most = drafter.max_tokens();
        if most >= BLOCK_ROOM {
            return Err(EngineError::Request(format!("proposer '{name}' drafts {most} tokens, at most {BLOCK_ROOM}")));
        }
        let width = checked_width(name, asked.unwrap_or_else(|| drafter.default_tokens()), most)?;
        Ok(Self { drafter, name, width })
    }
}

fn checked_width(name: &str, tokens: u32, most: u32) -> Result<u32, EngineError> {
    if tokens == 0 || tokens > most {
        return Err(EngineError::Request(format!(
            "num_speculative_tokens is {tokens}, proposer '{name}' gives 1 to {most}"
        )));
    }
    Ok(tokens)
}

/// The format of queries and cache: f32 for a model of f32 weights, otherwise f16.
fn activation_dtype(source: &ModelSource) -> Result<DType, EngineError> {
    let name = WeightName::TokenEmbedding.in_format(source.checkpoint.format());
    Ok(match source.checkpoint.dtype(&name)? {
        StoredType::F32 => DType::F32,
        _ => DType::F16,
    })
}

/// The layer kinds of a model, and for each layer the place of its kind. A kind has experts where one of its layers has.
fn layer_kinds(source: &ModelSource) -> Result<(Vec<LayerConfig>, Vec<usize>), EngineError> {
    let model = &source.config;
    let mut windows: Vec<Option<u32>> = Vec::new();
    let mut kinds: Vec<LayerConfig> = Vec::new();
    let mut places = Vec::new();
    for layer in 0..model.layers {
        let window = model.window(layer);
        let place = windows.iter().position(|other| *other == window).unwrap_or_else(|| {
            let name = window.map_or("full".to_owned(), |keys| format!("sliding-{keys}"));
            let mut kind = match &model.latent {
                None => LayerConfig::gqa(name, 0, model.query_heads, model.kv_heads, model.head_dim),
                Some(latent) => {
                    let kind = LayerConfig::mla(name, 0, model.query_heads, latent.latent_dim, latent.rope_dim);
                    LayerConfig { scale: Some(latent.scale), ..kind }
                }
            };
            kind.window = window.map(WindowConfig::Keys);
            windows.push(window);
            kinds.push(kind);
            kinds.len() - 1
        });
        let kind = &mut kinds[place];
        kind.count += 1;
        if let Some(experts) = model.experts.as_ref().filter(|_| model.has_experts(layer) && kind.moe.is_none()) {
            let name = WeightName::Expert { layer, expert: 0, weight: LayerWeight::Gate };
            let dtype = match source.checkpoint.dtype(&name.in_format(source.checkpoint.format()))? {
                StoredType::F32 => DType::F32,
                StoredType::BF16 => DType::BF16,
                _ => DType::F16,
            };
            kind.moe = Some(MoeConfig {
                experts: experts.experts,
                experts_per_token: experts.per_token,
                hidden_size: model.hidden_size,
                intermediate_size: experts.intermediate_size,
                dtype: Some(dtype),
            });
        }
        places.push(place);
    }
    Ok((kinds, places))
}

/// One request under way.
struct Run<'a> {
    device: &'a Device,
    runner: &'a Runner,
    kernels: &'a Kernels,
    pages: &'a mut PageAllocator,
    drafting: Option<&'a mut Drafting>,
    recorder: Option<&'a Recorder>,
    request: &'a Request,
    on_tokens: &'a mut dyn FnMut(&[u32]) -> ControlFlow<()>,
    sampler: Sampler,
    stop: &'a [u32],
    context: usize,
    vocab: usize,
    counts: Option<AcceptanceCounts>,
    steps: u64,
    started: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// What comes back from a pass: ids where decoding is greedy, logits where it is sampled.
enum Judgement {
    Best(Readback),
    Logits(Readback),
}

impl<'a> Run<'a> {
    fn new(
        engine: &'a mut Engine,
        request: &'a Request,
        on_tokens: &'a mut dyn FnMut(&[u32]) -> ControlFlow<()>,
    ) -> Self {
        Self {
            device: &engine.device,
            runner: &engine.runner,
            kernels: &engine.kernels,
            pages: &mut engine.pages,
            counts: engine.drafting.is_some().then(AcceptanceCounts::default),
            drafting: engine.drafting.as_mut(),
            recorder: engine.recorder.as_deref(),
            request,
            on_tokens,
            sampler: Sampler::new(request.sampling),
            stop: request.stop.as_deref().unwrap_or(&engine.model.eos),
            context: engine.context as usize,
            vocab: engine.model.vocab_size as usize,
            steps: 0,
            started: Instant::now(),
            first_token: None,
            last_token: None,
        }
    }

    fn finish(&mut self, sequence: &Sequence, stop: StopReason) -> Generation {
        let first = self.first_token.unwrap_or(self.started);
        Generation {
            tokens: sequence.tokens[self.request.prompt.len()..].to_vec(),
            prompt_tokens: self.request.prompt.len(),
            stop,
            steps: self.steps,
            prefill: first - self.started,
            decode: self.last_token.map_or(Duration::ZERO, |last| last - first),
            acceptance: self.counts.as_ref().map(AcceptanceCounts::report),
            backends: crate::Backends::default(),
            calls: std::collections::BTreeMap::new(),
        }
    }

    fn run(&mut self, sequence: &mut Sequence) -> Result<StopReason, EngineError> {
        if let Some(stop) = self.prefill(sequence)? {
            return Ok(stop);
        }
        if self.drafting.is_none() && self.request.sampling.is_greedy() && self.recorder.is_none() {
            return self.decode_ahead(sequence);
        }
        let mut commands = self.step_commands()?;
        loop {
            let (stop, next) = self.step(sequence, commands)?;
            if let Some(stop) = stop {
                return Ok(stop);
            }
            commands = next;
        }
    }

    /// Runs the prompt in chunks and emits the first token.
    fn prefill(&mut self, sequence: &mut Sequence) -> Result<Option<StopReason>, EngineError> {
        let prompt = &self.request.prompt;
        let chunk = self.runner.sizes().rows as usize;
        sequence.tokens.extend_from_slice(prompt);
        let mut judgement = None;
        for start in (0..prompt.len()).step_by(chunk) {
            let end = prompt.len().min(start + chunk);
            let last = end == prompt.len();
            self.reserve(sequence, end)?;
            let mut commands = self.device.commands()?;
            let head = if last { Head::Last } else { Head::None };
            self.begin_step();
            self.runner.pass(
                &mut commands,
                self.kernels,
                Phase::Prefill,
                Ids::Host(&prompt[start..end]),
                start as u32,
                &sequence.pages,
                head,
            )?;
            if last {
                judgement = Some(self.judge(&mut commands, 1)?);
            }
            self.commit(&mut commands, sequence, start as u32, (end - start) as u32);
            self.submit(commands)?;
            if !last && (self.on_tokens)(&[]).is_break() {
                return Ok(Some(StopReason::Cancelled));
            }
        }
        let Some(judgement) = judgement else { return Ok(None) };
        let verified = self.verify(judgement, &[], prompt.len())?;
        self.first_token = Some(Instant::now());
        Ok(self.emit(sequence, &[verified.bonus]))
    }

    /// Greedy decoding without drafts. The next pass takes its id on the device, so it is under way before the host
    /// has seen it.
    fn decode_ahead(&mut self, sequence: &mut Sequence) -> Result<StopReason, EngineError> {
        let mut waiting: std::collections::VecDeque<Readback> = std::collections::VecDeque::new();
        // On the CPU a pass is over when it is recorded: running ahead would only compute what is thrown away.
        let ahead = if self.device.is_cpu() { 1 } else { 2 };
        loop {
            let submitted = waiting.len();
            let position = sequence.tokens.len() - 1 + submitted;
            let new = sequence.tokens.len() - self.request.prompt.len() + submitted;
            let wanted = new < self.request.max_tokens && position + 1 < self.context;
            if submitted < ahead && wanted && self.reserve_ahead(sequence, position + 1, submitted)? {
                let mut commands = self.device.commands()?;
                let id = [sequence.tokens[sequence.tokens.len() - 1]];
                let ids = match submitted {
                    0 => Ids::Host(&id),
                    _ => Ids::Device { ids: self.runner.best_ids().whole(), rows: 1 },
                };
                let position = position as u32;
                self.runner.pass(
                    &mut commands,
                    self.kernels,
                    Phase::Decode,
                    ids,
                    position,
                    &sequence.pages,
                    Head::Last,
                )?;
                let best = self.runner.best(&mut commands, 1)?;
                waiting.push_back(commands.read_back(best)?);
                let _ = commands.submit()?;
                continue;
            }
            let Some(next) = waiting.pop_front() else { return Ok(StopReason::Context) };
            let id = next.wait_as::<u32>()?.first().copied().unwrap_or(u32::MAX);
            self.check_finite(id, sequence.tokens.len() - 1)?;
            self.steps += 1;
            if let Some(stop) = self.emit(sequence, &[id]) {
                return Ok(stop);
            }
        }
    }

    /// Room for a pass that runs ahead: it may be missing, as long as another pass is under way.
    fn reserve_ahead(&mut self, sequence: &mut Sequence, tokens: usize, submitted: usize) -> Result<bool, EngineError> {
        match self.reserve(sequence, tokens) {
            Err(EngineError::OutOfPages { .. }) if submitted > 0 => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// The recording of a step that the host waits for.
    fn step_commands(&self) -> Result<Commands, EngineError> {
        Ok(self.device.commands()?.handed_over_every(HAND_OVER))
    }

    /// One step: draft, verify, emit. `commands` may hold what the last step committed; the answer holds what this one
    /// did.
    fn step(
        &mut self,
        sequence: &mut Sequence,
        mut commands: Commands,
    ) -> Result<(Option<StopReason>, Commands), EngineError> {
        let anchor = sequence.tokens.len() - 1;
        let left = self.request.max_tokens - (sequence.tokens.len() - self.request.prompt.len());
        let room = self.context - anchor - 1;
        if room == 0 {
            return Ok((Some(StopReason::Context), commands));
        }
        self.begin_step();
        let proposal = self.propose(sequence, &mut commands, left.min(room) - 1)?;
        let mut drafted: Vec<u32> = Vec::new();
        let mut drafted_later = None;
        let mut rows: Vec<u32> = vec![sequence.tokens[anchor]];
        let ids = match &proposal {
            Some((Proposal::Host(tokens), width)) => {
                drafted.extend(tokens.first().into_iter().flatten().take(*width as usize));
                rows.extend(&drafted);
                Ids::Host(&rows)
            }
            Some((Proposal::Device { ids, counts, .. }, width)) => {
                let count = counts.first().copied().unwrap_or(0).min(*width);
                let ids = ids.slice(0, u64::from(count + 1) * 4)?;
                drafted_later = Some(ids);
                Ids::Device { ids, rows: count + 1 }
            }
            _ => Ids::Host(&rows),
        };
        let count = ids.rows();
        self.reserve(sequence, anchor + count as usize)?;
        let phase = if count > 1 { Phase::Verify } else { Phase::Decode };
        self.runner.pass(&mut commands, self.kernels, phase, ids, anchor as u32, &sequence.pages, Head::All)?;
        let judgement = self.judge(&mut commands, count)?;
        let drafted_later = drafted_later.map(|ids| commands.read_back(ids)).transpose()?;
        self.submit(commands)?;
        if let Some(readback) = drafted_later {
            let ids = readback.wait_as::<u32>()?;
            if ids.first() != rows.first() {
                // The pass began with another token than the last one committed: nothing of it counts.
                let what = format!("it put token {:?} in the place of the anchor {}", ids.first(), rows[0]);
                let proposer = self.drafting.as_ref().map_or("", |drafting| drafting.name);
                self.lose_drafter(&ProposerError::Plugin { proposer, what });
                return Ok((None, self.step_commands()?));
            }
            drafted.extend(&ids[1..]);
        }
        let verified = self.verify(judgement, &drafted, anchor + 1)?;
        self.steps += 1;

        let mut emitted = drafted[..verified.accepted].to_vec();
        emitted.push(verified.bonus);
        let before = sequence.tokens.len();
        let stop = self.emit(sequence, &emitted);
        if let Some(counts) = &mut self.counts
            && !drafted.is_empty()
        {
            // What an end token cut off does not count.
            counts.step(drafted.len(), verified.accepted.min(sequence.tokens.len() - before));
        }
        let mut next = self.step_commands()?;
        if stop.is_none() {
            self.commit(&mut next, sequence, anchor as u32, verified.accepted as u32 + 1);
        }
        Ok((stop, next))
    }

    /// Asks the drafter, if there is one and `most` leaves it something to do. A drafter that fails is left out of the
    /// rest of the request.
    fn propose(
        &mut self,
        sequence: &mut Sequence,
        commands: &mut Commands,
        most: usize,
    ) -> Result<Option<(Proposal, u32)>, EngineError> {
        let Some(drafting) = self.drafting.as_deref_mut() else { return Ok(None) };
        let width = drafting.width.min(u32::try_from(most).unwrap_or(u32::MAX));
        if width == 0 {
            return Ok(None);
        }
        // The drafter's block may be wider than what is verified.
        let block = sequence.tokens.len() + drafting.drafter.max_tokens() as usize;
        self.pages.grow(&mut sequence.pages, block.div_ceil(self.runner.sizes().page_size as usize))?;
        let wanted = [DraftSequence { id: sequence.id, tokens: &sequence.tokens, width, pages: &sequence.pages }];
        let mut context = ProposeContext::new(commands, &wanted, self.runner);
        match drafting.drafter.propose(&mut context) {
            Ok(proposal) => Ok(Some((proposal, width))),
            Err(error) => {
                self.lose_drafter(&error);
                *commands = self.step_commands()?;
                Ok(None)
            }
        }
    }

    /// Tells the drafter which rows of the pass in `commands` stand.
    fn commit(&mut self, commands: &mut Commands, sequence: &Sequence, position: u32, rows: u32) {
        let Some(drafting) = self.drafting.as_deref_mut() else { return };
        let committed = [CommittedRows { id: sequence.id, first_row: 0, rows, position, pages: &sequence.pages }];
        let mut outcome = Outcome::new(commands, &committed, self.runner.taps());
        if let Err(error) = drafting.drafter.commit(&mut outcome) {
            self.lose_drafter(&error);
        }
    }

    fn lose_drafter(&mut self, error: &ProposerError) {
        tracing::warn!("the drafter failed and is left out of this request: {error}");
        self.drafting = None;
    }

    fn begin_step(&self) {
        if let Some(recorder) = self.recorder {
            recorder.begin_step();
        }
    }

    fn submit(&self, commands: Commands) -> Result<(), EngineError> {
        let _ = commands.submit()?;
        match self.recorder {
            Some(recorder) => recorder.write(),
            None => Ok(()),
        }
    }

    fn judge(&self, commands: &mut Commands, rows: u32) -> Result<Judgement, EngineError> {
        if self.request.sampling.is_greedy() {
            let best = self.runner.best(commands, rows)?;
            Ok(Judgement::Best(commands.read_back(best)?))
        } else {
            Ok(Judgement::Logits(commands.read_back(self.runner.logits(rows)?)?))
        }
    }

    /// `position` is that of the first token behind the anchor.
    fn verify(&self, judgement: Judgement, drafted: &[u32], position: usize) -> Result<Verified, EngineError> {
        let verified = match judgement {
            Judgement::Best(best) => verify_greedy(drafted, &best.wait_as::<u32>()?),
            Judgement::Logits(logits) => {
                let logits = logits.wait_as::<f32>()?;
                let verified = verify_sampled(drafted, &logits, self.vocab, &self.sampler, position as u64);
                let row = logits.chunks(self.vocab).nth(verified.accepted).unwrap_or(&[]);
                let bonus = if row.iter().all(|x| x.is_nan()) { u32::MAX } else { verified.bonus };
                Verified { bonus, ..verified }
            }
        };
        self.check_finite(verified.bonus, position + verified.accepted - 1)?;
        Ok(verified)
    }

    /// Logits that are NaN throughout have no largest one, which shows as an id beyond the vocabulary. Nothing of them
    /// is emitted.
    fn check_finite(&self, id: u32, position: usize) -> Result<(), EngineError> {
        if (id as usize) < self.vocab {
            return Ok(());
        }
        Err(EngineError::NotFinite { position, backends: self.kernels.names(Role::Target) })
    }

    fn reserve(&mut self, sequence: &mut Sequence, tokens: usize) -> Result<(), EngineError> {
        self.pages.grow(&mut sequence.pages, tokens.div_ceil(self.runner.sizes().page_size as usize))
    }

    /// Appends tokens up to the first that ends the request, and hands them to the caller.
    fn emit(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Option<StopReason> {
        let before = sequence.tokens.len();
        let mut stop = None;
        for token in tokens {
            sequence.tokens.push(*token);
            stop = if self.stop.contains(token) {
                Some(StopReason::EndOfSequence)
            } else if sequence.tokens.len() - self.request.prompt.len() >= self.request.max_tokens {
                Some(StopReason::Length)
            } else if sequence.tokens.len() >= self.context {
                Some(StopReason::Context)
            } else {
                None
            };
            if stop.is_some() {
                break;
            }
        }
        self.last_token = Some(Instant::now());
        match (self.on_tokens)(&sequence.tokens[before..]) {
            ControlFlow::Break(()) => stop.or(Some(StopReason::Cancelled)),
            ControlFlow::Continue(()) => stop,
        }
    }
}
