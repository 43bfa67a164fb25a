use std::sync::Arc;

use polyattn_device::DeviceFacts;
use serde::{Serialize, Serializer, ser::SerializeStruct};

use crate::{
    AcceptanceRule, AttentionProblem, BackendChoice, ConfigError, Declined, EngineConfig, KvLayout, LengthPolicy, Mask,
    ModelConfig, Phase, Policy, RegisteredBackend, RegisteredProposer, Registry, ResolvedMoe, Role, SelectionError,
    SpeculativeConfig, TreeBuilder, Window, WindowConfig,
    backend::join,
    guard::contained,
    layout::{self, LayoutError, Reader, Wish},
    moe::{MoeSelectionError, resolve_moe},
};

/// Who serves one layer kind in one phase.
#[derive(Clone, Debug)]
pub struct ResolvedLayer {
    /// The problem that was posed.
    pub problem: AttentionProblem,
    /// The backend that serves it.
    pub backend: RegisteredBackend,
    /// What was asked for.
    pub policy: Policy,
    /// Everybody else.
    pub declined: Vec<Declined>,
}

impl ResolvedLayer {
    /// Whether the layer is bidirectional.
    #[must_use]
    pub fn use_non_causal(&self) -> bool {
        self.problem.mask == Mask::Bidirectional
    }

    /// The phase in words: `verify (tree)` where it is over a tree mask.
    #[must_use]
    pub fn phase_name(&self) -> String {
        let tree = if self.problem.mask == Mask::Tree { " (tree)" } else { "" };
        format!("{}{tree}", self.problem.phase)
    }

    /// The logs carry what `polyattn select` prints.
    fn log(&self) {
        let AttentionProblem { role, layer, kv_layout, .. } = &self.problem;
        let (phase, layer, kv_layout) = (self.phase_name(), &**layer, kv_layout.name());
        let (backend, policy) = (self.backend.name(), self.policy.name());
        tracing::info!(%role, %phase, layer, backend, policy, kv_layout, "attention backend selected");
        for Declined { backend, reasons } in &self.declined {
            if reasons.is_empty() {
                tracing::debug!(%role, %phase, layer, backend, "attention backend outranked");
            } else {
                let reasons = join(reasons);
                tracing::debug!(%role, %phase, layer, backend, reasons, "attention backend declined");
            }
        }
    }
}

impl Serialize for ResolvedLayer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tree = self.problem.mask == Mask::Tree;
        let mut out = serializer.serialize_struct("ResolvedLayer", 6 + usize::from(tree))?;
        out.serialize_field("layer", &*self.problem.layer)?;
        out.serialize_field("phase", &self.problem.phase)?;
        if tree {
            out.serialize_field("mask", &Mask::Tree)?;
        }
        out.serialize_field("backend", self.backend.name())?;
        out.serialize_field("policy", self.policy.name())?;
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
    /// Mixtures of experts of target and draft; empty where neither has any.
    pub moe: Vec<ResolvedMoe>,
    /// The configuration the draft runs under, where there is a draft.
    pub draft_config: Option<EngineConfig>,
    /// The proposer.
    pub proposer: Option<RegisteredProposer>,
}

impl Resolution {
    /// The mixtures of experts of a role.
    pub fn moe_of(&self, role: Role) -> impl Iterator<Item = &ResolvedMoe> {
        self.moe.iter().filter(move |moe| moe.problem.role == role)
    }

    /// The layer kind of this name in this phase, as chains need it.
    #[must_use]
    pub fn find(&self, role: Role, phase: Phase, layer: &str) -> Option<&ResolvedLayer> {
        let layers = match role {
            Role::Target => &self.target,
            Role::Draft => &self.draft,
        };
        let wanted = |one: &&ResolvedLayer| one.problem.phase == phase && one.problem.mask != Mask::Tree;
        layers.iter().filter(wanted).find(|one| &*one.problem.layer == layer)
    }
}

#[derive(Serialize)]
struct DraftConfigAnswer<'a> {
    attention: &'a crate::AttentionConfig,
    kernel: &'a crate::KernelConfig,
}

#[derive(Serialize)]
struct MoeAnswer<'a> {
    target: Vec<&'a ResolvedMoe>,
    draft: Vec<&'a ResolvedMoe>,
}

#[derive(Serialize)]
struct LayoutAnswer {
    target: Option<LayoutNames>,
    draft: Option<LayoutNames>,
    shared: Option<bool>,
}

