use std::{collections::BTreeMap, fmt, str::FromStr};

use polyattn_device::DType;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, Unexpected, Visitor, value::MapAccessDeserializer},
};

use crate::{AttentionKind, KvDType, Phase, Policy, StrategyConfig, Window};

/// The name of an attention backend: any case, kept in lower case. `auto` is no name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendName(String);

impl BackendName {
    /// Reads a name; `auto` in any case, and an empty one, are `None`: automatically selected.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let name = text.trim().to_ascii_lowercase();
        (!name.is_empty() && name != "auto").then_some(Self(name))
    }

    /// The name in lower case.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which backend a configuration asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendChoice {
    /// Automatically selected.
    #[default]
    Auto,
    /// This one if it can serve.
    Prefer(BackendName),
    /// This one or an error.
    Require(BackendName),
}

impl BackendChoice {
    /// What it means to the selector.
    #[must_use]
    pub fn policy(&self) -> Policy {
        match self {
            Self::Auto => Policy::Auto,
            Self::Prefer(name) => Policy::Prefer(name.clone()),
            Self::Require(name) => Policy::Require(name.clone()),
        }
    }
}

impl From<Option<BackendName>> for BackendChoice {
    fn from(name: Option<BackendName>) -> Self {
        name.map_or(Self::Auto, Self::Require)
    }
}

impl FromStr for BackendChoice {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(BackendName::parse(text).into())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Preference {
    prefer: String,
}

impl<'de> Deserialize<'de> for BackendChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ChoiceVisitor)
    }
}

/// By hand, because an untagged enum swallows the name of an unknown field.
struct ChoiceVisitor;

impl<'de> Visitor<'de> for ChoiceVisitor {
    type Value = BackendChoice;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a backend's name, null or { \"prefer\": name }")
    }

    fn visit_unit<E: de::Error>(self) -> Result<BackendChoice, E> {
        Ok(BackendChoice::Auto)
    }

    fn visit_none<E: de::Error>(self) -> Result<BackendChoice, E> {
        Ok(BackendChoice::Auto)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<BackendChoice, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<BackendChoice, E> {
        Ok(BackendName::parse(name).into())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<BackendChoice, A::Error> {
        let Preference { prefer } = Preference::deserialize(MapAccessDeserializer::new(map))?;
        Ok(BackendName::parse(&prefer).map_or(BackendChoice::Auto, BackendChoice::Prefer))
    }
}

impl Serialize for BackendChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_none(),
            Self::Require(name) => serializer.serialize_str(name.as_str()),
            Self::Prefer(name) => Preference { prefer: name.to_string() }.serialize(serializer),
        }
    }
}

fn optional_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BackendName>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.as_deref().and_then(BackendName::parse))
}

/// A mixture-of-experts backend's name: kept as it was written, because it is looked up only where a model has experts;
/// `auto` in any case is unset.
fn optional_moe_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.filter(|name| BackendName::parse(name).is_some()))
}

impl Serialize for BackendName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// The attention section of a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionConfig {
    /// The backend; automatically selected when unset.
    pub backend: BackendChoice,
    /// The backend in a phase, by the phase's name: it takes the place of `backend`. All phases share one cache.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub backend_per_phase: BTreeMap<Phase, BackendChoice>,
    /// The backend of a layer kind, by the kind's name: it takes the place of `backend` and of `backend_per_phase`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub backend_per_kind: BTreeMap<String, BackendChoice>,
    /// Whether layers that do not say otherwise are bidirectional. Belongs to this configuration alone: target and
    /// draft each have their own, and nothing derives it from the speculative method.
    pub use_non_causal: bool,
}

impl AttentionConfig {
    /// The choice for a layer kind in a phase: the kind's own, otherwise the phase's, otherwise [`backend`](Self::backend).
    #[must_use]
    pub fn choice(&self, layer: &str, phase: Phase) -> &BackendChoice {
        self.backend_per_kind.get(layer).or_else(|| self.backend_per_phase.get(&phase)).unwrap_or(&self.backend)
    }
}

