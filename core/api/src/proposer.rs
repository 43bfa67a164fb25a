use std::{
    fmt::Debug,
    path::{Path, PathBuf},
    sync::Arc,
};

use polyattn_device::{Buffer, BufferSlice, Commands, Device, DeviceError};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    AttentionKernel, BackendError, Draft, EngineConfig, KvDType, Marginals, ModelConfig, Purpose, ResolvedMoe,
    Sampling, TreeWish, default_draft_config,
};

/// What a drafting method needs, known before any model is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ProposerRequirements {
    /// Hidden states of the target's layers.
    pub taps: bool,
    /// A checkpoint of its own.
    pub checkpoint: bool,
    /// Attention of its own, on a backend selected for it.
    pub draft_attention: bool,
    /// That this attention be bidirectional, in some layer at least.
    pub non_causal: bool,
    /// That its attention read the target's cache, so that both agree on its layout.
    pub shared_kv: bool,
    /// That its vocabulary be the target's.
    pub target_vocabulary: bool,
    /// The target's last hidden state, behind its final norm.
    pub last_hidden: bool,
    /// A checkpoint that is the target's own where the user names none.
    pub in_target_checkpoint: bool,
    /// A kernel with a tree mask beside that of each of its causal layer kinds, where a tree is asked for.
    pub tree_attention: bool,
    /// Nothing: it says that it drafts trees where they are asked for. Others answer with chains.
    pub drafts_trees: bool,
    /// Nothing: it says that it remembers requests that ended, and drafts differently after them.
    pub remembers_requests: bool,
}

impl ProposerRequirements {
    /// Needs nothing but the tokens so far.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            taps: false,
            checkpoint: false,
            draft_attention: false,
            non_causal: false,
            shared_kv: false,
            target_vocabulary: true,
            last_hidden: false,
            in_target_checkpoint: false,
            tree_attention: false,
            drafts_trees: false,
            remembers_requests: false,
        }
    }

    /// Needs hidden states of the target.
    #[must_use]
    pub const fn taps(mut self) -> Self {
        self.taps = true;
        self
    }

    /// Needs a checkpoint.
    #[must_use]
    pub const fn checkpoint(mut self) -> Self {
        self.checkpoint = true;
        self
    }

    /// Runs attention of its own.
    #[must_use]
    pub const fn draft_attention(mut self) -> Self {
        self.draft_attention = true;
        self
    }

    /// Needs non-causal attention.
    #[must_use]
    pub const fn non_causal(mut self) -> Self {
        self.non_causal = true;
        self
    }

    /// Reads the target's cache.
    #[must_use]
    pub const fn shared_kv(mut self) -> Self {
        self.shared_kv = true;
        self
    }

    /// Needs the target's last hidden state.
    #[must_use]
    pub const fn last_hidden(mut self) -> Self {
        self.last_hidden = true;
        self
    }

    /// Finds its weights in the target's checkpoint: given none of its own, it is told that one.
    #[must_use]
    pub const fn in_target_checkpoint(mut self) -> Self {
        self.in_target_checkpoint = true;
        self
    }

    /// Runs its attention with a tree mask, where a tree is asked for.
    #[must_use]
    pub const fn tree_attention(mut self) -> Self {
        self.tree_attention = true;
        self
    }

    /// Drafts trees where they are asked for.
    #[must_use]
    pub const fn drafts_trees(mut self) -> Self {
        self.drafts_trees = true;
        self
    }

    /// Remembers requests that ended.
    #[must_use]
    pub const fn remembers_requests(mut self) -> Self {
        self.remembers_requests = true;
        self
    }
}

/// What a drafting method is: a static descriptor, usable with no model loaded.
///
/// Implement it in a crate of its own, register it with [`register_proposer!`](crate::register_proposer) and name the
/// crate where the program is built. Whatever a proposer drafts, the emitted tokens are the target's; a bad draft costs
/// time, never correctness.
pub trait Proposer: Debug + Send + Sync {
    /// The name users select it by: lower case, unique among the registered.
    fn name(&self) -> &'static str;

    /// What it needs.
    fn requirements(&self) -> &ProposerRequirements;

