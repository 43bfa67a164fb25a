use std::{fmt::Debug, sync::Arc};

use polyattn_device::{BufferSlice, Commands, Device, DeviceError, DeviceFacts};

use crate::{AttentionProblem, BatchLayout, Capabilities, Decline, Plan, StoreRotated, store};

/// What an attention backend is: a name, what it can serve, and how to get a kernel for a problem it serves.
///
/// Implement it in a crate of its own, register it with [`register_backend!`](crate::register_backend), and name the
/// crate where the program is built (`use my_backend as _;`). `backends/plain` is the one to copy.
///
/// # What must hold
/// * [`declines`](Self::declines) is cheap, pure and honest: a problem it does not decline is served rightly.
/// * The answer is that of [`AttentionProblem`]'s contract. Nothing beyond a sequence's `kv_len` is read into a result,
///   whatever lies there.
/// * The writer of K and V belongs to the kernel ([`AttentionKernel::store_kv`]); one is provided for the common layouts.
///   A kernel that overrides it does not answer with the provided one to [`AttentionKernel::store_rotated`].
pub trait AttentionBackend: Debug + Send + Sync {
    /// The name users select it by: lower case, unique among the registered.
    fn name(&self) -> &'static str;

    /// What it can serve.
    fn capabilities(&self) -> &Capabilities;

    /// Every reason why it cannot serve `problem` on `device`; none if it can. Override it to add rules across fields.
    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        self.capabilities().declines(problem, device)
    }

    /// Compiles what `problem` needs. Slow; called once for each layer kind and phase.
    ///
    /// # Errors
    /// A problem it declines, or a device that fails.
    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError>;

    /// The same backend under the configuration that a user gave it (`backend_config`, a JSON object by backend name).
    /// A backend with settings reads its own type from `config` and answers a copy of itself; capabilities may differ.
    /// Provided: a backend without settings refuses.
    ///
    /// # Errors
    /// A sentence that names the field, its value and what there is instead.
    fn configured(&self, config: &serde_json::Value) -> Result<Arc<dyn AttentionBackend>, String> {
        Err(format!("{config} is given, but backend '{}' takes no configuration", self.name()))
    }
}

/// A kernel that serves one problem on one device.
pub trait AttentionKernel: Debug + Send + Sync {
    /// The problem it was prepared for.
    fn problem(&self) -> &AttentionProblem;

    /// Host-side work for a batch, done once a step and used by every layer of its kind.
    ///
    /// # Errors
    /// An invalid batch; no memory.
    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError>;

    /// Records the writing of the batch's new K and V rows into the cache. Provided for the common layouts.
    ///
    /// # Errors
    /// Buffers that do not fit the problem.
    fn store_kv(&self, commands: &mut Commands, plan: &Plan, io: &StoreKv<'_>) -> Result<(), BackendError> {
        store::store_kv(self.problem(), commands, plan, io)
    }

    /// Records the norm and the rotation of new queries and keys, and the writing of K and V, in one step; `false`, with
    /// nothing recorded, where the kernel has no such step for these rows: then the caller norms and rotates, and calls
    /// [`store_kv`](Self::store_kv). Both ways leave the same queries and the same cache.
    ///
    /// Provided: `false`, for only its author knows whether a kernel overrides `store_kv`. One that does not may answer
    /// with [`StoreRotated::record_provided`], which writes the same caches as the provided `store_kv`.
    ///
    /// # Errors
    /// Buffers that do not fit the problem.
    fn store_rotated(
        &self,
        _commands: &mut Commands,
        _plan: &Plan,
        _io: &StoreRotated<'_>,
    ) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Records moves of tokens within the cache of one layer, from slot to slot of the pool: of a tree's rows only the
    /// accepted path stays. They happen in order, so a slot that was moved away from may be moved to. Provided for the
    /// common layouts.
    ///
    /// # Errors
    /// Buffers that do not fit the problem.
    fn move_kv(&self, commands: &mut Commands, io: &MoveKv<'_>) -> Result<(), BackendError> {
        store::move_kv(self.problem(), commands, io)
    }

