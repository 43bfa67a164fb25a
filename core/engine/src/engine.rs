use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::Arc,
};

use polyattn_api::{
    AcceptanceRule, AttentionConfig, AttentionKernel, BackendChoice, BackendName, DraftAttention, Drafter,
    EngineConfig, Fixed, KernelConfig, KvCacheConfig, LengthPolicy, LoadContext, MOST_CANDIDATES, Match, ModelConfig,
    Phase, PrefixReuse, ProposerError, Registry, Resolution, Role, SpeculativeConfig, StrategyConfig, TapSpec,
    TargetFacts, TreeBuilder, contained, resolve,
};
use polyattn_device::{Commands, Device, Readback};
use polyattn_nn::{
    decoder::Decoder,
    load::{DecoderConfig, ModelSource},
};

use crate::{
    EngineError, PageAllocator, RecordOptions,
    attention::Kernels,
    record::Recorder,
    runner::{Head, Ids, Pass, PassSequence, Runner, RunnerSizes, check_cache},
    scheduler::{Event, Running, StepTimes},
};

/// Tokens beyond the context that the pool has room for: a drafter's block reaches beyond what is emitted.
const BLOCK_ROOM: u32 = 128;

/// Bytes of the logits of a pass at the most, where many requests have drafts.
const LOGITS_BYTES: u64 = 1 << 30;

/// Nodes of a tree where the user asked for no number: few enough for devices that are not large.
const DEFAULT_TREE_NODES: u32 = 16;

/// Dispatches after which the GPU starts on a step whose answer the host waits for: on an H100 recording one takes about
/// half as long as running it, so the GPU is never short of work.
pub(crate) const HAND_OVER: u64 = 48;

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
    /// Requests that are worked on at once; others wait.
    pub max_sequences: u32,
    /// Pages of the cache; enough for as many sequences as are worked on at once where unset.
    pub pool_pages: Option<u32>,
    /// Whether pages stay known, so that a text that begins like an earlier one starts with them.
    pub prefix_cache: bool,
    /// Tokens of one pass: of prompts, and of all drafts together.
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
            max_sequences: 1,
            pool_pages: None,
            prefix_cache: false,
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

    /// For this many requests at once.
    #[must_use]
    pub fn with_sequences(mut self, sequences: u32) -> Self {
        self.max_sequences = sequences;
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
    /// The proposer's own parameters, a JSON object that it reads.
    pub parameters: Option<serde_json::Value>,
    /// Who makes trees of what is drafted; chains when unset.
    pub tree: Option<StrategyConfig>,
    /// Nodes of a tree at the most; 16 when unset.
    pub tree_nodes: Option<u32>,
    /// What of a draft stands; `match` when unset.
    pub acceptance: Option<StrategyConfig>,
    /// How many tokens are drafted a step; `fixed` when unset.
    pub length: Option<StrategyConfig>,
}

/// A model ready to generate, and perhaps a drafter.
#[derive(Debug)]
pub struct Engine {
    pub(crate) device: Device,
    config: EngineConfig,
    resolution: Resolution,
    pub(crate) model: DecoderConfig,
    weight_bytes: u64,
    pub(crate) context: u32,
    pub(crate) max_sequences: usize,
    pub(crate) prefix_cache: bool,
    /// Prompt tokens of a pass.
    pub(crate) chunk: u32,
    pub(crate) kernels: Kernels,
    pub(crate) runner: Runner,
    pub(crate) pages: PageAllocator,
    pub(crate) drafting: Option<Drafting>,
    pub(crate) recorder: Option<Arc<Recorder>>,
    pub(crate) next_request: u64,
    /// Requests that wait to be worked on, and those that are, the oldest first.
    pub(crate) waiting: VecDeque<Running>,
    pub(crate) running: Vec<Running>,
    /// What nobody has been told yet.
    pub(crate) events: Vec<Event>,
    /// What the next pass begins with: tokens moved, rows committed.
    pub(crate) recorded: Option<Commands>,
    /// Passes under way whose ids the host has not seen.
    pub(crate) ahead: VecDeque<Readback>,
    /// Whether the last pass was of prompts.
    pub(crate) prefilled_last: bool,
    pub(crate) times: StepTimes,
}