    /// The configuration the draft runs under. Override it to ask for more, starting from
    /// [`default_draft_config`]; nothing of the target's attention is taken over there.
    fn draft_config(&self, target: &EngineConfig) -> EngineConfig {
        default_draft_config(target)
    }

    /// The attention layers of a checkpoint, read without its weights; `None` for a method without a model.
    ///
    /// # Errors
    /// A checkpoint that cannot be read or does not fit the target.
    fn describe(&self, checkpoint: &Path, target: &TargetFacts) -> Result<Option<ModelConfig>, ProposerError> {
        let _ = (checkpoint, target);
        Ok(None)
    }

    /// Loads a drafter.
    ///
    /// # Errors
    /// A checkpoint that is missing, broken, or does not fit the target.
    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError>;
}

/// A loaded drafter at work.
///
/// One step: [`propose`](Self::propose), the target verifies, [`commit`](Self::commit). A prompt is committed in chunks
/// before the first proposal. Sequences come and go: a step may leave some out, and a sequence may be committed for
/// many steps before it is drafted for, or never be.
pub trait Drafter: Debug + Send {
    /// The hidden states of the target that it must see; none by default.
    fn taps(&self) -> &TapSpec;

    /// The most tokens it proposes for a sequence in one step; with a tree, its levels.
    fn max_tokens(&self) -> u32;

    /// What of it stays good for another sequence that begins with the same tokens on the same pages, of which only
    /// what follows is committed. Provided: nothing, and the engine runs such a beginning again.
    fn reuse(&self) -> PrefixReuse {
        PrefixReuse::None
    }

    /// The tokens that are verified a step where the user asked for no number; by default as many as it proposes.
    fn default_tokens(&self) -> u32 {
        self.max_tokens()
    }

    /// Drafts for every sequence of the step. GPU work goes into `context.commands`.
    ///
    /// # Errors
    /// Any; the engine then decodes this step without a draft.
    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError>;

    /// Learns what was accepted: the taps of exactly those rows. GPU work goes into `outcome.commands`.
    ///
    /// # Errors
    /// Any; the engine then decodes on without this drafter.
    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError>;

    /// A sequence ended; its identifier may be used again.
    fn forget(&mut self, sequence: u64) {
        let _ = sequence;
    }
}

/// What of a target a proposer can know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TargetFacts {
    /// Layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Rows of the embedding and of the output head.
    pub vocab_size: u32,
    /// Tokens of the longest sequence.
    pub context_length: u32,
    /// Where it was loaded from, a file or a folder.
    pub checkpoint: Option<PathBuf>,
}

impl TargetFacts {
    /// The facts of a target.
    #[must_use]
    pub const fn new(layers: u32, hidden_size: u32, vocab_size: u32, context_length: u32) -> Self {
        Self { layers, hidden_size, vocab_size, context_length, checkpoint: None }
    }

    /// Loaded from there.
    #[must_use]
    pub fn loaded_from(mut self, checkpoint: impl Into<PathBuf>) -> Self {
        self.checkpoint = Some(checkpoint.into());
        self
    }
}

/// Hidden states of the target that a drafter sees. Their f32 rows stand side by side: those of the layers in this
/// order, then the last one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TapSpec {
    /// Layer ids, 0-based: the output of the layer, before any final norm.
    pub layers: Vec<u32>,
    /// The last hidden state behind the final norm: the input of the output head.
    pub last_hidden: bool,
}

impl TapSpec {
    /// Outputs of these layers.
    #[must_use]
    pub const fn of_layers(layers: Vec<u32>) -> Self {
        Self { layers, last_hidden: false }
    }

    /// The last hidden state.
    #[must_use]
    pub const fn of_last_hidden() -> Self {
        Self { layers: Vec::new(), last_hidden: true }
    }

    /// Hidden states of a row.
    #[must_use]
    pub fn count(&self) -> usize {
        self.layers.len() + usize::from(self.last_hidden)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }
}

/// What a drafter's state at a position depends on, and where it lies: whether a sequence can begin with pages that
/// another one filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum PrefixReuse {
    /// On what pages do not hold.
    #[default]
    None,
    /// On the tokens up to the position, and it lies in the sequence's pages; or there is no state at all.
    Pages,
    /// On the token behind the position too, as EAGLE's: the last page in common is not used again, but filled anew.
    AllButTheLastPage,
}

