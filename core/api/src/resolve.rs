use std::sync::Arc;

use polyattn_device::DeviceFacts;
use serde::{Serialize, Serializer, ser::SerializeStruct};

use crate::{
    AttentionProblem, BackendName, ConfigError, Declined, EngineConfig, KvLayout, Mask, ModelConfig, Phase, Policy,
    RegisteredBackend, RegisteredProposer, Registry, Role, SelectionError, Window, WindowConfig, select,
};

/// Who serves one layer kind in one phase.
#[derive(Clone, Debug)]
pub struct ResolvedLayer {
    /// The problem that was posed.
    pub problem: AttentionProblem,
    /// The backend that serves it.
    pub backend: RegisteredBackend,
    /// `auto`, `prefer` or `require`.
    pub policy: &'static str,
    /// Everybody else.
    pub declined: Vec<Declined>,
}

impl ResolvedLayer {
    /// Whether the layer is bidirectional.
    #[must_use]
    pub fn use_non_causal(&self) -> bool {
        self.problem.mask == Mask::Bidirectional
    }
}

impl Serialize for ResolvedLayer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("ResolvedLayer", 6)?;
        out.serialize_field("layer", &*self.problem.layer)?;
        out.serialize_field("phase", &self.problem.phase)?;
        out.serialize_field("backend", self.backend.name())?;
        out.serialize_field("policy", self.policy)?;
        out.serialize_field("use_non_causal", &self.use_non_causal())?;
        out.serialize_field("declined", &self.declined)?;
        out.end()
    }
}

/// Who serves a whole configuration.
#[derive(Clone, Debug)]
pub struct Resolution {
    /// The target's layer kinds in each of its phases.
    pub target: Vec<ResolvedLayer>,
    /// The draft's layer kinds; empty where the proposer runs no attention.
    pub draft: Vec<ResolvedLayer>,
    /// The configuration the draft runs under, where there is a draft.
    pub draft_config: Option<EngineConfig>,
    /// The proposer.
    pub proposer: Option<RegisteredProposer>,
}

impl Resolution {
    /// The layer kind of this name in this phase.
    #[must_use]
    pub fn find(&self, role: Role, phase: Phase, layer: &str) -> Option<&ResolvedLayer> {
        let layers = match role {
            Role::Target => &self.target,
            Role::Draft => &self.draft,
        };
        layers.iter().find(|one| one.problem.phase == phase && &*one.problem.layer == layer)
    }
}

#[derive(Serialize)]
struct DraftConfigAnswer<'a> {
    attention: &'a crate::AttentionConfig,
    kernel: &'a crate::KernelConfig,
}

#[derive(Serialize)]
struct LayoutAnswer {
    target: Option<KvLayout>,
    draft: Option<KvLayout>,
    shared: Option<bool>,
}

impl Serialize for Resolution {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let layout = |layers: &[ResolvedLayer]| layers.first().map(|layer| layer.problem.kv_layout);
        let (target, draft) = (layout(&self.target), layout(&self.draft));
        let one = self.target.iter().chain(&self.draft).all(|layer| Some(layer.problem.kv_layout) == target);
        let mut out = serializer.serialize_struct("Resolution", 4)?;
        out.serialize_field("target", &self.target)?;
        out.serialize_field("draft", &self.draft)?;
        out.serialize_field(
            "draft_config",
            &self
                .draft_config
                .as_ref()
                .map(|config| DraftConfigAnswer { attention: &config.attention, kernel: &config.kernel }),
        )?;
        out.serialize_field("kv_layout", &LayoutAnswer { target, draft, shared: draft.map(|_| one) })?;
        out.end()
    }
}

/// Why a configuration cannot be resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// The configuration is at fault.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Nobody serves one of its problems.
    #[error(transparent)]
    Selection(#[from] SelectionError),
}

/// Chooses a backend for each role, phase and layer kind of `config`. A pure function of its arguments.
///
/// # Errors
/// A configuration that contradicts itself, an unknown proposer or backend, or a problem that nobody serves.
pub fn resolve(config: &EngineConfig, device: &DeviceFacts, registry: &Registry) -> Result<Resolution, ResolveError> {
    let target_phases: &[Phase] = match config.speculative {
        Some(_) => &[Phase::Prefill, Phase::Decode, Phase::Verify],
        None => &[Phase::Prefill, Phase::Decode],
    };
    if let Policy::Prefer(name) | Policy::Require(name) = config.attention.backend.policy() {
        check_name("attention.backend", &name, registry)?;
    }
    if let Some(name) = config.speculative.as_ref().and_then(|speculative| speculative.attention_backend.as_ref()) {
        // Checked even where the proposer runs no attention: a name that is not there is never ignored.
        check_name("speculative.attention_backend", name, registry)?;
    }
    let target = resolve_model("target", config, Role::Target, target_phases, device, registry)?;
    let mut resolution = Resolution { target, draft: Vec::new(), draft_config: None, proposer: None };
    let Some(speculative) = &config.speculative else { return Ok(resolution) };

    let fail = |field: &str, message: String| ConfigError { field: format!("speculative.{field}"), message };
    let proposer = registry.proposer(&speculative.method).ok_or_else(|| {
        let names = registry.proposer_names();
        fail("method", format!("unknown proposer '{}'; registered are: {names}", speculative.method))
    })?;
    if speculative.num_speculative_tokens == Some(0) {
        return Err(fail("num_speculative_tokens", "0 tokens cannot be drafted, at least 1".into()).into());
    }
    let requirements = *proposer.proposer.requirements();
    let draft_config = proposer.proposer.draft_config(config);
    if requirements.draft_attention && speculative.draft.is_none() {
        let message = format!("missing, proposer '{}' runs attention of its own", proposer.proposer.name());
        return Err(fail("draft", message).into());
    }
    // Per layer or for all layers, but it must be asked for: without, a causal backend would be chosen in silence.
    let asks = draft_config.attention.use_non_causal
        || draft_config.model.layers.iter().any(|layer| layer.causal == Some(false));
    if requirements.non_causal && !asks {
        let message = format!(
            "proposer '{}' requires non-causal attention, but its draft_config does not ask for it",
            proposer.proposer.name()
        );
        return Err(fail("method", message).into());
    }
    if requirements.draft_attention {
        resolution.draft =
            resolve_model("speculative.draft", &draft_config, Role::Draft, &[Phase::Draft], device, registry)?;
    }
    resolution.draft_config = Some(draft_config);
    resolution.proposer = Some(proposer);
    Ok(resolution)
}