    /// Records the attention of one layer. Allocates nothing beyond wgpu's own recording.
    ///
    /// # Errors
    /// Buffers that do not fit the problem.
    fn encode(&self, commands: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError>;
}

/// What went wrong in a backend.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The batch contradicts itself, the problem or the cache.
    #[error("invalid batch: {0}")]
    Batch(String),
    /// A buffer is missing or too small.
    #[error("invalid buffers: {0}")]
    Io(String),
    /// The problem cannot be served.
    #[error("cannot serve the problem: {}", join(.0))]
    Declined(Vec<Decline>),
    /// A backend broke its own contract: it panicked, lied in its capabilities, or answered with a plan of another batch.
    #[error("attention backend '{backend}' is at fault: {what}")]
    Plugin {
        /// The backend's name.
        backend: &'static str,
        /// What it did.
        what: String,
    },
    /// A backend for mixtures of experts broke its own contract: it panicked.
    #[error("MoE backend '{backend}' is at fault: {what}")]
    MoePlugin {
        /// The backend's name.
        backend: &'static str,
        /// What it did.
        what: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

pub(crate) fn join(reasons: &[Decline]) -> String {
    reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// The buffers of one attention call.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AttentionIo<'a> {
    /// `[rows, query_heads, query_dim]` of the problem's dtype.
    pub q: BufferSlice<'a>,
    /// `[pages, page_size, kv_heads, head_dim]` of the cache's dtype; with MLA `[pages, page_size, latent_dim + rope_dim]`.
    pub k_cache: BufferSlice<'a>,
    /// `[pages, page_size, kv_heads, value_dim]`; with MLA the same range as `k_cache`, and not read.
    pub v_cache: BufferSlice<'a>,
    /// `[rows, query_heads, output_dim]`, f32.
    pub out: BufferSlice<'a>,
    /// `[rows, query_heads]`, f32, where the problem wants it.
    pub lse: Option<BufferSlice<'a>>,
    /// `[query_heads]`, f32, where the problem has sinks.
    pub sinks: Option<BufferSlice<'a>>,
    /// `[query_heads]`, f32, where the problem has ALiBi.
    pub alibi_slopes: Option<BufferSlice<'a>>,
    /// `[pages, page_size, kv_heads]`, f32, scales of a `q8` key cache.
    pub k_scale: Option<BufferSlice<'a>>,
    /// `[pages, page_size, kv_heads]`, f32, scales of a `q8` value cache.
    pub v_scale: Option<BufferSlice<'a>>,
}

impl<'a> AttentionIo<'a> {
    /// The buffers every call has.
    pub fn new(
        q: impl Into<BufferSlice<'a>>,
        k_cache: impl Into<BufferSlice<'a>>,
        v_cache: impl Into<BufferSlice<'a>>,
        out: impl Into<BufferSlice<'a>>,
    ) -> Self {
        Self {
            q: q.into(),
            k_cache: k_cache.into(),
            v_cache: v_cache.into(),
            out: out.into(),
            lse: None,
            sinks: None,
            alibi_slopes: None,
            k_scale: None,
            v_scale: None,
        }
    }

    /// Checks sizes against `problem` and `batch`, so that a kernel may index without checks.
    ///
    /// # Errors
    /// [`BackendError::Io`] naming the buffer, the bytes it has and the bytes it needs.
    pub fn validate(&self, problem: &AttentionProblem, batch: &BatchLayout) -> Result<(), BackendError> {
        let rows = u64::from(batch.rows());
        let heads = u64::from(problem.kind.query_heads());
        let slots = u64::from(batch.pool_pages) * u64::from(batch.page_size);
        let kv_heads = u64::from(problem.kind.kv_heads());
        let kv_bytes = problem.kv_dtype.bytes();
        let check = |name: &str, slice: &BufferSlice<'_>, needed: u64| {
            if slice.bytes() < needed {
                return Err(BackendError::Io(format!("{name} has {} bytes, needs {needed}", slice.bytes())));
            }
            Ok(())
        };
        let optional = |name: &str, slice: Option<&BufferSlice<'_>>, wanted: bool, needed: u64| match (slice, wanted) {
            (Some(slice), true) => check(name, slice, needed),
            (None, true) => Err(BackendError::Io(format!("{name} is missing"))),
            (_, false) => Ok(()),
        };
        let scaled = problem.kv_dtype == crate::KvDType::Q8;
        check("q", &self.q, rows * heads * u64::from(problem.kind.query_dim()) * problem.dtype.bytes())?;
        check("k_cache", &self.k_cache, slots * kv_heads * u64::from(problem.kind.query_dim()) * kv_bytes)?;
        if matches!(problem.kind, crate::AttentionKind::Gqa { .. }) {
            check("v_cache", &self.v_cache, slots * kv_heads * u64::from(problem.kind.output_dim()) * kv_bytes)?;
        }
        check("out", &self.out, rows * heads * u64::from(problem.kind.output_dim()) * 4)?;
        optional("lse", self.lse.as_ref(), problem.lse, rows * heads * 4)?;
        optional("sinks", self.sinks.as_ref(), problem.sinks, heads * 4)?;
        optional("alibi_slopes", self.alibi_slopes.as_ref(), problem.alibi, heads * 4)?;
        optional("k_scale", self.k_scale.as_ref(), scaled, slots * kv_heads * 4)?;
        optional("v_scale", self.v_scale.as_ref(), scaled, slots * kv_heads * 4)
    }
}