/// A kernel for one layer kind of a draft, on the backend that was selected for it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DraftAttention {
    /// The layer kind's name, as [`Proposer::describe`] gave it.
    pub layer: Arc<str>,
    /// The kernel.
    pub kernel: Arc<dyn AttentionKernel>,
    /// The same over a tree mask, for those that [ask](ProposerRequirements::tree_attention) for it, where the user
    /// wants trees.
    pub tree: Option<Arc<dyn AttentionKernel>>,
}

impl DraftAttention {
    /// A kernel of this layer kind.
    #[must_use]
    pub fn new(layer: Arc<str>, kernel: Arc<dyn AttentionKernel>) -> Self {
        Self { layer, kernel, tree: None }
    }
}

/// What a proposer loads with.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LoadContext<'a> {
    /// Where it runs.
    pub device: &'a Device,
    /// The target.
    pub target: &'a TargetFacts,
    /// The checkpoint, a file or a folder.
    pub checkpoint: Option<&'a Path>,
    /// The configuration the draft runs under.
    pub config: &'a EngineConfig,
    /// A kernel for each layer kind that the proposer described.
    pub attention: &'a [DraftAttention],
    /// Who serves the experts of the model that the proposer described, where it has some; the drafter prepares the
    /// kernel, for it knows the rows of its passes.
    pub moe: Option<&'a ResolvedMoe>,
    /// Tokens to draft a step, where the user asked for a number.
    pub num_speculative_tokens: Option<u32>,
    /// Pages of the cache pool. A draft cache has as many, and shares the target's page tables.
    pub pool_pages: u32,
    /// Tokens of a page.
    pub page_size: u32,
    /// Format of the draft cache.
    pub kv_dtype: KvDType,
    /// Sequences of a step at the most.
    pub max_sequences: u32,
    /// Rows committed at once at the most, of all sequences together.
    pub max_rows: u32,
    /// Nodes of a sequence's tree at the most; 0 where no trees are asked for.
    pub tree_nodes: u32,
    /// The proposer's own parameters, as the user gave them; read them by [`settings`](Self::settings).
    pub parameters: Option<&'a serde_json::Value>,
}

impl<'a> LoadContext<'a> {
    /// A context for one sequence, without checkpoint and attention.
    #[must_use]
    pub fn new(device: &'a Device, target: &'a TargetFacts, config: &'a EngineConfig) -> Self {
        Self {
            device,
            target,
            checkpoint: None,
            config,
            attention: &[],
            moe: None,
            num_speculative_tokens: None,
            pool_pages: 0,
            page_size: 16,
            kv_dtype: KvDType::F16,
            max_sequences: 1,
            max_rows: 512,
            tree_nodes: 0,
            parameters: None,
        }
    }

    /// The parameters of `proposer` as its own type, the defaults where the user gave none.
    ///
    /// # Errors
    /// A sentence that names the field at fault.
    pub fn settings<T: DeserializeOwned + Default>(&self, proposer: &str) -> Result<T, ProposerError> {
        let Some(parameters) = self.parameters else { return Ok(T::default()) };
        T::deserialize(parameters)
            .map_err(|error| ProposerError::Unsupported(format!("speculative.parameters of '{proposer}': {error}")))
    }
}

/// A sequence that wants a draft.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct DraftSequence<'a> {
    /// Its identifier, the same in every step.
    pub id: u64,
    /// All committed tokens, prompt included. The last is the anchor: it has no K and V yet, and its position is
    /// `tokens.len() - 1`.
    pub tokens: &'a [u32],
    /// Tokens wanted, at most [`Drafter::max_tokens`]; with a tree, its levels.
    pub width: u32,
    /// Its pages; they cover the anchor and `max_tokens` positions behind it, or as many as a tree has nodes where
    /// these are more.
    pub pages: &'a [i32],
    /// How its tokens are chosen, where drafts that were drawn like this are worth more than the most likely ones. A
    /// drafter that draws does so with [`noise`](Self::noise), and gives [`Draft::drawn_from`]; temperature and cuts of
    /// its own change acceptance alone. One that cannot draw drafts the most likely.
    pub sampling: Option<&'a Sampling>,
}