/// Other kernels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KernelConfig {
    /// The mixture-of-experts backend; automatically selected when unset.
    #[serde(deserialize_with = "optional_moe_name")]
    pub moe_backend: Option<String>,
}

/// The cache.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvCacheConfig {
    /// Its format; `None` (written `auto`) is the model's.
    #[serde(with = "auto_dtype")]
    pub dtype: Option<KvDType>,
    /// Tokens of a page; `None` rules out no backend.
    pub page_size: Option<u32>,
}

mod auto_dtype {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    use crate::KvDType;

    pub(super) fn serialize<S: Serializer>(dtype: &Option<KvDType>, serializer: S) -> Result<S::Ok, S::Error> {
        match dtype {
            None => serializer.serialize_str("auto"),
            Some(dtype) => dtype.serialize(serializer),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<KvDType>, D::Error> {
        let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        if text.eq_ignore_ascii_case("auto") {
            return Ok(None);
        }
        let found = KvDType::ALL.into_iter().find(|dtype| dtype.name() == text);
        found.map(Some).ok_or_else(|| {
            D::Error::custom(format!("unknown kv dtype '{text}', expected auto, f32, f16, bf16, q8, f8e4m3 or f8e5m2"))
        })
    }
}

/// A window as configurations write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum WindowConfig {
    /// Keys including the query's own, as models' configurations have it.
    Keys(u32),
    /// Both sides.
    Sides(Window),
}

impl WindowConfig {
    /// The window of a layer of this causality.
    #[must_use]
    pub fn sides(self, causal: bool) -> Window {
        match self {
            Self::Sides(window) => window,
            Self::Keys(keys) => {
                let before = keys.saturating_sub(1);
                Window { left: Some(before), right: Some(if causal { 0 } else { before }) }
            }
        }
    }
}

impl<'de> Deserialize<'de> for WindowConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WindowVisitor)
    }
}

/// By hand, because an untagged enum swallows the name of an unknown field.
struct WindowVisitor;

impl<'de> Visitor<'de> for WindowVisitor {
    type Value = WindowConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("null, a number of keys or { \"left\": keys, \"right\": keys }")
    }

    fn visit_u64<E: de::Error>(self, keys: u64) -> Result<WindowConfig, E> {
        u32::try_from(keys).map(WindowConfig::Keys).map_err(|_| E::invalid_value(Unexpected::Unsigned(keys), &self))
    }

    fn visit_i64<E: de::Error>(self, keys: i64) -> Result<WindowConfig, E> {
        u32::try_from(keys).map(WindowConfig::Keys).map_err(|_| E::invalid_value(Unexpected::Signed(keys), &self))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<WindowConfig, A::Error> {
        Window::deserialize(MapAccessDeserializer::new(map)).map(WindowConfig::Sides)
    }
}

/// The form of a layer's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LayerKind {
    /// Grouped-query attention.
    Gqa,
    /// Latent attention.
    Mla,
}

/// Layers of one model that pose the same problem.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// The layer kind's name.
    pub name: String,
    /// How many layers are of it.
    #[serde(default = "one")]
    pub count: u32,
    /// The form of attention.
    pub kind: LayerKind,
    /// Query heads.
    pub query_heads: u32,
    /// Key and value heads (GQA).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<u32>,
    /// Elements of a query and a key (GQA).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<u32>,
    /// Elements of a value (GQA); the head dim when unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_dim: Option<u32>,
    /// Elements of the latent (MLA).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent_dim: Option<u32>,
    /// Elements of the rope key (MLA).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_dim: Option<u32>,
    /// Sliding window.
    #[serde(default)]
    pub window: Option<WindowConfig>,
    /// Softcap of the logits.
    #[serde(default)]
    pub softcap: Option<f32>,
    /// Whether it has attention sinks.
    #[serde(default)]
    pub sinks: bool,
    /// Whether it has ALiBi slopes.
    #[serde(default)]
    pub alibi: bool,
    /// Its causality; unset, [`AttentionConfig::use_non_causal`] decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causal: Option<bool>,
    /// Factor of the logits; unset, the elements of a query to the power −1/2. Latent attention needs it: there it is
    /// that of the head before the key's projection was absorbed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f32>,
    /// The mixture of experts behind the attention, in layers that have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe: Option<MoeConfig>,
}