/// One name, or a list where layer kinds differ.
#[derive(PartialEq, Serialize)]
#[serde(untagged)]
enum LayoutNames {
    One(KvLayout),
    Several(Vec<KvLayout>),
}

impl LayoutNames {
    fn of(layers: &[ResolvedLayer]) -> Option<Self> {
        let mut names: Vec<_> = layers.iter().map(|layer| layer.problem.kv_layout).collect();
        names.dedup();
        match names[..] {
            [] => None,
            [one] => Some(Self::One(one)),
            _ => Some(Self::Several(names)),
        }
    }
}

impl Serialize for Resolution {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (target, draft) = (LayoutNames::of(&self.target), LayoutNames::of(&self.draft));
        let one = matches!(target, Some(LayoutNames::One(_))) && target == draft;
        let shared = draft.is_some().then_some(one);
        let mut out = serializer.serialize_struct("Resolution", 5)?;
        out.serialize_field("target", &self.target)?;
        out.serialize_field("draft", &self.draft)?;
        out.serialize_field(
            "draft_config",
            &self
                .draft_config
                .as_ref()
                .map(|config| DraftConfigAnswer { attention: &config.attention, kernel: &config.kernel }),
        )?;
        out.serialize_field("kv_layout", &LayoutAnswer { target, draft, shared })?;
        if !self.moe.is_empty() {
            let [target, draft] = [Role::Target, Role::Draft].map(|role| self.moe_of(role).collect());
            out.serialize_field("moe", &MoeAnswer { target, draft })?;
        }
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
    /// Those who share a cache read no common layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Nobody serves its experts.
    #[error(transparent)]
    Moe(#[from] MoeSelectionError),
}

/// Chooses a backend for each role, phase and layer kind of `config`, and the layout of each cache. A pure function of
/// its arguments.
///
/// The phases of a layer kind share one cache, so their backends must read one layout; a proposer that reads the
/// target's cache shares it too ([`ProposerRequirements::shared_kv`](crate::ProposerRequirements)). Any other draft
/// takes the target's layout where that costs it no better backend.
///
/// # Errors
/// A configuration that contradicts itself, an unknown proposer or backend, a problem that nobody serves, or a cache
/// that its readers cannot agree on.
pub fn resolve(config: &EngineConfig, device: &DeviceFacts, registry: &Registry) -> Result<Resolution, ResolveError> {
    let configured;
    let registry = if config.backend_config.is_empty() {
        registry
    } else {
        configured = registry.configured(&config.backend_config)?;
        &configured
    };
    check_target_names(config, registry)?;
    let trees = match &config.speculative {
        Some(speculative) => check_strategies(speculative, registry)?,
        None => false,
    };
    let phases: &[(Phase, bool)] = match config.speculative {
        Some(_) if trees => {
            &[(Phase::Prefill, false), (Phase::Decode, false), (Phase::Verify, false), (Phase::Verify, true)]
        }
        Some(_) => &[(Phase::Prefill, false), (Phase::Decode, false), (Phase::Verify, false)],
        None => &[(Phase::Prefill, false), (Phase::Decode, false)],
    };
    let target = Model { path: "target", role: Role::Target, phases, config, device, registry };
    let mut moe = resolve_moe(Role::Target, "target", config, device, registry)?;
    let Some(speculative) = &config.speculative else {
        let target = target.resolve(None)?;
        return Ok(Resolution { target, draft: Vec::new(), moe, draft_config: None, proposer: None });
    };

    check_draft_names(speculative, registry)?;
    let fail = |field: &str, message: String| ConfigError { field: format!("speculative.{field}"), message };
    let proposer = registry.proposer(&speculative.method).ok_or_else(|| {
        let names = registry.proposer_names();
        fail("method", format!("unknown proposer '{}'; registered are: {names}", speculative.method))
    })?;
    if speculative.num_speculative_tokens == Some(0) {
        return Err(fail("num_speculative_tokens", "0 tokens cannot be drafted, at least 1".into()).into());
    }
    let name = proposer.proposer.name();
    let (requirements, draft_config) =
        contained(|| (*proposer.proposer.requirements(), proposer.proposer.draft_config(config)))
            .map_err(|message| fail("method", format!("proposer '{name}' panicked when asked: {message}")))?;
    if requirements.draft_attention && speculative.draft.is_none() {
        return Err(fail("draft", format!("missing, proposer '{name}' runs attention of its own")).into());
    }
    // Per layer or for all layers, but it must be asked for: without, a causal backend would be chosen in silence.
    let asks = draft_config.attention.use_non_causal
        || draft_config.model.layers.iter().any(|layer| layer.causal == Some(false));
    if requirements.non_causal && !asks {
        let message =
            format!("proposer '{name}' requires non-causal attention, but its draft_config does not ask for it");
        return Err(fail("method", message).into());
    }

    let (target, draft) = if requirements.draft_attention {
        let (path, role) = ("speculative.draft", Role::Draft);
        let phases: &[(Phase, bool)] = match trees && requirements.tree_attention {
            true => &[(Phase::Draft, false), (Phase::Draft, true)],
            false => &[(Phase::Draft, false)],
        };
        let draft = Model { path, role, phases, config: &draft_config, device, registry };
        if requirements.shared_kv { shared(&target, &draft)? } else { apart(&target, &draft)? }
    } else {
        (target.resolve(None)?, Vec::new())
    };
    // Without a model of its own the draft configuration still holds the target's layers.
    if speculative.draft.is_some() {
        moe.extend(resolve_moe(Role::Draft, "speculative.draft", &draft_config, device, registry)?);
    }
    Ok(Resolution { target, draft, moe, draft_config: Some(draft_config), proposer: Some(proposer) })
}

/// Each role with a cache of its own.
fn apart(target: &Model<'_>, draft: &Model<'_>) -> Result<(Vec<ResolvedLayer>, Vec<ResolvedLayer>), ResolveError> {
    let target = target.resolve(None)?;
    let wish = target.first().map(|layer| layer.problem.kv_layout);
    let draft = draft.resolve(wish.map(Wish::Prefer))?;
    Ok((target, draft))
}

/// One cache for both roles, so one layout.
fn shared(target: &Model<'_>, draft: &Model<'_>) -> Result<(Vec<ResolvedLayer>, Vec<ResolvedLayer>), ResolveError> {
    let free = (target.resolve(None)?, draft.resolve(None)?);
    let one = |layers: &[ResolvedLayer]| layers.first().map(|layer| layer.problem.kv_layout);
    let wanted = one(&free.0).into_iter().chain(one(&free.1));
    for layout in wanted.chain(free.0.iter().flat_map(|layer| KvLayout::of(layer.problem.kind)).copied()) {
        let wish = Some(Wish::Require(layout));
        if let (Ok(target), Ok(draft)) = (target.resolve(wish), draft.resolve(wish)) {
            return Ok((target, draft));
        }
    }
    let readers = free.0.iter().chain(&free.1).map(Reader::of).collect();
    Err(LayoutError { cache: "that target and draft share".into(), readers }.into())
}

/// A model to find backends for.
struct Model<'a> {
    /// Where the configuration has it, for messages.
    path: &'static str,
    role: Role,
    /// Each phase, and whether over a tree mask.
    phases: &'a [(Phase, bool)],
    config: &'a EngineConfig,
    device: &'a DeviceFacts,
    registry: &'a Registry,
}