impl<'a> DraftSequence<'a> {
    /// A sequence that wants the most likely tokens.
    #[must_use]
    pub const fn new(id: u64, tokens: &'a [u32], width: u32, pages: &'a [i32]) -> Self {
        Self { id, tokens, width, pages, sampling: None }
    }

    /// The noise, from 0 to below 1, that draws node `node` of this step's draft; 0 where the most likely are wanted. It
    /// is another in every step: a rule may judge a token by those behind it, so that what was drawn for a position
    /// once says something of why the position is drafted for again.
    #[must_use]
    pub fn noise(&self, node: u32) -> f64 {
        self.sampling.map_or(0.0, |sampling| sampling.noise_of(self.tokens.len() as u64, node, Purpose::Draft))
    }

    /// With tokens drawn like this.
    #[must_use]
    pub const fn drawn(mut self, sampling: Option<&'a Sampling>) -> Self {
        self.sampling = sampling;
        self
    }
}

/// What a drafter borrows from the target. Rows are f32.
pub trait TargetServices: Debug {
    /// Records the embedding of `rows` ids (u32 each) into `out` `[rows, hidden_size]`.
    ///
    /// # Errors
    /// Buffers that do not fit.
    fn embed(
        &self,
        commands: &mut Commands,
        ids: BufferSlice<'_>,
        rows: u32,
        out: BufferSlice<'_>,
    ) -> Result<(), ProposerError>;

    /// Records the output head on `rows` hidden states `[rows, hidden_size]` that carry their final norm, and the
    /// highest logit's id of each row from `first` on into `ids` (`[rows]`, u32); the ids before it stay as they are.
    ///
    /// # Errors
    /// Buffers that do not fit.
    fn head_argmax(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        first: u32,
        ids: BufferSlice<'_>,
    ) -> Result<(), ProposerError>;

    /// Records the output head on `rows` hidden states that carry their final norm, all logits into `logits`
    /// `[rows, vocab_size]`.
    ///
    /// # Errors
    /// Buffers that do not fit; a target that does not lend this.
    fn head_logits(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        logits: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        let _ = (commands, hidden, rows, logits);
        Err(ProposerError::Unsupported("this target lends no logits".into()))
    }

    /// Records the output head on `rows` hidden states that carry their final norm, and of each row the `k` likeliest
    /// ids, the most likely first, into `ids` (`[rows, k]`, u32), with the natural logarithms of their probabilities in
    /// `log_probabilities` (`[rows, k]`, f32). Where a row has fewer numbers than k, the id is `u32::MAX` and the
    /// logarithm −∞.
    ///
    /// # Errors
    /// Buffers that do not fit; a target that does not lend this.
    fn head_top_k(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        k: u32,
        ids: BufferSlice<'_>,
        log_probabilities: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        let _ = (commands, hidden, rows, k, ids, log_probabilities);
        Err(ProposerError::Unsupported("this target lends no candidates".into()))
    }
}

/// One call of [`Drafter::propose`].
#[derive(Debug)]
#[non_exhaustive]
pub struct ProposeContext<'a> {
    /// Where device work is recorded; the target's pass follows in the same stream. A drafter that must see a result on
    /// the host asks for it by [`Commands::read_back`] and submits by [`Commands::flush`].
    pub commands: &'a mut Commands,
    /// The sequences.
    pub sequences: &'a [DraftSequence<'a>],
    /// What the target lends.
    pub target: &'a dyn TargetServices,
    /// The tree that is wanted; `None` for chains. A drafter that makes none answers with chains.
    pub tree: Option<TreeWish<'a>>,
}