/// What of a mixture of experts decides who serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MoeConfig {
    /// Experts to choose from.
    pub experts: u32,
    /// Experts of a token.
    pub experts_per_token: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of an expert's SwiGLU.
    pub intermediate_size: u32,
    /// Format of the experts' weights; the model's dtype when unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<DType>,
}

impl MoeConfig {
    /// Experts with weights of the model's dtype.
    #[must_use]
    pub const fn new(experts: u32, experts_per_token: u32, hidden_size: u32, intermediate_size: u32) -> Self {
        Self { experts, experts_per_token, hidden_size, intermediate_size, dtype: None }
    }

    /// The same with weights of this format.
    #[must_use]
    pub const fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = Some(dtype);
        self
    }
}

fn one() -> u32 {
    1
}

impl LayerConfig {
    /// A layer kind with grouped-query attention and nothing else asked for.
    #[must_use]
    pub fn gqa(name: impl Into<String>, count: u32, query_heads: u32, kv_heads: u32, head_dim: u32) -> Self {
        Self {
            name: name.into(),
            count,
            kind: LayerKind::Gqa,
            query_heads,
            kv_heads: Some(kv_heads),
            head_dim: Some(head_dim),
            value_dim: None,
            latent_dim: None,
            rope_dim: None,
            window: None,
            softcap: None,
            sinks: false,
            alibi: false,
            causal: None,
            scale: None,
            moe: None,
        }
    }

    /// A layer kind with latent attention and nothing else asked for.
    #[must_use]
    pub fn mla(name: impl Into<String>, count: u32, query_heads: u32, latent_dim: u32, rope_dim: u32) -> Self {
        Self {
            kind: LayerKind::Mla,
            kv_heads: None,
            head_dim: None,
            latent_dim: Some(latent_dim),
            rope_dim: Some(rope_dim),
            ..Self::gqa(name, count, query_heads, 1, 1)
        }
    }
}

/// What of a model decides its attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Format of its activations' queries.
    pub dtype: DType,
    /// Its layer kinds.
    pub layers: Vec<LayerConfig>,
}

/// Speculative decoding.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpeculativeConfig {
    /// The proposer's name.
    pub method: String,
    /// Tokens drafted and verified a step; the proposer's own default when unset.
    pub num_speculative_tokens: Option<u32>,
    /// The draft's attention backend; automatically selected when unset, whatever the target's is.
    #[serde(deserialize_with = "optional_name")]
    pub attention_backend: Option<BackendName>,
    /// The draft's attention backend for a layer kind of the draft, by the kind's name: it takes the place of
    /// `attention_backend`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub attention_backend_per_kind: BTreeMap<String, BackendChoice>,
    /// The draft's mixture-of-experts backend; the target's when unset.
    #[serde(deserialize_with = "optional_moe_name")]
    pub moe_backend: Option<String>,
    /// The proposer's own parameters, a JSON object that it reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<serde_json::Value>,
    /// Who makes trees of what is drafted; chains when unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tree: Option<StrategyConfig>,
    /// Nodes of a sequence's tree at the most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tree_nodes: Option<u32>,
    /// What of a draft stands; `match` when unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acceptance: Option<StrategyConfig>,
    /// How many tokens are drafted a step; `fixed` when unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<StrategyConfig>,
    /// The draft model; required by proposers that run attention of their own. Its dtype is f16 when unset.
    #[serde(deserialize_with = "optional_draft")]
    pub draft: Option<ModelConfig>,
}

fn optional_draft<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ModelConfig>, D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct DraftModel {
        #[serde(default = "f16")]
        dtype: DType,
        layers: Vec<LayerConfig>,
    }
    fn f16() -> DType {
        DType::F16
    }
    let draft = Option::<DraftModel>::deserialize(deserializer)?;
    Ok(draft.map(|DraftModel { dtype, layers }| ModelConfig { dtype, layers }))
}