impl Model<'_> {
    fn resolve(&self, wish: Option<Wish>) -> Result<Vec<ResolvedLayer>, ResolveError> {
        let bases = problems(self.path, &self.config.model, self.config)?;
        let section = match self.role {
            Role::Target => "attention.backend_per_kind",
            Role::Draft => "speculative.attention_backend_per_kind",
        };
        for name in self.config.attention.backend_per_kind.keys() {
            if !bases.iter().any(|base| *base.layer == **name) {
                let kinds: Vec<_> = bases.iter().map(|base| &*base.layer).collect();
                let message = format!("the {} has no layer kind of this name; it has: {}", self.role, kinds.join(", "));
                return Err(ConfigError { field: format!("{section}.{name}"), message }.into());
            }
        }
        let mut resolved = Vec::new();
        for base in bases {
            // A layer that is not causal has nothing to do with trees.
            let trees = self.phases.iter().any(|(_, tree)| *tree) && base.mask == Mask::Causal;
            if trees && let Some(fault) = no_tree(&base) {
                let field = "speculative.tree".to_owned();
                return Err(
                    ConfigError { field, message: format!("{} layer '{}' {fault}", self.role, base.layer) }.into()
                );
            }
            let layers: Vec<_> = self
                .phases
                .iter()
                .filter(|(_, tree)| trees || !tree)
                .map(|(phase, tree)| {
                    let choice = self.config.attention.choice(&base.layer, *phase);
                    let mask = if *tree { Mask::Tree } else { base.mask };
                    (base.clone().serving(self.role, *phase).mask(mask), choice.policy())
                })
                .collect();
            resolved.extend(layout::agree(&layers, wish, self.device, self.registry)?);
        }
        for layer in &resolved {
            layer.log();
        }
        Ok(resolved)
    }
}

