//! Mixtures of experts as plugins: what must be computed, who can, and who is chosen.

use std::{fmt::Debug, sync::Arc};

use polyattn_device::{Buffer, BufferSlice, Commands, DType, Device, DeviceFacts};
use serde::{Serialize, Serializer, ser::SerializeStruct};

use crate::{
    BackendError, BackendName, ConfigError, Decline, Declined, EngineConfig, Policy, RegisteredMoeBackend, Registry,
    ResolveError, Role, backend::join,
};

/// What a mixture of experts must compute, without data: everything that decides whether a backend can serve it.
///
/// # The contract of an answer
/// `out[r] += Σ_j weights[r, j] · down[e] (silu(gate[e] x[r]) · up[e] x[r])` with `e = ids[r, j]`, in f32. The experts of
/// a row are chosen before; no row chooses one twice. What stands in experts that a row did not choose, and in other rows,
/// does not touch its answer, down to the bits: a row of a verify pass equals the row that plain decoding computes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MoeProblem {
    /// Whose it is.
    pub role: Role,
    /// The layer kind's name, for messages.
    pub layer: Arc<str>,
    /// Elements of a row.
    pub hidden_size: u32,
    /// Width of an expert's SwiGLU.
    pub intermediate_size: u32,
    /// Experts to choose from.
    pub experts: u32,
    /// Experts of a row.
    pub experts_per_token: u32,
    /// Format of the experts' weights.
    pub dtype: DType,
}

impl MoeProblem {
    /// A problem of the target.
    #[must_use]
    pub fn new(hidden_size: u32, intermediate_size: u32, experts: u32, experts_per_token: u32, dtype: DType) -> Self {
        let (role, layer) = (Role::Target, "experts".into());
        Self { role, layer, hidden_size, intermediate_size, experts, experts_per_token, dtype }
    }

    /// For this role, of the layer kind with this name.
    #[must_use]
    pub fn serving(mut self, role: Role, layer: impl Into<Arc<str>>) -> Self {
        self.role = role;
        self.layer = layer.into();
        self
    }

    /// Bytes of one expert's gates and ups; its other matrix has half of them.
    #[must_use]
    pub fn gate_up_bytes(&self) -> u64 {
        2 * u64::from(self.intermediate_size) * u64::from(self.hidden_size) * self.dtype.bytes()
    }

    fn described(&self) -> String {
        format!("the experts of {} layer '{}'", self.role, self.layer)
    }
}

/// What a backend for mixtures of experts is: a name, what it can serve, and how to get a kernel.
///
/// Implement it in a crate of its own, register it with [`register_moe_backend!`](crate::register_moe_backend), and name
/// the crate where the program is built (`use my_backend as _;`). `backends/moe-dense` is the one to copy.
pub trait MoeBackend: Debug + Send + Sync {
    /// The name users select it by: lower case, unique among the registered.
    fn name(&self) -> &'static str;

    /// Every reason why it cannot serve `problem` on `device`; none if it can. Cheap, pure and honest.
    fn declines(&self, problem: &MoeProblem, device: &DeviceFacts) -> Vec<Decline>;

    /// Makes a kernel for calls of up to `rows` rows, with the memory it needs between its operations. Called once for
    /// each model.
    ///
    /// # Errors
    /// A problem it declines, or a device that fails.
    fn prepare(&self, device: &Device, problem: &MoeProblem, rows: u32) -> Result<Arc<dyn MoeKernel>, BackendError>;
}

/// A kernel that serves one problem on one device.
pub trait MoeKernel: Debug + Send + Sync {
    /// The problem it was prepared for.
    fn problem(&self) -> &MoeProblem;

    /// Records the experts of one layer. Allocates nothing on a GPU, and reads nothing back.
    ///
    /// # Errors
    /// Buffers that do not fit the problem, more rows than it was prepared for.
    fn encode(&self, commands: &mut Commands, io: &MoeIo<'_>) -> Result<(), BackendError>;
}

/// The buffers of one layer's experts.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MoeIo<'a> {
    /// `[rows, hidden_size]`, f32, normed.
    pub x: BufferSlice<'a>,
    /// Rows.
    pub rows: u32,
    /// `[rows, experts_per_token]`, u32.
    pub ids: BufferSlice<'a>,
    /// `[rows, experts_per_token]`, f32.
    pub weights: BufferSlice<'a>,
    /// `[experts, 2 · intermediate_size, hidden_size]` of the problem's dtype: each expert's gates, then its ups.
    pub gate_up: &'a Buffer,
    /// `[experts, hidden_size, intermediate_size]` of the problem's dtype.
    pub down: &'a Buffer,
    /// `[rows, hidden_size]`, f32, added to.
    pub out: BufferSlice<'a>,
}

impl<'a> MoeIo<'a> {
    /// The buffers of a call, in the order of the fields.
    #[must_use]
    pub const fn new(
        x: BufferSlice<'a>,
        rows: u32,
        ids: BufferSlice<'a>,
        weights: BufferSlice<'a>,
        gate_up: &'a Buffer,
        down: &'a Buffer,
        out: BufferSlice<'a>,
    ) -> Self {
        Self { x, rows, ids, weights, gate_up, down, out }
    }
}

