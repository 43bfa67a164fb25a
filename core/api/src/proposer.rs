use std::{fmt::Debug, path::Path, sync::Arc};

use polyattn_device::{Buffer, BufferSlice, Commands, Device, DeviceError};
use serde::Serialize;

use crate::{AttentionKernel, BackendError, EngineConfig, KvDType, ModelConfig, default_draft_config};

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
/// before the first proposal.
pub trait Drafter: Debug + Send {
    /// The target's layers whose output it must see; none by default.
    fn taps(&self) -> &TapSpec;

    /// The most tokens it proposes for a sequence in one step.
    fn max_tokens(&self) -> u32;

    /// The tokens that are verified a step where the user asked for no number; by default as many as it proposes.
    fn default_tokens(&self) -> u32 {
        self.max_tokens()
    }

    /// Drafts for every sequence of the step. GPU work goes into `context.commands`.
    ///
    /// # Errors
    /// Any; the engine then decodes this step without a draft.
    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError>;

    /// Learns what was accepted: the taps of exactly those rows.
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
}

impl TargetFacts {
    /// The facts of a target.
    #[must_use]
    pub const fn new(layers: u32, hidden_size: u32, vocab_size: u32, context_length: u32) -> Self {
        Self { layers, hidden_size, vocab_size, context_length }
    }
}

/// Layers of the target whose output a drafter sees: 0-based, output of the layer, before any final norm. Their f32
/// rows are concatenated in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TapSpec {
    /// Layer ids.
    pub layers: Vec<u32>,
}

/// A kernel for one layer kind of a draft, on the backend that was selected for it.
#[derive(Clone, Debug)]
pub struct DraftAttention {
    /// The layer kind's name, as [`Proposer::describe`] gave it.
    pub layer: Arc<str>,
    /// The kernel.
    pub kernel: Arc<dyn AttentionKernel>,
}

/// What a proposer loads with.
#[derive(Debug)]
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
    /// Rows committed at once at the most (the size of a prefill chunk).
    pub max_rows: u32,
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
            num_speculative_tokens: None,
            pool_pages: 0,
            page_size: 16,
            kv_dtype: KvDType::F16,
            max_sequences: 1,
            max_rows: 512,
        }
    }
}

/// A sequence that wants a draft.
#[derive(Clone, Copy, Debug)]
pub struct DraftSequence<'a> {
    /// Its identifier, the same in every step.
    pub id: u64,
    /// All committed tokens, prompt included. The last is the anchor: it has no K and V yet, and its position is
    /// `tokens.len() - 1`.
    pub tokens: &'a [u32],
    /// Tokens wanted, at most [`Drafter::max_tokens`].
    pub width: u32,
    /// Its pages; they cover the anchor and `max_tokens` positions behind it.
    pub pages: &'a [i32],
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
}

/// One call of [`Drafter::propose`].
#[derive(Debug)]
#[non_exhaustive]
pub struct ProposeContext<'a> {
    /// Where device work is recorded; the target's pass follows in the same stream.
    pub commands: &'a mut Commands,
    /// The sequences.
    pub sequences: &'a [DraftSequence<'a>],
    /// What the target lends.
    pub target: &'a dyn TargetServices,
}

impl<'a> ProposeContext<'a> {
    /// A context of these parts.
    pub fn new(commands: &'a mut Commands, sequences: &'a [DraftSequence<'a>], target: &'a dyn TargetServices) -> Self {
        Self { commands, sequences, target }
    }
}

/// Drafted tokens, each sequence a chain. They were chosen as the most likely, not sampled: the draft's distribution is
/// one-hot.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Proposal {
    /// Known to the host: for each sequence up to `width` tokens; none is legal.
    Host(Vec<Vec<u32>>),
    /// On the device, not read back yet: element `s · stride` of `ids` (u32) is the anchor of sequence s, and its
    /// `counts[s]` drafted ids follow. So the target can take them as they lie.
    Device {
        /// The buffer.
        ids: Buffer,
        /// Elements from one sequence to the next.
        stride: u32,
        /// Drafted tokens of each sequence.
        counts: Vec<u32>,
    },
}

/// Rows of one sequence that were committed.
#[derive(Clone, Copy, Debug)]
pub struct CommittedRows<'a> {
    /// The sequence.
    pub id: u64,
    /// First row in the taps.
    pub first_row: u32,
    /// Number of rows.
    pub rows: u32,
    /// Position of the first row in the sequence.
    pub position: u32,
    /// The sequence's pages, covering these positions.
    pub pages: &'a [i32],
}

/// What was committed: a chunk of a prompt, or the accepted rows of a verification.
#[derive(Debug)]
#[non_exhaustive]
pub struct Outcome<'a> {
    /// Where device work is recorded; it runs before anything overwrites the taps.
    pub commands: &'a mut Commands,
    /// The committed rows.
    pub sequences: &'a [CommittedRows<'a>],
    /// `[rows, taps · hidden_size]` f32 of the pass, rejected rows included; `None` for a drafter without taps.
    pub taps: Option<&'a Buffer>,
}

impl<'a> Outcome<'a> {
    /// An outcome of these parts.
    pub fn new(commands: &'a mut Commands, sequences: &'a [CommittedRows<'a>], taps: Option<&'a Buffer>) -> Self {
        Self { commands, sequences, taps }
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
    /// Attention failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
