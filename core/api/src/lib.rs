//! What every plugin of polyattn depends on.
//!
//! * [`AttentionProblem`] says what must be computed, without data; [`Capabilities`] what a backend can serve;
//!   [`Decline`] why it cannot.
//! * [`AttentionBackend`] and [`AttentionKernel`] are what the author of a backend implements,
//!   [`Proposer`] and [`Drafter`] what the author of a drafter implements, [`MoeBackend`] and [`MoeKernel`] the author of
//!   a backend for mixtures of experts. [`register_backend!`], [`register_moe_backend!`] and
//!   [`register_proposer!`] put them into [`Registry::global`].
//! * [`select`](fn@select) chooses for one problem, [`resolve()`](fn@resolve) for a whole [`EngineConfig`]: pure functions of
//!   data.
//!
//! A backend in full is shown at [`AttentionBackend`].

#![forbid(unsafe_code)]

mod acceptance;
mod backend;
mod batch;
mod capabilities;
mod cascade;
mod config;
mod decline;
mod draft;
mod guard;
mod layout;
mod length;
mod merge;
mod moe;
mod narrow;
mod plan;
mod problem;
mod proposer;
mod registry;
mod remedy;
mod resolve;
mod resolver;
mod rotated;
mod sampling;
mod select;
mod store;
pub mod strategy;
mod tree;

pub use acceptance::{
    AcceptanceRule, Accepted, Block, Greedy, Match, Rejection, Synthetic, TargetRows, Typical, Verification,
};
pub use backend::{AttentionBackend, AttentionIo, AttentionKernel, BackendError, MoveKv, StoreKv};
pub use batch::{BatchLayout, TreeMask};
pub use capabilities::{Capabilities, DeviceNeed, Dims, DtypeSet, KvDtypeSet, PhaseSet};
pub use cascade::Cascade;
pub use config::{
    AttentionConfig, BackendChoice, BackendName, ConfigError, EngineConfig, KernelConfig, KvCacheConfig, LayerConfig,
    LayerKind, ModelConfig, MoeConfig, SpeculativeConfig, WindowConfig, default_draft_config,
};
pub use decline::Decline;
pub use draft::{Candidate, Distribution, Draft, Marginals};
pub use guard::contained;
pub use layout::{LayoutError, Reader};
pub use length::{Adaptive, Fixed, LengthPolicy, LengthWish, PerBatchSize, SequenceObserved, StepObserved};
pub use merge::{AttentionState, MergeStates, merge_states};
pub use moe::{MoeBackend, MoeIo, MoeKernel, MoeProblem, MoeSelectionError, ResolvedMoe, select_moe};
pub use plan::{BATCH_WGSL, Plan, PlanPool};
pub use polyattn_device::{
    self as device, Buffer, BufferSlice, Commands, DType, Device, DeviceError, DeviceFacts, DeviceKind,
};
pub use problem::{AttentionKind, AttentionProblem, KvDType, KvLayout, Mask, Phase, Role, Window};
pub use proposer::{
    CommittedRows, DraftAttention, DraftSequence, Drafter, LoadContext, Outcome, PrefixReuse, Proposal, ProposeContext,
    Proposer, ProposerError, ProposerRequirements, TapSpec, TargetFacts, TargetServices,
};
pub use registry::{
    BackendEntry, INTERFACE_VERSION, MoeBackendEntry, Origin, ProposerEntry, RegisteredBackend, RegisteredMoeBackend,
    RegisteredProposer, Registry, RegistryBuilder, RegistryError,
};
pub use resolve::{Resolution, ResolveError, ResolvedLayer, resolve};
pub use resolver::Resolver;
pub use rotated::{
    HEAD_PARTS_WGSL, HeadNorm, HeadPart, QuerySource, RotatedQueries, Rotation, StoreRotated, rotary_wgsl,
};
pub use sampling::{Purpose, Sampling};
pub use select::{Declined, Policy, Selection, SelectionError, select};
pub use strategy::{StrategyConfig, StrategyEntry};
pub use tree::{BestFirst, Chain, MOST_CANDIDATES, Static, TopK, TreeBuilder, TreeGrowth, TreeWish};

/// What the registration macros expand to; not for use by hand.
#[doc(hidden)]
pub mod macros {
    pub use inventory;
}