/// New rows of K and V on their way into a cache. Rows are f32 and may lie in one buffer with other things: row r of K
/// starts at element `k_offset + r · k_stride`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StoreKv<'a> {
    /// Buffer of the K rows; a row is `[kv_heads, head_dim]`, with MLA `[latent_dim + rope_dim]`.
    pub k: BufferSlice<'a>,
    /// First element of row 0 of K.
    pub k_offset: u32,
    /// Elements from one K row to the next.
    pub k_stride: u32,
    /// Buffer of the V rows, `[kv_heads, value_dim]` each. Not read with MLA.
    pub v: BufferSlice<'a>,
    /// First element of row 0 of V.
    pub v_offset: u32,
    /// Elements from one V row to the next.
    pub v_stride: u32,
    /// The key cache, as in [`AttentionIo`].
    pub k_cache: BufferSlice<'a>,
    /// The value cache.
    pub v_cache: BufferSlice<'a>,
    /// The scales of a `q8` key cache, as in [`AttentionIo`]: a 127th of the largest magnitude of a head's row; NaN
    /// where a number of it is not finite.
    pub k_scale: Option<BufferSlice<'a>>,
    /// The scales of a `q8` value cache. Not written with MLA.
    pub v_scale: Option<BufferSlice<'a>>,
}

impl<'a> StoreKv<'a> {
    /// Rows of `k` and `v` that lie in one buffer, `stride` elements from row to row.
    #[must_use]
    pub fn from_rows(
        rows: impl Into<BufferSlice<'a>>,
        stride: u32,
        k_offset: u32,
        v_offset: u32,
        k_cache: impl Into<BufferSlice<'a>>,
        v_cache: impl Into<BufferSlice<'a>>,
    ) -> Self {
        let rows = rows.into();
        Self {
            k: rows,
            k_offset,
            k_stride: stride,
            v: rows,
            v_offset,
            v_stride: stride,
            k_cache: k_cache.into(),
            v_cache: v_cache.into(),
            k_scale: None,
            v_scale: None,
        }
    }
}

/// Tokens on their way from slot to slot of one layer's cache.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MoveKv<'a> {
    /// From which slot to which: page · page size + place in the page.
    pub moves: &'a [[u32; 2]],
    /// The same as u32 words on the device.
    pub words: BufferSlice<'a>,
    /// Tokens of a page.
    pub page_size: u32,
    /// The key cache, as in [`AttentionIo`].
    pub k_cache: BufferSlice<'a>,
    /// The value cache.
    pub v_cache: BufferSlice<'a>,
    /// The scales of a `q8` key cache.
    pub k_scale: Option<BufferSlice<'a>>,
    /// The scales of a `q8` value cache.
    pub v_scale: Option<BufferSlice<'a>>,
}

impl<'a> MoveKv<'a> {
    /// These moves, which `words` holds on the device.
    pub fn new(
        moves: &'a [[u32; 2]],
        words: impl Into<BufferSlice<'a>>,
        page_size: u32,
        k_cache: impl Into<BufferSlice<'a>>,
        v_cache: impl Into<BufferSlice<'a>>,
    ) -> Self {
        Self {
            moves,
            words: words.into(),
            page_size,
            k_cache: k_cache.into(),
            v_cache: v_cache.into(),
            k_scale: None,
            v_scale: None,
        }
    }
}