/// Who serves the experts of one layer kind.
#[derive(Clone, Debug)]
pub struct ResolvedMoe {
    /// The problem that was posed.
    pub problem: MoeProblem,
    /// The backend that serves it.
    pub backend: RegisteredMoeBackend,
    /// What was asked for.
    pub policy: Policy,
    /// Everybody else.
    pub declined: Vec<Declined>,
}

impl Serialize for ResolvedMoe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("ResolvedMoe", 4)?;
        out.serialize_field("layer", &*self.problem.layer)?;
        out.serialize_field("backend", self.backend.name())?;
        out.serialize_field("policy", self.policy.name())?;
        out.serialize_field("declined", &self.declined)?;
        out.end()
    }
}

/// Why nobody serves a mixture of experts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MoeSelectionError {
    /// An explicit choice cannot serve.
    #[error("MoE backend '{backend}' cannot serve {problem}: {}", join(.reasons))]
    Required {
        /// The backend's name.
        backend: String,
        /// Role and layer, in words.
        problem: String,
        /// Every reason.
        reasons: Vec<Decline>,
    },
    /// Nobody can.
    #[error("no MoE backend can serve {problem}: {declined}")]
    Nobody {
        /// Role and layer, in words.
        problem: String,
        /// Everybody, with every reason.
        declined: String,
    },
    /// A name that nobody registered.
    #[error("unknown MoE backend '{name}'; registered are: {registered}")]
    Unknown {
        /// The name.
        name: String,
        /// The names there are.
        registered: String,
    },
}

/// Chooses a backend for `problem`: the one of this name, or the one of highest priority that can serve it. A pure
/// function of its arguments.
///
/// # Errors
/// An unknown name, a named one that cannot serve (it never falls back), or nobody who can.
pub fn select_moe(
    problem: MoeProblem,
    device: &DeviceFacts,
    registry: &Registry,
    name: Option<&str>,
) -> Result<ResolvedMoe, MoeSelectionError> {
    let backends = registry.moe_backends();
    let named = name.and_then(BackendName::parse);
    let place = match &named {
        None => None,
        Some(name) => Some(backends.iter().position(|backend| backend.name() == name.as_str()).ok_or_else(|| {
            MoeSelectionError::Unknown { name: name.to_string(), registered: registry.moe_backend_names() }
        })?),
    };
    let mut reasons: Vec<_> = backends.iter().map(|backend| backend.declines(&problem, device)).collect();
    let chosen = match place {
        Some(place) if !reasons[place].is_empty() => {
            let (backend, reasons) = (backends[place].name().to_owned(), reasons.swap_remove(place));
            return Err(MoeSelectionError::Required { backend, problem: problem.described(), reasons });
        }
        place => place.or_else(|| reasons.iter().position(Vec::is_empty)),
    };
    let Some(chosen) = chosen else {
        let all = backends.iter().zip(&reasons).map(|(one, reasons)| format!("{}: {}", one.name(), join(reasons)));
        let mut declined = all.collect::<Vec<_>>().join(" | ");
        if backends.is_empty() {
            declined = "none is registered; name each backend crate where the program is built".into();
        }
        return Err(MoeSelectionError::Nobody { problem: problem.described(), declined });
    };
    let others = backends.iter().zip(reasons).enumerate().filter(|(place, _)| *place != chosen);
    let declined = others.map(|(_, (one, reasons))| Declined { backend: one.name(), reasons }).collect();
    let policy = named.map_or(Policy::Auto, Policy::Require);
    Ok(ResolvedMoe { problem, backend: backends[chosen].clone(), policy, declined })
}

/// Who serves the experts of a model under its configuration; nobody is asked, and no name looked at, where it has none.
/// `path` is where the configuration has the model.
pub(crate) fn resolve_moe(
    role: Role,
    path: &str,
    config: &EngineConfig,
    device: &DeviceFacts,
    registry: &Registry,
) -> Result<Vec<ResolvedMoe>, ResolveError> {
    let mut resolved = Vec::new();
    for (place, layer) in config.model.layers.iter().enumerate() {
        let Some(moe) = &layer.moe else { continue };
        let path = format!("{path}.layers[{place}].moe");
        for (field, value) in [
            ("experts", moe.experts),
            ("experts_per_token", moe.experts_per_token),
            ("hidden_size", moe.hidden_size),
            ("intermediate_size", moe.intermediate_size),
        ] {
            if value == 0 {
                let message = "0 is out of range, at least 1".to_owned();
                return Err(ConfigError { field: format!("{path}.{field}"), message }.into());
            }
        }
        if moe.experts_per_token > moe.experts {
            let message = format!("{} of {} experts cannot be chosen", moe.experts_per_token, moe.experts);
            return Err(ConfigError { field: format!("{path}.experts_per_token"), message }.into());
        }
        let dtype = moe.dtype.unwrap_or(config.model.dtype);
        let problem =
            MoeProblem::new(moe.hidden_size, moe.intermediate_size, moe.experts, moe.experts_per_token, dtype)
                .serving(role, layer.name.as_str());
        let one = select_moe(problem, device, registry, config.kernel.moe_backend.as_deref())?;
        let (layer, backend, policy) = (&*one.problem.layer, one.backend.name(), one.policy.name());
        tracing::info!(%role, layer, backend, policy, "MoE backend selected");
        resolved.push(one);
    }
    Ok(resolved)
}