/// Everything that decides who serves which attention, of a target or of a draft.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// The model this configuration runs: the target's, or in a draft configuration the draft's.
    #[serde(rename = "target")]
    pub model: ModelConfig,
    /// The cache.
    #[serde(default)]
    pub kv_cache: KvCacheConfig,
    /// Attention.
    #[serde(default)]
    pub attention: AttentionConfig,
    /// Other kernels.
    #[serde(default)]
    pub kernel: KernelConfig,
    /// Configurations of backends, by name: each is read by its backend, as a type of its own. They hold for target and
    /// draft alike.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub backend_config: BTreeMap<String, serde_json::Value>,
    /// Speculative decoding; absent for plain decoding, and in a draft configuration.
    #[serde(default)]
    pub speculative: Option<SpeculativeConfig>,
}

/// What is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct ConfigError {
    /// The field at fault, as a path.
    pub field: String,
    /// What is wrong with it, with its value.
    pub message: String,
}

/// The configuration a draft runs under unless its proposer asks for more: a new value, made from the target's.
///
/// * The attention backend is the speculative section's, **always**: unset there, it is automatically selected,
///   whatever the target's is, because there are many ways to be incompatible (MLA against GQA, causal against not).
/// * `use_non_causal` starts false; a proposer asks for it.
/// * The mixture-of-experts backend is the speculative section's where set, otherwise the target's.
///
/// Source: vLLM PR #39930, which copies the target's `use_non_causal` where this resets it.
#[must_use]
pub fn default_draft_config(target: &EngineConfig) -> EngineConfig {
    let mut draft = target.clone();
    draft.attention = AttentionConfig::default();
    if let Some(speculative) = draft.speculative.take() {
        draft.attention.backend = speculative.attention_backend.into();
        draft.attention.backend_per_kind = speculative.attention_backend_per_kind;
        if speculative.moe_backend.is_some() {
            draft.kernel.moe_backend = speculative.moe_backend;
        }
        if let Some(model) = speculative.draft {
            draft.model = model;
        }
    }
    draft
}

impl LayerConfig {
    /// The problem's kind.
    ///
    /// # Errors
    /// A dimension that is missing, zero, or belongs to the other kind; query heads that KV heads do not divide.
    pub fn attention_kind(&self, path: &str) -> Result<AttentionKind, ConfigError> {
        let error = |field: &str, message: String| ConfigError { field: format!("{path}.{field}"), message };
        let required = |field: &str, value: Option<u32>| match value {
            None => Err(error(field, format!("missing, layer '{}' needs it", self.name))),
            Some(0) => Err(error(field, "0 is out of range, at least 1".into())),
            Some(value) => Ok(value),
        };
        let foreign =
            |fields: &[(&str, Option<u32>)], kind: &str| match fields.iter().find(|(_, value)| value.is_some()) {
                Some((field, Some(value))) => Err(error(field, format!("{value} does not belong to kind {kind}"))),
                _ => Ok(()),
            };
        let query_heads = required("query_heads", Some(self.query_heads))?;
        match self.kind {
            LayerKind::Gqa => {
                foreign(&[("latent_dim", self.latent_dim), ("rope_dim", self.rope_dim)], "gqa")?;
                let kv_heads = required("kv_heads", self.kv_heads)?;
                let head_dim = required("head_dim", self.head_dim)?;
                let value_dim = required("value_dim", self.value_dim.or(Some(head_dim)))?;
                if !query_heads.is_multiple_of(kv_heads) {
                    return Err(error("kv_heads", format!("{kv_heads} does not divide {query_heads} query heads")));
                }
                Ok(AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim })
            }
            LayerKind::Mla => {
                foreign(&[("head_dim", self.head_dim), ("value_dim", self.value_dim)], "mla")?;
                if let Some(kv_heads) = self.kv_heads
                    && kv_heads != 1
                {
                    return Err(error("kv_heads", format!("{kv_heads}, MLA has 1")));
                }
                let latent_dim = required("latent_dim", self.latent_dim)?;
                let rope_dim = required("rope_dim", self.rope_dim)?;
                Ok(AttentionKind::Mla { query_heads, latent_dim, rope_dim })
            }
        }
    }
}