/// Why a layer cannot be verified over a tree: attention takes a row's place in the cache for its position, so distances
/// are not those of the tree.
fn no_tree(problem: &AttentionProblem) -> Option<&'static str> {
    match problem {
        AttentionProblem { window: Some(_), .. } => Some("has a sliding window, which a tree's rows do not stand in"),
        AttentionProblem { alibi: true, .. } => Some("has ALiBi, whose distances a tree's rows do not have"),
        _ => None,
    }
}

/// The strategies must be there and take their parameters. Answers whether trees are asked for.
fn check_strategies(speculative: &SpeculativeConfig, registry: &Registry) -> Result<bool, ConfigError> {
    let fail = |field: &str, message: String| ConfigError { field: format!("speculative.{field}"), message };
    if let Some(rule) = &speculative.acceptance {
        registry.strategy::<dyn AcceptanceRule>(rule).map_err(|message| fail("acceptance", message))?;
    }
    if let Some(policy) = &speculative.length {
        registry.strategy::<dyn LengthPolicy>(policy).map_err(|message| fail("length", message))?;
    }
    match speculative.tree_nodes {
        Some(nodes) if !(1..=MOST_NODES).contains(&nodes) => {
            return Err(fail("tree_nodes", format!("{nodes} is out of range, 1 to {MOST_NODES}")));
        }
        Some(nodes) if speculative.tree.is_none() => {
            return Err(fail("tree_nodes", format!("{nodes} is given, but no tree")));
        }
        _ => {}
    }
    let Some(tree) = &speculative.tree else { return Ok(false) };
    let builder = registry.strategy::<dyn TreeBuilder>(tree).map_err(|message| fail("tree", message))?;
    Ok(builder.branches())
}

/// Nodes of a tree at the most.
const MOST_NODES: u32 = 1024;

/// The target's choices must name backends there are, and phases it has.
fn check_target_names(config: &EngineConfig, registry: &Registry) -> Result<(), ConfigError> {
    let attention = &config.attention;
    check_choice("attention.backend", &attention.backend, registry)?;
    for (phase, choice) in &attention.backend_per_phase {
        let field = format!("attention.backend_per_phase.{phase}");
        if *phase == Phase::Draft {
            let message = "the draft's backend is chosen by speculative.attention_backend".to_owned();
            return Err(ConfigError { field, message });
        }
        check_choice(&field, choice, registry)?;
    }
    for (kind, choice) in &attention.backend_per_kind {
        check_choice(&format!("attention.backend_per_kind.{kind}"), choice, registry)?;
    }
    Ok(())
}

/// Checked even where the proposer runs no attention: a name that is not there is never ignored.
fn check_draft_names(speculative: &SpeculativeConfig, registry: &Registry) -> Result<(), ConfigError> {
    let choice = BackendChoice::from(speculative.attention_backend.clone());
    check_choice("speculative.attention_backend", &choice, registry)?;
    for (kind, choice) in &speculative.attention_backend_per_kind {
        check_choice(&format!("speculative.attention_backend_per_kind.{kind}"), choice, registry)?;
    }
    Ok(())
}

/// A name that was asked for must be there, and the message must say which field asked.
fn check_choice(field: &str, choice: &BackendChoice, registry: &Registry) -> Result<(), ConfigError> {
    let (Policy::Prefer(name) | Policy::Require(name)) = choice.policy() else { return Ok(()) };
    if registry.backend(name.as_str()).is_some() {
        return Ok(());
    }
    let unknown = SelectionError::Unknown { name: name.to_string(), registered: registry.backend_names() };
    Err(ConfigError { field: field.to_owned(), message: unknown.to_string() })
}

/// Whether a window takes keys away. One that is unbounded asks nothing of a backend, nor does one that is open to the
/// left and stops in a causal layer's future.
fn narrows(window: Window, causal: bool) -> bool {
    window.left.is_some() || (window.right.is_some() && !causal)
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
        if let Some(scale) = layer.scale {
            if !scale.is_finite() || scale <= 0.0 {
                return fail(format!("{path}.scale"), format!("{scale} is no positive number"));
            }
            problem.scale = scale;
        }
        problem.softcap = layer.softcap;
        problem.sinks = layer.sinks;
        problem.alibi = layer.alibi;
        problem.page_size = config.kv_cache.page_size;
        problem.kv_dtype = config.kv_cache.dtype.unwrap_or(model.dtype.into());
        found.push(problem);
    }
    Ok(found)
}