impl<'a> ProposeContext<'a> {
    /// A context of these parts, for chains.
    pub fn new(commands: &'a mut Commands, sequences: &'a [DraftSequence<'a>], target: &'a dyn TargetServices) -> Self {
        Self { commands, sequences, target, tree: None }
    }

    /// For trees.
    #[must_use]
    pub fn with_tree(mut self, tree: Option<TreeWish<'a>>) -> Self {
        self.tree = tree;
        self
    }
}

/// Drafted tokens, one draft for each sequence that was asked for, in that order.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Proposal {
    /// Known to the host. Up to `width` levels, of a tree up to as many nodes as were wanted; none is legal.
    Host(Vec<Draft>),
    /// Chains on the device, not read back yet, chosen without chance: element `s · stride` of `ids` (u32) is the anchor
    /// of sequence s, and its `counts[s]` drafted ids follow. So the target can take them as they lie.
    Device {
        /// The buffer.
        ids: Buffer,
        /// Elements from one sequence to the next.
        stride: u32,
        /// Drafted tokens of each sequence.
        counts: Vec<u32>,
    },
    /// What may stand in each slot, up to `width` of them, whatever stands before: the engine builds the trees. Only
    /// where a tree was wanted.
    Marginals(Vec<Marginals>),
}

/// Rows of one sequence that were committed.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CommittedRows<'a> {
    /// The sequence.
    pub id: u64,
    /// The row of the taps for each committed position, in the order of positions. After a chain or a chunk of a prompt
    /// they follow each other; after a tree they are the rows of the accepted path. The last row's logits chose the
    /// token behind it: after a verification and at the end of a prompt, the new anchor.
    pub rows: &'a [u32],
    /// Position of the first row in the sequence. Where it is not 0 and nothing was committed of this sequence before,
    /// the positions below are a prefix [used again](Drafter::reuse).
    pub position: u32,
    /// The sequence's tokens as far as they are known, beyond the committed rows: at least the one behind the last row,
    /// `tokens[position + rows.len()]`.
    pub tokens: &'a [u32],
    /// The sequence's pages, covering these positions.
    pub pages: &'a [i32],
}

impl<'a> CommittedRows<'a> {
    /// Rows of a sequence.
    #[must_use]
    pub const fn new(id: u64, rows: &'a [u32], position: u32, tokens: &'a [u32], pages: &'a [i32]) -> Self {
        Self { id, rows, position, tokens, pages }
    }

    /// Committed positions.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.rows.len() as u32
    }

    /// Whether the rows follow each other.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        self.rows.windows(2).all(|pair| pair[1] == pair[0] + 1)
    }
}

/// What was committed: chunks of prompts, the accepted rows of a verification, or both.
#[derive(Debug)]
#[non_exhaustive]
pub struct Outcome<'a> {
    /// Where device work is recorded; it runs before anything overwrites the taps.
    pub commands: &'a mut Commands,
    /// The committed rows.
    pub sequences: &'a [CommittedRows<'a>],
    /// `[rows, taps · hidden_size]` f32 of the pass, rejected rows included; `None` for a drafter without taps.
    pub taps: Option<&'a Buffer>,
    /// What the target lends.
    pub target: &'a dyn TargetServices,
}

impl<'a> Outcome<'a> {
    /// An outcome of these parts.
    pub fn new(
        commands: &'a mut Commands,
        sequences: &'a [CommittedRows<'a>],
        taps: Option<&'a Buffer>,
        target: &'a dyn TargetServices,
    ) -> Self {
        Self { commands, sequences, taps, target }
    }
}

/// What went wrong in a proposer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ProposerError {
    /// The method needs a checkpoint and was given none.
    #[error("proposer '{0}' needs a draft model: --draft-model DIR")]
    NoCheckpoint(&'static str),
    /// The checkpoint cannot be read.
    #[error("{0}")]
    Checkpoint(String),
    /// The checkpoint belongs to another target.
    #[error("the draft model does not fit the target: {0}")]
    Mismatch(String),
    /// The request cannot be met.
    #[error("{0}")]
    Unsupported(String),
    /// A proposer broke its own contract.
    #[error("proposer '{proposer}' is at fault: {what}")]
    Plugin {
        /// The proposer's name.
        proposer: &'static str,
        /// What it did.
        what: String,
    },
    /// A strategy breaks its contract: it panicked, or gave what does not fit.
    #[error("{kind} '{name}' is at fault: {what}")]
    Strategy {
        /// What it is, such as a tree builder.
        kind: &'static str,
        /// Its name.
        name: String,
        /// What it did.
        what: String,
    },
    /// Attention failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