fn resolve_model(
    path: &str,
    config: &EngineConfig,
    role: Role,
    phases: &[Phase],
    device: &DeviceFacts,
    registry: &Registry,
) -> Result<Vec<ResolvedLayer>, ResolveError> {
    let policy = config.attention.backend.policy();
    let mut resolved = Vec::new();
    for base in problems(path, &config.model, config)? {
        for phase in phases {
            let problem = base.clone().serving(role, *phase);
            let selection = select(&problem, device, registry, &policy)?;
            tracing::info!(
                %role, %phase, layer = &*problem.layer, backend = selection.backend.name(), policy = policy.name(),
                "attention backend selected"
            );
            resolved.push(ResolvedLayer {
                problem,
                backend: selection.backend,
                policy: policy.name(),
                declined: selection.declined,
            });
        }
    }
    Ok(resolved)
}

/// Whether a window takes keys away. One that is unbounded asks nothing of a backend, nor does one that is open to the
/// left and stops in a causal layer's future.
fn narrows(window: Window, causal: bool) -> bool {
    window.left.is_some() || (window.right.is_some() && !causal)
}

/// A name that was asked for must be there, and the message must say which field asked.
fn check_name(field: &str, name: &BackendName, registry: &Registry) -> Result<(), ConfigError> {
    if registry.backend(name.as_str()).is_some() {
        return Ok(());
    }
    let unknown = SelectionError::Unknown { name: name.to_string(), registered: registry.backend_names() };
    Err(ConfigError { field: field.to_owned(), message: unknown.to_string() })
}

/// The problem of each layer kind of a model under a configuration.
fn problems(path: &str, model: &ModelConfig, config: &EngineConfig) -> Result<Vec<AttentionProblem>, ConfigError> {
    let fail = |field: String, message: String| Err(ConfigError { field, message });
    if model.layers.is_empty() {
        return fail(format!("{path}.layers"), "[] is empty, at least one layer kind".into());
    }
    if config.kv_cache.page_size == Some(0) {
        return fail("kv_cache.page_size".into(), "0 is out of range, at least 1".into());
    }
    let mut found: Vec<AttentionProblem> = Vec::new();
    for (place, layer) in model.layers.iter().enumerate() {
        let path = format!("{path}.layers[{place}]");
        if layer.name.is_empty() {
            return fail(format!("{path}.name"), "'' is empty, a layer kind needs a name".into());
        }
        if found.iter().any(|problem| *problem.layer == *layer.name) {
            return fail(format!("{path}.name"), format!("'{}' names two layer kinds", layer.name));
        }
        if !(1..=1_000_000).contains(&layer.count) {
            return fail(format!("{path}.count"), format!("{} is not between 1 and 1000000", layer.count));
        }
        if layer.window == Some(WindowConfig::Keys(0)) {
            return fail(format!("{path}.window"), "0 keys are no window, at least 1 (the query's own)".into());
        }
        if let Some(cap) = layer.softcap
            && (!cap.is_finite() || cap <= 0.0)
        {
            return fail(format!("{path}.softcap"), format!("{cap} is no positive number"));
        }
        let causal = layer.causal.unwrap_or(!config.attention.use_non_causal);
        let mut problem = AttentionProblem::new(layer.attention_kind(&path)?, model.dtype)
            .layer(Arc::<str>::from(layer.name.as_str()))
            .mask(if causal { Mask::Causal } else { Mask::Bidirectional })
            .window(layer.window.map(|window| window.sides(causal)).filter(|window| narrows(*window, causal)));
        problem.softcap = layer.softcap;
        problem.sinks = layer.sinks;
        problem.alibi = layer.alibi;
        problem.page_size = config.kv_cache.page_size;
        problem.kv_dtype = config.kv_cache.dtype.unwrap_or(model.dtype.into());
        found.push(problem);
    }
    Ok(found)
}