/// A drafter, and how its drafts are used.
#[derive(Debug)]
pub(crate) struct Drafting {
    pub(crate) drafter: Box<dyn Drafter>,
    pub(crate) name: &'static str,
    /// Tokens verified a step.
    pub(crate) width: u32,
    /// Who makes trees, and of how many nodes.
    pub(crate) tree: Option<(Box<dyn TreeBuilder>, u32)>,
    /// Candidates of a slot that it is told.
    pub(crate) candidates: u32,
    pub(crate) rule: Box<dyn AcceptanceRule>,
    pub(crate) policy: Box<dyn LengthPolicy>,
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
        let at_least_1 = [
            ("page size", options.page_size),
            ("prefill chunk", options.prefill_chunk),
            ("max_sequences", options.max_sequences),
            ("pool_pages", options.pool_pages.unwrap_or(1)),
        ];
        if let Some((name, _)) = at_least_1.iter().find(|(_, value)| *value == 0) {
            return Err(EngineError::Request(format!("{name} is 0, at least 1")));
        }
        let context = options.context.unwrap_or(8192).min(model.context_length);
        let dtype = source.activation_dtype()?;
        let facts = TargetFacts::new(model.layers, model.hidden_size, model.vocab_size, model.context_length)
            .loaded_from(source.checkpoint.path());
        let (layers, layer_kinds) = source.attention_layers()?;
        let speculative = options.speculative.as_ref();
        let proposer = speculative.and_then(|speculative| registry.proposer(&speculative.method));
        let own = proposer.as_ref().is_some_and(|entry| entry.proposer.requirements().in_target_checkpoint);
        let checkpoint = speculative
            .and_then(|speculative| speculative.model.as_deref())
            .or_else(|| own.then(|| source.checkpoint.path()));
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
                parameters: speculative.parameters.clone(),
                tree: speculative.tree.clone(),
                tree_nodes: speculative.tree_nodes,
                acceptance: speculative.acceptance.clone(),
                length: speculative.length.clone(),
                draft,
            }),
        };
        let resolution = resolve(&config, device.facts(), registry)?;

        let recorder = options.record.clone().map(Recorder::new).transpose()?.map(Arc::new);
        let mut kernels = Kernels::default();
        kernels.prepare(device, &resolution.target, options.page_size, recorder.as_ref())?;
        kernels.prepare(device, &resolution.draft, options.page_size, recorder.as_ref())?;

        let strategies = Strategies::make(registry, speculative)?;
        let tree_nodes = strategies.tree.as_ref().map_or(0, |(_, nodes)| *nodes);
        let room = BLOCK_ROOM.max(tree_nodes + 1);
        let positions = context.saturating_add(room);
        let enough = positions.div_ceil(options.page_size).saturating_mul(options.max_sequences);
        let pool_pages = options.pool_pages.unwrap_or(enough);
        // Reading the weights may take minutes: what cannot run is refused before.
        check_cache(&model, device.facts(), pool_pages, options.page_size, dtype)?;
        let decoder = Arc::new(Decoder::load(source, device, positions, progress)?);
        // The drafts of all requests at once, if their logits fit; a drafter is loaded for so many rows.
        let drafted = speculative.map_or(0, |speculative| {
            (1 + speculative.num_speculative_tokens.unwrap_or(DEFAULT_TREE_NODES).max(tree_nodes))
                .saturating_mul(options.max_sequences)
        });
        let logits = LOGITS_BYTES.min(device.facts().limits.binding_bytes) / (u64::from(model.vocab_size) * 4).max(1);
        let drafted = drafted.min(u32::try_from(logits).unwrap_or(u32::MAX));
        let rows = options.prefill_chunk.min(context).max(room).max(drafted);
        let drafting = match (&resolution.proposer, &resolution.draft_config, speculative) {
            (Some(entry), Some(draft_config), Some(speculative)) => {
                let kernel = |served: &Arc<_>| Arc::clone(served) as Arc<dyn AttentionKernel>;
                let attention: Vec<_> = kernels
                    .of(Role::Draft, Phase::Draft, false)
                    .map(|served| {
                        let layer = &served.problem().layer;
                        let mut attention = DraftAttention::new(Arc::clone(layer), kernel(served));
                        let mut over_trees = kernels.of(Role::Draft, Phase::Draft, true);
                        attention.tree = over_trees.find(|other| other.problem().layer == *layer).map(kernel);
                        attention
                    })
                    .collect();
                let mut load = LoadContext::new(device, &facts, draft_config);
                load.checkpoint = checkpoint;
                load.attention = &attention;
                load.moe = resolution.moe_of(Role::Draft).next();
                load.num_speculative_tokens = speculative.num_speculative_tokens;
                load.pool_pages = pool_pages;
                load.page_size = options.page_size;
                load.kv_dtype = draft_config.kv_cache.dtype.unwrap_or(draft_config.model.dtype.into());
                load.max_rows = rows;
                load.max_sequences = options.max_sequences;
                load.tree_nodes = tree_nodes;
                load.parameters = speculative.parameters.as_ref();
                let drafter = entry.load(&load)?;
                let asked = speculative.num_speculative_tokens;
                Some(Drafting::new(drafter, entry.proposer.name(), &facts, asked, strategies)?)
            }
            _ => None,
        };

        let nothing = TapSpec::default();
        let taps = drafting.as_ref().map_or(&nothing, |drafting| drafting.drafter.taps());
        let of_one = 1 + drafting.as_ref().map_or(0, |drafting| drafting.drafter.max_tokens().max(tree_nodes));
        let head_rows = of_one.saturating_mul(options.max_sequences).min(rows).max(1);
        if let Some(drafting) = &drafting {
            drafting.warn_of_share(head_rows, options.max_sequences);
        }
        let sizes = RunnerSizes { rows, head_rows, pool_pages, page_size: options.page_size };
        let moe = resolution.moe_of(Role::Target).next();
        let runner = Runner::new(device, Arc::clone(&decoder), layer_kinds, sizes, dtype, taps, moe)?;
        Ok(Self {
            device: device.clone(),
            config,
            resolution,
            model,
            weight_bytes: decoder.weight_bytes(),
            context,
            max_sequences: options.max_sequences as usize,
            prefix_cache: options.prefix_cache,
            chunk: options.prefill_chunk.min(context),
            kernels,
            runner,
            pages: PageAllocator::new(pool_pages),
            drafting,
            recorder,
            next_request: 0,
            waiting: VecDeque::new(),
            running: Vec::new(),
            events: Vec::new(),
            recorded: None,
            ahead: VecDeque::new(),
            prefilled_last: false,
            times: StepTimes::default(),
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

    /// How drafts are used: who makes trees, what of them stands, how many tokens are drafted. `None` without a
    /// proposer.
    #[must_use]
    pub fn strategies(&self) -> Option<(&str, &str, &str)> {
        let drafting = self.drafting.as_ref()?;
        let tree = drafting.tree.as_ref().map_or("chain", |(tree, _)| tree.name());
        Some((tree, drafting.rule.name(), drafting.policy.name()))
    }

    /// Tokens verified a step for each of `max_sequences` requests at once: fewer than [`proposer`](Self::proposer) says
    /// where the rows of a pass are too few for all. `None` without a proposer.
    #[must_use]
    pub fn full_batch_width(&self) -> Option<u32> {
        let drafting = self.drafting.as_ref()?;
        let share = self.runner.sizes().head_rows / self.max_sequences as u32;
        Some(drafting.wanted().min(share.saturating_sub(1)))
    }

    /// Whether what is emitted with drafts follows the target's distribution.
    #[must_use]
    pub fn is_lossless(&self) -> bool {
        self.drafting.as_ref().is_none_or(|drafting| drafting.rule.lossless())
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
        let sequences = [PassSequence { position: 0, rows: ids.len() as u32, pages, tree: None }];
        let pass = Pass { phase: Phase::Prefill, ids: Ids::Host(ids), sequences: &sequences, head: Head::None };
        self.runner.pass(&mut commands, &self.kernels, &pass)?;
        let logits = self.runner.all_logits(&mut commands, ids.len() as u32)?;
        let readback = commands.read_back(logits.whole())?;
        let _ = commands.submit()?;
        Ok(readback.wait_as::<f32>()?)
    }

    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), EngineError> {
        match ids.iter().find(|id| **id >= self.model.vocab_size) {
            Some(id) => {
                let vocab = self.model.vocab_size;
                Err(EngineError::Request(format!("token {id} is not in a vocabulary of {vocab}")))
            }
            None => Ok(()),
        }
    }
}

/// How drafts are used.
struct Strategies {
    tree: Option<(Box<dyn TreeBuilder>, u32)>,
    candidates: u32,
    rule: Box<dyn AcceptanceRule>,
    policy: Box<dyn LengthPolicy>,
}

impl Strategies {
    fn make(registry: &Registry, options: Option<&SpeculativeOptions>) -> Result<Self, EngineError> {
        let nothing = SpeculativeOptions::default();
        let options = options.unwrap_or(&nothing);
        let tree = options.tree.as_ref().map(|tree| registry.strategy::<dyn TreeBuilder>(tree)).transpose();
        let rule = options.acceptance.as_ref().map(|rule| registry.strategy::<dyn AcceptanceRule>(rule)).transpose();
        let policy = options.length.as_ref().map(|policy| registry.strategy::<dyn LengthPolicy>(policy)).transpose();
        let nodes = options.tree_nodes.unwrap_or(DEFAULT_TREE_NODES);
        let tree = tree.map_err(EngineError::Request)?.filter(|tree| tree.branches()).map(|tree| (tree, nodes));
        let candidates = tree.as_ref().map_or(Ok(0), |(builder, nodes)| {
            contained(|| builder.candidates(*nodes)).map_err(|message| ProposerError::Strategy {
                kind: "tree builder",
                name: builder.name().to_owned(),
                what: format!("it panicked in candidates: {message}"),
            })
        })?;
        if let Some((builder, _)) = tree.as_ref().filter(|_| candidates > MOST_CANDIDATES) {
            let name = builder.name();
            tracing::warn!(
                "tree builder '{name}' wants {candidates} candidates of a slot and is told {MOST_CANDIDATES}"
            );
        }
        Ok(Self {
            tree,
            candidates: candidates.clamp(1, MOST_CANDIDATES),
            rule: rule.map_err(EngineError::Request)?.unwrap_or_else(|| Box::new(Match)),
            policy: policy.map_err(EngineError::Request)?.unwrap_or_else(|| Box::new(Fixed::default())),
        })
    }
}

impl Drafting {
    fn new(
        drafter: Box<dyn Drafter>,
        name: &'static str,
        target: &TargetFacts,
        asked: Option<u32>,
        strategies: Strategies,
    ) -> Result<Self, EngineError> {
        if let Some(tap) = drafter.taps().layers.iter().find(|tap| **tap >= target.layers) {
            let message = format!("it taps layer {tap}, the target has {} layers", target.layers);
            return Err(ProposerError::Mismatch(message).into());
        }
        let most = drafter.max_tokens();
        let bound = BLOCK_ROOM - 1;
        if most > bound {
            return Err(EngineError::Request(format!("proposer '{name}' drafts {most} tokens, at most {bound}")));
        }
        let width = checked_width(name, asked.unwrap_or_else(|| drafter.default_tokens()), most)?;
        let Strategies { tree, candidates, rule, policy } = strategies;
        if !rule.lossless() {
            tracing::warn!("acceptance '{}' is lossy: what is emitted is not the target's", rule.name());
        }
        Ok(Self { drafter, name, width, tree, candidates, rule, policy })
    }

    /// What the acceptance rule did, by its name.
    pub(crate) fn rule_fault(&self, what: String) -> ProposerError {
        ProposerError::Strategy { kind: "acceptance rule", name: self.rule.name().to_owned(), what }
    }

    /// What the length policy did, by its name.
    pub(crate) fn policy_fault(&self, what: String) -> ProposerError {
        ProposerError::Strategy { kind: "length policy", name: self.policy.name().to_owned(), what }
    }

    /// Rows wanted for the draft of a request: nodes of its tree, or tokens of its chain.
    fn wanted(&self) -> u32 {
        self.tree.as_ref().map_or(self.width, |(_, nodes)| (*nodes).max(self.width))
    }

    /// Says so where a full batch has shorter drafts than were asked for.
    fn warn_of_share(&self, head_rows: u32, sequences: u32) {
        let (wanted, left) = (self.wanted(), (head_rows / sequences).saturating_sub(1));
        if left < wanted {
            tracing::warn!(
                "{sequences} requests at once share the {head_rows} rows of a pass: each has {left} drafted tokens then, \
                 not {wanted}; fewer max_sequences or a larger prefill_chunk leave more"
            );
        }
    }

    /// What of its state another sequence can begin with.
    pub(crate) fn reuse(&self) -> PrefixReuse {
        self.drafter.reuse()
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
