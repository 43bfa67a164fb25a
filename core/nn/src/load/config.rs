//! What a decoder looks like: dimensions, RoPE, windows, experts, special ids.

use std::f64::consts::TAU;
use std::path::{Path, PathBuf};

use polyattn_api::{KvDType, LayerConfig, WindowConfig};
use serde_json::{Map, Value};

use super::deepseek;
use super::gguf::{Gguf, GgufValue, excerpt};
use super::map::read_json_object;
use super::{Checkpoint, CheckpointFormat, LoadError};

/// No model has nearly as many layers; more is a damaged file.
const MAX_LAYERS: u32 = 4096;
/// The name of the tensor of explicit RoPE divisors in GGUF files.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// A supported model family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 2 and 3 and everything with their layers, such as SmolLM2.
    Llama,
    /// Qwen2 and Qwen2.5: biases on the query, key and value projections.
    Qwen2,
    /// Qwen3: RMS norms on each head's query and key.
    Qwen3,
    /// DeepSeek-V2: latent attention and, behind the first layers, mixtures of experts. In Hugging Face folders only.
    DeepseekV2,
}

impl Architecture {
    /// All supported families.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::DeepseekV2];

    /// Those that are read from GGUF files too.
    pub const IN_GGUF: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// The name in GGUF metadata and in `model_type` of a `config.json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::DeepseekV2 => "deepseek_v2",
        }
    }

    /// The name in `architectures` of a `config.json`.
    pub const fn hf_class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::DeepseekV2 => "DeepseekV2ForCausalLM",
        }
    }
}

/// Which two elements of a head RoPE rotates together.
///
/// The choice belongs to the layout of the query and key projection's rows in the checkpoint, so it
/// follows from architecture **and** file format. Mixing them up gives text that is grammatical and
/// then loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RopePairing {
    /// Elements i and i + dim/2.
    HalfSplit,
    /// Elements 2i and 2i + 1.
    Interleaved,
}

/// How RoPE frequencies are stretched beyond the context that a model was first trained for.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Each frequency divided by its own number; `dim/2` of them. GGUF files of Llama 3.1 and later
    /// hold the outcome of `Llama3` in this form.
    Divisors(Vec<f32>),
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies divided by a factor, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context of the first training, in tokens.
        original_context: u32,
    },
    /// High frequencies kept, low ones divided by a factor, a ramp over the pairs between (YaRN, arXiv 2309.00071, as
    /// DeepSeek-V2 has it). What it does to the attention's scale is in [`LatentConfig::scale`].
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Pairs with more turns than this over the original context are kept.
        beta_fast: f64,
        /// Pairs with fewer turns than this over the original context are divided.
        beta_slow: f64,
        /// The context of the first training, in tokens.
        original_context: u32,
    },
    /// As trained.
    None,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How many leading elements of each head are rotated; even, at most `head_dim`.
    pub dim: u32,
    /// Which elements are rotated together.
    pub pairing: RopePairing,
    /// How the frequencies are scaled.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// RoPE without scaling.
    pub fn new(theta: f64, dim: u32, pairing: RopePairing) -> Self {
        Self { theta, dim, pairing, scaling: RopeScaling::None }
    }

    /// Reads base and scaling out of the text of a `config.json` of any architecture, for drafters,
    /// whose pairing is `HalfSplit` like that of every Hugging Face checkpoint. `file` is named in
    /// errors; all `head_dim` elements of a head are rotated.
    ///
    /// # Errors
    /// If it is not a JSON object, or a RoPE field is malformed or not supported.
    pub fn from_hf_json(file: &Path, text: &str, head_dim: u32) -> Result<Self, LoadError> {
        hf_rope(&Json::parse(file, text)?, head_dim)
    }

    /// The angle per position of each pair, in radians, scaling included: `dim/2` values.
    ///
    /// Pair i of the token at position p is rotated by `p · inv_freq[i]`.
    pub fn inv_freq(&self) -> Vec<f64> {
        let dim = f64::from(self.dim);
        // The pair that makes so many turns over a context, as a fraction.
        let pair_of =
            |turns: f64, context: u32| dim * (f64::from(context) / (turns * TAU)).ln() / (2.0 * self.theta.ln());
        (0..self.dim / 2)
            .map(|i| {
                let plain = self.theta.powf(-2.0 * f64::from(i) / dim);
                match &self.scaling {
                    RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context } => {
                        let low = pair_of(*beta_fast, *original_context).floor().max(0.0);
                        let high = pair_of(*beta_slow, *original_context).ceil().min(dim - 1.0);
                        let ramp = (f64::from(i) - low) / (high - low).max(0.001);
                        let divided = ramp.clamp(0.0, 1.0);
                        (1.0 - divided) * plain + divided * plain / factor
                    }
                    RopeScaling::None => plain,
                    RopeScaling::Linear { factor } => plain / factor,
                    RopeScaling::Divisors(d) => plain / d.get(i as usize).map_or(1.0, |d| f64::from(*d)),
                    RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context } => {
                        let turns = f64::from(*original_context) * plain / TAU;
                        if turns > *high {
                            plain
                        } else if turns < *low {
                            plain / factor
                        } else {
                            let keep = (turns - low) / (high - low);
                            (1.0 - keep) * plain / factor + keep * plain
                        }
                    }
                }
            })
            .collect()
    }
}

/// Latent attention: queries of `head_dim` elements, of which the last `rope_dim` are rotated, against keys that are
/// made of a latent by the head's own matrix, and one rotated key for all heads.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LatentConfig {
    /// Width of the queries' own latent; `None` where they are projected at once.
    pub query_latent_dim: Option<u32>,
    /// Elements of the latent of keys and values, which the cache keeps.
    pub latent_dim: u32,
    /// Elements of a head that carry no position.
    pub nope_dim: u32,
    /// Elements of a head that are rotated, and of the rotated key that the cache keeps.
    pub rope_dim: u32,
    /// Elements of a head's value.
    pub value_dim: u32,
    /// Factor of the logits: that of the whole head, `(nope_dim + rope_dim)^-1/2`, times YaRN's.
    pub scale: f32,
}

impl LatentConfig {
    /// Elements of a row of the cache.
    #[must_use]
    pub const fn cache_dim(&self) -> u32 {
        self.latent_dim + self.rope_dim
    }
}

/// How the experts of a token are chosen among their scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpertChoice {
    /// Those of the best scores.
    Greedy,
    /// Those of the best scores among the experts of the best groups. A group counts as much as its best expert.
    GroupLimited {
        /// Groups, each of as many experts.
        groups: u32,
        /// Groups that a token may choose from.
        chosen: u32,
    },
}

/// Mixtures of experts in the place of feed-forward layers.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExpertsConfig {
    /// The first layer that has them; those before are dense.
    pub first_layer: u32,
    /// Experts of a layer to choose from.
    pub experts: u32,
    /// Experts that serve a token.
    pub per_token: u32,
    /// Width of an expert's SwiGLU.
    pub intermediate_size: u32,
    /// Width of the SwiGLU that serves every token besides; `None` where there is none.
    pub shared_size: Option<u32>,
    /// How a token's are chosen.
    pub choice: ExpertChoice,
    /// Whether the scores of those chosen are divided by their sum.
    pub normalize: bool,
    /// Factor of what they add; 1 where `normalize` is set, as in the model's own code.
    pub scale: f32,
}

/// The configuration of a decoder, checked: every dimension is at least 1, heads divide evenly, and
/// products that size buffers fit into 32 bits.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DecoderConfig {
    /// The model family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Number of layers.
    pub layers: u32,
    /// Query heads of a layer, a multiple of `kv_heads`.
    pub query_heads: u32,
    /// Key and value heads of a layer; with latent attention as many as query heads.
    pub kv_heads: u32,
    /// Width of a head's query and key, even.
    pub head_dim: u32,
    /// Latent attention, in all layers, or `None` for grouped-query attention.
    pub latent: Option<LatentConfig>,
    /// Width of the SwiGLU layer.
    pub intermediate_size: u32,
    /// Mixtures of experts, or `None` where all layers are dense.
    pub experts: Option<ExpertsConfig>,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// The longest sequence that the model was made for, in tokens.
    pub context_length: u32,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether each head's query and key pass through an RMS norm before RoPE.
    pub qk_norm: bool,
    /// Whether the embedding is the output head too.
    pub tied_embedding: bool,
    /// Ids that end a text or a turn. Empty where the model names none.
    pub eos: Vec<u32>,
    /// The id that starts a text, if the model names one.
    pub bos: Option<u32>,
    /// Whether plain text is encoded with `bos` in front. A chat template writes its own.
    pub add_bos: bool,
    /// For each layer the number of keys that a query sees, its own included, or `None` for all;
    /// `layers` entries.
    pub windows: Vec<Option<u32>>,
}

impl DecoderConfig {
    /// The rotation angles per position; see [`RopeConfig::inv_freq`].
    pub fn inv_freq(&self) -> Vec<f64> {
        self.rope.inv_freq()
    }

    /// Reads the configuration out of a GGUF file's metadata and tensor table.
    ///
    /// # Errors
    /// If a key is missing or has a value that cannot be, if the architecture is not supported, or
    /// if the model needs something that is not: its message names the key.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, LoadError> {
        let file = gguf.path();
        let keys = Keys { gguf };
        let name = keys.text("general.architecture")?;
        let architecture = Architecture::IN_GGUF
            .into_iter()
            .find(|a| a.name() == name)
            .ok_or_else(|| unsupported_architecture(file, name, &Architecture::IN_GGUF))?;
        let key = |suffix: &str| format!("{name}.{suffix}");

        let layers = keys.u32(&key("block_count"))?;
        let hidden_size = keys.u32(&key("embedding_length"))?;
        let query_heads = keys.u32(&key("attention.head_count"))?;
        let kv_heads = keys.optional_u32(&key("attention.head_count_kv"))?.unwrap_or(query_heads);
        let head_dim = match keys.optional_u32(&key("attention.key_length"))? {
            Some(d) => d,
            None => divided_head_dim(file, &key("embedding_length"), hidden_size, query_heads)?,
        };
        let value_dim = keys.optional_u32(&key("attention.value_length"))?;
        if value_dim.is_some_and(|v| v != head_dim) {
            return Err(LoadError::field(
                file,
                key("attention.value_length"),
                format!(
                    "{} differs from the key length {head_dim}, which this family does not have",
                    value_dim.unwrap_or(0)
                ),
            ));
        }
        let context_length = keys.u32(&key("context_length"))?;
        if let Some(window) = keys.optional_u32(&key("attention.sliding_window"))?
            && window > 0
            && window < context_length
        {
            return Err(LoadError::field(
                file,
                key("attention.sliding_window"),
                format!(
                    "a sliding window of {window} is not supported in a GGUF file, which does not say the layers that have it"
                ),
            ));
        }
        for suffix in ["expert_count", "rope.scaling.attn_factor"] {
            if let Some(v) = gguf.get(&key(suffix)).filter(|v| v.as_f64() != Some(0.0)) {
                return Err(LoadError::field(file, key(suffix), format!("{} is not supported", v.describe())));
            }
        }

        let dim = keys.optional_u32(&key("rope.dimension_count"))?.unwrap_or(head_dim);
        let rope = RopeConfig {
            theta: keys.optional_f64(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            dim,
            // Converters permute the query and key rows of `llama` alone.
            pairing: match architecture {
                Architecture::Llama => RopePairing::Interleaved,
                _ => RopePairing::HalfSplit,
            },
            scaling: gguf_scaling(gguf, &keys, name, dim)?,
        };

        let embedding = WeightName::TokenEmbedding.in_format(CheckpointFormat::Gguf);
        let vocab_size = match gguf.tensor(&embedding).map(|t| t.shape.as_slice()) {
            Some([rows, _]) => u32::try_from(*rows)
                .map_err(|_| LoadError::tensor(file, embedding.as_str(), format!("it has {rows} rows")))?,
            Some(shape) => {
                return Err(LoadError::tensor(file, embedding, format!("its shape {shape:?} is not that of a matrix")));
            }
            None => {
                return Err(LoadError::MissingTensor {
                    file: file.to_owned(),
                    tensor: embedding,
                    count: gguf.tensors().len(),
                });
            }
        };
        if let Some(v) = keys.optional_u32(&key("vocab_size"))?
            && v != vocab_size
        {
            return Err(LoadError::field(
                file,
                key("vocab_size"),
                format!("{v} differs from the {vocab_size} rows of tensor '{embedding}'"),
            ));
        }
        let has = |tensor: &str| gguf.tensor(tensor).is_some();
        for tensor in ["blk.0.attn_output.bias", "blk.0.ffn_gate.bias"] {
            if has(tensor) {
                return Err(LoadError::tensor(file, tensor, "a bias on this projection is not supported"));
            }
        }

        let bos = keys.optional_u32("tokenizer.ggml.bos_token_id")?;
        let add_bos = match gguf.get("tokenizer.ggml.add_bos_token") {
            Some(v) => v.as_bool().ok_or_else(|| {
                LoadError::field(file, "tokenizer.ggml.add_bos_token", format!("{} is not a bool", v.describe()))
            })?,
            // Older conversions of Llama 3 lack the key; its tokenizer does add the id.
            None => gguf.get("tokenizer.ggml.pre").and_then(GgufValue::as_str).is_some_and(|pre| pre == "llama-bpe"),
        };
        Self {
            architecture,
            hidden_size,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            latent: None,
            intermediate_size: keys.u32(&key("feed_forward_length"))?,
            experts: None,
            vocab_size,
            context_length,
            rms_norm_eps: keys.f64(&key("attention.layer_norm_rms_epsilon"))? as f32,
            rope,
            qkv_bias: has("blk.0.attn_q.bias"),
            qk_norm: has("blk.0.attn_q_norm.weight"),
            tied_embedding: !has("output.weight"),
            eos: gguf_eos(gguf, &keys)?,
            add_bos: add_bos && bos.is_some(),
            bos,
            windows: Vec::new(),
        }
        .checked(file)
    }

    /// Reads `config.json` of a Hugging Face folder, and `generation_config.json` and
    /// `tokenizer_config.json` where they are there.
    ///
    /// # Errors
    /// If a file cannot be read, a field is missing or has a value that cannot be, if the
    /// architecture is not supported, or if the model needs something that is not.
    pub fn from_hf_folder(folder: &Path) -> Result<Self, LoadError> {
        let optional = |name: &str| -> Result<Option<Json>, LoadError> {
            let path = folder.join(name);
            path.exists().then(|| Json::read(&path)).transpose()
        };
        let mut config = Self::from_json(Json::read(&folder.join("config.json"))?)?;
        if let Some(generation) = optional("generation_config.json")? {
            for id in generation.ids("eos_token_id")? {
                if !config.eos.contains(&id) {
                    config.eos.push(id);
                }
            }
            if let Some(&bos) = generation.ids("bos_token_id")?.first() {
                config.bos.get_or_insert(bos);
            }
            config.check_ids(&generation.file)?;
        }
        if let Some(tokenizer) = optional("tokenizer_config.json")? {
            config.add_bos = config.bos.is_some() && tokenizer.optional_bool("add_bos_token")? == Some(true);
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`; `file` is named in errors.
    ///
    /// # Errors
    /// As [`from_hf_folder`](Self::from_hf_folder).
    pub fn from_hf_json(file: &Path, text: &str) -> Result<Self, LoadError> {
        Self::from_json(Json::parse(file, text)?)
    }

    fn from_json(json: Json) -> Result<Self, LoadError> {
        let file = json.file.clone();
        let architecture = hf_architecture(&json)?;
        if let Some(act) = json.optional_str("hidden_act")?
            && !matches!(act, "silu" | "swish")
        {
            return Err(LoadError::field(
                &file,
                "hidden_act",
                format!("'{}' is not supported (supported: silu)", excerpt(act)),
            ));
        }
        // Both would put a bias where this family's decoder has none: Llama's and Qwen3's
        // `attention_bias` includes the output projection.
        for field in ["attention_bias", "mlp_bias"] {
            if json.optional_bool(field)? == Some(true) && architecture != Architecture::Qwen2 {
                return Err(LoadError::field(&file, field, "true is not supported"));
            }
        }
        if json.present("quantization_config") {
            return Err(LoadError::field(
                &file,
                "quantization_config",
                "quantised weights in a Hugging Face folder are not supported (supported: F32, F16, BF16; for quantised weights use a GGUF file)",
            ));
        }

        let hidden_size = json.u32("hidden_size")?;
        let layers = json.u32("num_hidden_layers")?;
        let query_heads = json.u32("num_attention_heads")?;
        let kv_heads = json.optional_u32("num_key_value_heads")?.unwrap_or(query_heads);
        let latent_attention = architecture == Architecture::DeepseekV2;
        let (head_dim, rope, latent) = if latent_attention {
            let (rope, latent) = deepseek::latent(&json, query_heads, kv_heads)?;
            (latent.nope_dim.saturating_add(latent.rope_dim), rope, Some(latent))
        } else {
            let head_dim = match json.optional_u32("head_dim")? {
                Some(d) => d,
                None => divided_head_dim(&file, "hidden_size", hidden_size, query_heads)?,
            };
            (head_dim, hf_rope(&json, head_dim)?, None)
        };
        let experts = if latent_attention { deepseek::experts(&json)? } else { None };
        let context_length = json.u32("max_position_embeddings")?;
        check_layer_count(&file, layers)?;
        let windows = hf_windows(&json, architecture, layers, context_length)?;
        let eos = json.ids("eos_token_id")?;
        let bos = json.ids("bos_token_id")?.first().copied();
        Self {
            architecture,
            hidden_size,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            latent,
            intermediate_size: json.u32("intermediate_size")?,
            experts,
            vocab_size: json.u32("vocab_size")?,
            context_length,
            rms_norm_eps: json.optional_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope,
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            tied_embedding: json.optional_bool("tie_word_embeddings")?.unwrap_or(false),
            eos,
            bos,
            add_bos: false,
            windows,
        }
        .checked(&file)
    }

    /// The last step of both readers: what must hold whatever the format.
    fn checked(mut self, file: &Path) -> Result<Self, LoadError> {
        check_layer_count(file, self.layers)?;
        if self.windows.is_empty() {
            self.windows = vec![None; self.layers as usize];
        }
        for (what, v) in [
            ("hidden size", self.hidden_size),
            ("number of query heads", self.query_heads),
            ("number of key and value heads", self.kv_heads),
            ("head dimension", self.head_dim),
            ("intermediate size", self.intermediate_size),
            ("vocabulary size", self.vocab_size),
            ("context length", self.context_length),
        ] {
            if v == 0 {
                return Err(LoadError::malformed(file, format!("the {what} is 0")));
            }
        }
        if !self.query_heads.is_multiple_of(self.kv_heads) {
            return Err(LoadError::malformed(
                file,
                format!("{} query heads are not a multiple of {} key and value heads", self.query_heads, self.kv_heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(LoadError::malformed(file, format!("the head dimension {} is odd", self.head_dim)));
        }
        if self.query_heads.checked_mul(self.head_dim).is_none() {
            return Err(LoadError::malformed(
                file,
                format!("{} query heads of dimension {} are too wide", self.query_heads, self.head_dim),
            ));
        }
        let dim = self.rope.dim;
        if dim == 0 || !dim.is_multiple_of(2) || dim > self.head_dim {
            return Err(LoadError::malformed(
                file,
                format!(
                    "the RoPE dimension {dim} is not an even number from 2 to the head dimension {}",
                    self.head_dim
                ),
            ));
        }
        if !(self.rope.theta.is_finite() && self.rope.theta > 0.0) {
            return Err(LoadError::malformed(
                file,
                format!("the RoPE base {} is not a positive number", self.rope.theta),
            ));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(LoadError::malformed(
                file,
                format!("the RMS norm epsilon {} is not a positive number", self.rms_norm_eps),
            ));
        }
        if self.architecture == Architecture::Qwen3 && !self.qk_norm {
            return Err(LoadError::malformed(
                file,
                "this is a qwen3 model without query and key norms (blk.0.attn_q_norm.weight)",
            ));
        }
        self.check_ids(file)?;
        Ok(self)
    }

    fn check_ids(&self, file: &Path) -> Result<(), LoadError> {
        for (field, id) in
            self.eos.iter().map(|id| ("eos_token_id", *id)).chain(self.bos.map(|id| ("bos_token_id", id)))
        {
            if id >= self.vocab_size {
                return Err(LoadError::field(
                    file,
                    field,
                    format!("{id} is not an id of the vocabulary of {} tokens", self.vocab_size),
                ));
            }
        }
        Ok(())
    }

    /// Bytes of a token in one tensor of a layer's cache: its keys, its values, or the latent row that is both.
    #[must_use]
    pub fn slot_bytes(&self, kv_dtype: KvDType) -> u64 {
        let elements = match &self.latent {
            None => u64::from(self.kv_heads) * u64::from(self.head_dim),
            Some(latent) => u64::from(latent.cache_dim()),
        };
        elements * kv_dtype.bytes()
    }

    /// The kinds of its attention layers, as the selector sees them, and for each layer the place of its kind; without
    /// experts, whose format [`ModelSource`](super::ModelSource) knows.
    pub(super) fn attention_layers(&self) -> (Vec<LayerConfig>, Vec<usize>) {
        let mut windows: Vec<Option<u32>> = Vec::new();
        let mut kinds: Vec<LayerConfig> = Vec::new();
        let mut places = Vec::new();
        for layer in 0..self.layers {
            let window = self.window(layer);
            let place = windows.iter().position(|other| *other == window).unwrap_or_else(|| {
                let name = window.map_or("full".to_owned(), |keys| format!("sliding-{keys}"));
                let mut kind = match &self.latent {
                    None => LayerConfig::gqa(name, 0, self.query_heads, self.kv_heads, self.head_dim),
                    Some(latent) => {
                        let kind = LayerConfig::mla(name, 0, self.query_heads, latent.latent_dim, latent.rope_dim);
                        LayerConfig { scale: Some(latent.scale), ..kind }
                    }
                };
                kind.window = window.map(WindowConfig::Keys);
                windows.push(window);
                kinds.push(kind);
                kinds.len() - 1
            });
            kinds[place].count += 1;
            places.push(place);
        }
        (kinds, places)
    }

    /// The number of keys that a query of `layer` sees, its own included, or `None` for all.
    pub fn window(&self, layer: u32) -> Option<u32> {
        self.windows.get(layer as usize).copied().flatten()
    }

    /// Whether the feed-forward part of `layer` is a mixture of experts.
    pub fn has_experts(&self, layer: u32) -> bool {
        self.experts.as_ref().is_some_and(|experts| layer >= experts.first_layer)
    }

    /// Elements of the matrices of all layers that a token meets, embedding and head left out: of experts those that it
    /// chooses.
    pub fn layer_parameters(&self) -> u64 {
        let met = self.weights().into_iter().filter(|name| match name {
            WeightName::TokenEmbedding | WeightName::Output => false,
            WeightName::Expert { expert, .. } => self.experts.as_ref().is_some_and(|all| *expert < all.per_token),
            _ => true,
        });
        met.map(|name| name.shape(self))
            .filter(|shape| shape.len() == 2)
            .map(|shape| shape.iter().map(|extent| *extent as u64).product::<u64>())
            .sum()
    }

    /// The weights of one layer, in the order in which it uses them.
    pub fn layer_weights(&self, layer: u32) -> Vec<WeightName> {
        use LayerWeight as W;
        let mut weights = vec![W::AttentionNorm];
        match &self.latent {
            None => {
                weights.extend([W::Query, W::Key, W::Value]);
                weights.extend([W::QueryBias, W::KeyBias, W::ValueBias].iter().filter(|_| self.qkv_bias));
                weights.extend([W::QueryNorm, W::KeyNorm].iter().filter(|_| self.qk_norm));
            }
            Some(latent) => {
                match latent.query_latent_dim {
                    None => weights.push(W::Query),
                    Some(_) => weights.extend([W::QueryDown, W::QueryLatentNorm, W::QueryUp]),
                }
                weights.extend([W::LatentDown, W::LatentNorm, W::LatentUp]);
            }
        }
        weights.extend([W::AttentionOutput, W::FeedForwardNorm]);
        let experts = self.experts.as_ref().filter(|_| self.has_experts(layer));
        match experts {
            None => weights.extend([W::Gate, W::Up, W::Down]),
            Some(experts) => {
                weights.push(W::Router);
                let shared = experts.shared_size.is_some();
                weights.extend([W::SharedGate, W::SharedUp, W::SharedDown].iter().filter(|_| shared));
            }
        }
        let own = weights.into_iter().map(|weight| WeightName::Layer(layer, weight));
        let of_experts = (0..experts.map_or(0, |experts| experts.experts))
            .flat_map(|expert| [W::Gate, W::Up, W::Down].map(|weight| WeightName::Expert { layer, expert, weight }));
        own.chain(of_experts).collect()
    }

    /// All weights that this model needs: the embedding, each layer's in order, the final norm, and
    /// the output head unless it is tied.
    pub fn weights(&self) -> Vec<WeightName> {
        let mut out = vec![WeightName::TokenEmbedding];
        out.extend((0..self.layers).flat_map(|layer| self.layer_weights(layer)));
        out.push(WeightName::OutputNorm);
        if !self.tied_embedding {
            out.push(WeightName::Output);
        }
        out
    }

    /// Checks that every weight is in the checkpoint with the right shape and a readable type.
    ///
    /// # Errors
    /// For the first weight that is missing or differs.
    pub fn check_weights(&self, checkpoint: &Checkpoint) -> Result<(), LoadError> {
        let format = checkpoint.format();
        self.weights().into_iter().try_for_each(|w| checkpoint.expect_shape(&w.in_format(format), &w.shape(self)))
    }
}

/// The role of a tensor within a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayerWeight {
    /// RMS norm before attention, `[hidden]`.
    AttentionNorm,
    /// Query projection, `[query_heads · head_dim, hidden]`.
    Query,
    /// Key projection, `[kv_heads · head_dim, hidden]`.
    Key,
    /// Value projection, `[kv_heads · head_dim, hidden]`.
    Value,
    /// Attention's output projection, `[hidden, query_heads · head_dim]`.
    AttentionOutput,
    /// Bias of attention's output projection, which drafters may have.
    AttentionOutputBias,
    /// Bias of the query projection.
    QueryBias,
    /// Bias of the key projection.
    KeyBias,
    /// Bias of the value projection.
    ValueBias,
    /// RMS norm of each query head, `[head_dim]`.
    QueryNorm,
    /// RMS norm of each key head, `[head_dim]`.
    KeyNorm,
    /// RMS norm before the feed-forward layer, `[hidden]`.
    FeedForwardNorm,
    /// SwiGLU's gate, `[intermediate, hidden]`.
    Gate,
    /// SwiGLU's other input, `[intermediate, hidden]`.
    Up,
    /// SwiGLU's output, `[hidden, intermediate]`.
    Down,
    /// Projection to the queries' latent, `[query_latent, hidden]`.
    QueryDown,
    /// RMS norm of the queries' latent, `[query_latent]`.
    QueryLatentNorm,
    /// Projection of the queries' latent, `[query_heads · head_dim, query_latent]`.
    QueryUp,
    /// Projection to the latent and the rotated key, `[latent + rope, hidden]`.
    LatentDown,
    /// RMS norm of the latent, `[latent]`.
    LatentNorm,
    /// For each head the projections of the latent to key and value, `[query_heads · (nope + value), latent]`.
    LatentUp,
    /// The scores of the experts, `[experts, hidden]`.
    Router,
    /// Gate of the SwiGLU beside the experts, `[shared, hidden]`.
    SharedGate,
    /// Its other input, `[shared, hidden]`.
    SharedUp,
    /// Its output, `[hidden, shared]`.
    SharedDown,
}

impl LayerWeight {
    /// The name behind `blk.N.` in GGUF files.
    pub const fn gguf_suffix(self) -> &'static str {
        match self {
            Self::AttentionNorm => "attn_norm.weight",
            Self::AttentionOutput => "attn_output.weight",
            Self::AttentionOutputBias => "attn_output.bias",
            Self::Down => "ffn_down.weight",
            Self::FeedForwardNorm => "ffn_norm.weight",
            Self::Gate => "ffn_gate.weight",
            Self::Key => "attn_k.weight",
            Self::KeyBias => "attn_k.bias",
            Self::KeyNorm => "attn_k_norm.weight",
            Self::Query => "attn_q.weight",
            Self::QueryBias => "attn_q.bias",
            Self::QueryNorm => "attn_q_norm.weight",
            Self::Up => "ffn_up.weight",
            Self::Value => "attn_v.weight",
            Self::ValueBias => "attn_v.bias",
            Self::QueryDown => "attn_q_a.weight",
            Self::QueryLatentNorm => "attn_q_a_norm.weight",
            Self::QueryUp => "attn_q_b.weight",
            Self::LatentDown => "attn_kv_a_mqa.weight",
            Self::LatentNorm => "attn_kv_a_norm.weight",
            Self::LatentUp => "attn_kv_b.weight",
            Self::Router => "ffn_gate_inp.weight",
            Self::SharedGate => "ffn_gate_shexp.weight",
            Self::SharedUp => "ffn_up_shexp.weight",
            Self::SharedDown => "ffn_down_shexp.weight",
        }
    }

    /// The name behind `model.layers.N.` in Hugging Face checkpoints (behind `layers.N.` in those
    /// of drafters).
    pub const fn hf_suffix(self) -> &'static str {
        match self {
            Self::AttentionNorm => "input_layernorm.weight",
            Self::AttentionOutput => "self_attn.o_proj.weight",
            Self::AttentionOutputBias => "self_attn.o_proj.bias",
            Self::Down => "mlp.down_proj.weight",
            Self::FeedForwardNorm => "post_attention_layernorm.weight",
            Self::Gate => "mlp.gate_proj.weight",
            Self::Key => "self_attn.k_proj.weight",
            Self::KeyBias => "self_attn.k_proj.bias",
            Self::KeyNorm => "self_attn.k_norm.weight",
            Self::Query => "self_attn.q_proj.weight",
            Self::QueryBias => "self_attn.q_proj.bias",
            Self::QueryNorm => "self_attn.q_norm.weight",
            Self::Up => "mlp.up_proj.weight",
            Self::Value => "self_attn.v_proj.weight",
            Self::ValueBias => "self_attn.v_proj.bias",
            Self::QueryDown => "self_attn.q_a_proj.weight",
            Self::QueryLatentNorm => "self_attn.q_a_layernorm.weight",
            Self::QueryUp => "self_attn.q_b_proj.weight",
            Self::LatentDown => "self_attn.kv_a_proj_with_mqa.weight",
            Self::LatentNorm => "self_attn.kv_a_layernorm.weight",
            Self::LatentUp => "self_attn.kv_b_proj.weight",
            Self::Router => "mlp.gate.weight",
            Self::SharedGate => "mlp.shared_experts.gate_proj.weight",
            Self::SharedUp => "mlp.shared_experts.up_proj.weight",
            Self::SharedDown => "mlp.shared_experts.down_proj.weight",
        }
    }
}

/// A weight of a decoder, independent of the checkpoint's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightName {
    /// A weight of one layer.
    Layer(u32, LayerWeight),
    /// A weight of one expert: the gate, the other input or the output of its SwiGLU. In Hugging Face checkpoints only;
    /// GGUF files hold the experts of a layer in one tensor.
    Expert {
        /// The layer.
        layer: u32,
        /// The expert's number.
        expert: u32,
        /// [`LayerWeight::Gate`], [`LayerWeight::Up`] or [`LayerWeight::Down`].
        weight: LayerWeight,
    },
    /// The output head, `[vocabulary, hidden]`.
    Output,
    /// The final RMS norm, `[hidden]`.
    OutputNorm,
    /// The embedding, `[vocabulary, hidden]`.
    TokenEmbedding,
}

impl WeightName {
    /// The tensor's name in a checkpoint of this format.
    pub fn in_format(self, format: CheckpointFormat) -> String {
        match (format, self) {
            (CheckpointFormat::Gguf, Self::TokenEmbedding) => "token_embd.weight".into(),
            (CheckpointFormat::Gguf, Self::OutputNorm) => "output_norm.weight".into(),
            (CheckpointFormat::Gguf, Self::Output) => "output.weight".into(),
            (CheckpointFormat::Gguf, Self::Layer(n, w)) => {
                format!("blk.{n}.{}", w.gguf_suffix())
            }
            (CheckpointFormat::HuggingFace, Self::TokenEmbedding) => "model.embed_tokens.weight".into(),
            (CheckpointFormat::HuggingFace, Self::OutputNorm) => "model.norm.weight".into(),
            (CheckpointFormat::HuggingFace, Self::Output) => "lm_head.weight".into(),
            (CheckpointFormat::HuggingFace, Self::Layer(n, w)) => {
                format!("model.layers.{n}.{}", w.hf_suffix())
            }
            (CheckpointFormat::Gguf, Self::Expert { layer, expert, weight }) => {
                format!("blk.{layer}.expert.{expert}.{}", weight.gguf_suffix())
            }
            (CheckpointFormat::HuggingFace, Self::Expert { layer, expert, weight }) => {
                let name = weight.hf_suffix();
                format!("model.layers.{layer}.mlp.experts.{expert}.{}", name.strip_prefix("mlp.").unwrap_or(name))
            }
        }
    }

    /// The row-major shape of this weight in a model of this configuration.
    pub fn shape(self, config: &DecoderConfig) -> Vec<usize> {
        let hidden = config.hidden_size as usize;
        let vocab = config.vocab_size as usize;
        let wide = config.intermediate_size as usize;
        let head = config.head_dim as usize;
        let q = config.query_heads as usize * head;
        let kv = config.kv_heads as usize * head;
        let heads = config.query_heads as usize;
        let latent = |of: fn(&LatentConfig) -> u32| config.latent.as_ref().map_or(0, |latent| of(latent) as usize);
        let query_latent = latent(|latent| latent.query_latent_dim.unwrap_or(0));
        let experts = |of: fn(&ExpertsConfig) -> u32| config.experts.as_ref().map_or(0, |experts| of(experts) as usize);
        let swiglu = |weight: LayerWeight, wide: usize| match weight {
            LayerWeight::Down | LayerWeight::SharedDown => vec![hidden, wide],
            _ => vec![wide, hidden],
        };
        match self {
            Self::Output | Self::TokenEmbedding => vec![vocab, hidden],
            Self::OutputNorm => vec![hidden],
            Self::Expert { weight, .. } => swiglu(weight, experts(|experts| experts.intermediate_size)),
            Self::Layer(_, w) => match w {
                LayerWeight::QueryDown => vec![query_latent, hidden],
                LayerWeight::QueryLatentNorm => vec![query_latent],
                LayerWeight::QueryUp => vec![q, query_latent],
                LayerWeight::LatentDown => vec![latent(LatentConfig::cache_dim), hidden],
                LayerWeight::LatentNorm => vec![latent(|latent| latent.latent_dim)],
                LayerWeight::LatentUp => {
                    vec![
                        heads * latent(|latent| latent.nope_dim + latent.value_dim),
                        latent(|latent| latent.latent_dim),
                    ]
                }
                LayerWeight::Router => vec![experts(|experts| experts.experts), hidden],
                LayerWeight::SharedGate | LayerWeight::SharedUp | LayerWeight::SharedDown => {
                    swiglu(w, experts(|experts| experts.shared_size.unwrap_or(0)))
                }
                LayerWeight::AttentionOutput if config.latent.is_some() => {
                    vec![hidden, heads * latent(|latent| latent.value_dim)]
                }
                LayerWeight::Gate | LayerWeight::Up | LayerWeight::Down => swiglu(w, wide),
                LayerWeight::AttentionNorm | LayerWeight::AttentionOutputBias | LayerWeight::FeedForwardNorm => {
                    vec![hidden]
                }
                LayerWeight::AttentionOutput => vec![hidden, q],
                LayerWeight::Key | LayerWeight::Value => vec![kv, hidden],
                LayerWeight::KeyBias | LayerWeight::ValueBias => vec![kv],
                LayerWeight::KeyNorm | LayerWeight::QueryNorm => vec![head],
                LayerWeight::Query => vec![q, hidden],
                LayerWeight::QueryBias => vec![q],
            },
        }
    }
}

fn unsupported_architecture(file: &Path, name: &str, supported: &[Architecture]) -> LoadError {
    let names = supported.iter().map(|one| one.name()).collect::<Vec<_>>().join(", ");
    LoadError::unsupported(file, format!("the architecture '{}' is not supported (supported: {names})", excerpt(name)))
}

fn check_layer_count(file: &Path, layers: u32) -> Result<(), LoadError> {
    if (1..=MAX_LAYERS).contains(&layers) {
        return Ok(());
    }
    Err(LoadError::malformed(file, format!("the number of layers is {layers}; 1 to {MAX_LAYERS} are possible")))
}

/// The head dimension of a model that does not state it.
fn divided_head_dim(file: &Path, field: &str, hidden_size: u32, query_heads: u32) -> Result<u32, LoadError> {
    if query_heads == 0 || !hidden_size.is_multiple_of(query_heads) {
        return Err(LoadError::field(
            file,
            field,
            format!("{hidden_size} is not a multiple of the {query_heads} query heads, and no head dimension is given"),
        ));
    }
    Ok(hidden_size / query_heads)
}

/// Metadata look-ups that answer with errors naming the key.
struct Keys<'a> {
    gguf: &'a Gguf,
}

impl<'a> Keys<'a> {
    fn missing(&self, key: &str) -> LoadError {
        LoadError::field(self.gguf.path(), key, "this metadata key is missing")
    }

    fn text(&self, key: &str) -> Result<&'a str, LoadError> {
        let value = self.gguf.get(key).ok_or_else(|| self.missing(key))?;
        value
            .as_str()
            .ok_or_else(|| LoadError::field(self.gguf.path(), key, format!("{} is not a string", value.describe())))
    }

    fn optional_u32(&self, key: &str) -> Result<Option<u32>, LoadError> {
        let Some(value) = self.gguf.get(key) else {
            return Ok(None);
        };
        // Some converters write one number for each layer; equal ones are as good as one.
        let number = match value.as_integers() {
            Some(list) => {
                list.first().filter(|first| list.iter().all(|v| v == *first)).and_then(|v| u64::try_from(*v).ok())
            }
            None => value.as_u64(),
        };
        number.and_then(|v| u32::try_from(v).ok()).map(Some).ok_or_else(|| {
            LoadError::field(
                self.gguf.path(),
                key,
                format!("{} is not one integer from 0 to {}", value.describe(), u32::MAX),
            )
        })
    }

    fn u32(&self, key: &str) -> Result<u32, LoadError> {
        self.optional_u32(key)?.ok_or_else(|| self.missing(key))
    }

    fn optional_f64(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.gguf.get(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .map(Some)
            .ok_or_else(|| LoadError::field(self.gguf.path(), key, format!("{} is not a number", value.describe())))
    }

    fn f64(&self, key: &str) -> Result<f64, LoadError> {
        self.optional_f64(key)?.ok_or_else(|| self.missing(key))
    }
}

fn gguf_scaling(gguf: &Gguf, keys: &Keys<'_>, name: &str, dim: u32) -> Result<RopeScaling, LoadError> {
    let file = gguf.path();
    let type_key = format!("{name}.rope.scaling.type");
    let factor_key = format!("{name}.rope.scaling.factor");
    let old_key = format!("{name}.rope.scale_linear");
    let linear = |key: &str| -> Result<RopeScaling, LoadError> {
        let factor = keys.f64(key)?;
        if !(factor.is_finite() && factor > 0.0) {
            return Err(LoadError::field(file, key, format!("{factor} is not a positive number")));
        }
        Ok(if factor == 1.0 { RopeScaling::None } else { RopeScaling::Linear { factor } })
    };
    let scaling = match gguf.get(&type_key) {
        None if gguf.get(&factor_key).is_some() => linear(&factor_key)?,
        None if gguf.get(&old_key).is_some() => linear(&old_key)?,
        None => RopeScaling::None,
        Some(_) => match keys.text(&type_key)? {
            "none" => RopeScaling::None,
            "linear" => linear(&factor_key)?,
            other => {
                return Err(LoadError::field(
                    file,
                    type_key,
                    format!("RoPE scaling '{}' is not supported (supported: none, linear)", excerpt(other)),
                ));
            }
        },
    };
    let Some(tensor) = gguf.tensor(ROPE_FREQS) else {
        return Ok(scaling);
    };
    if scaling != RopeScaling::None {
        return Err(LoadError::tensor(
            file,
            ROPE_FREQS,
            "RoPE divisors on top of another RoPE scaling are not supported",
        ));
    }
    let elements: usize = tensor.shape.iter().product();
    if elements != (dim / 2) as usize {
        return Err(LoadError::tensor(
            file,
            ROPE_FREQS,
            format!("it has {elements} divisors, but a RoPE dimension of {dim} needs {}", dim / 2),
        ));
    }
    let mut divisors = vec![0.0; elements];
    super::dequantize(tensor.ty, gguf.data(tensor), &mut divisors)
        .map_err(|e| LoadError::tensor(file, ROPE_FREQS, e.to_string()))?;
    if let Some(bad) = divisors.iter().find(|d| !(d.is_finite() && **d > 0.0)) {
        return Err(LoadError::tensor(file, ROPE_FREQS, format!("the RoPE divisor {bad} is not a positive number")));
    }
    Ok(RopeScaling::Divisors(divisors))
}

/// The ids that metadata names as ends, then control tokens with the customary names of ends:
/// conversions name only one id, and chat models need the end of the turn and that of the text.
fn gguf_eos(gguf: &Gguf, keys: &Keys<'_>) -> Result<Vec<u32>, LoadError> {
    const CONTROL: i64 = 3;
    const NAMES: [&str; 6] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>"];
    let mut eos = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        if let Some(id) = keys.optional_u32(&format!("tokenizer.ggml.{key}"))?
            && !eos.contains(&id)
        {
            eos.push(id);
        }
    }
    let tokens = gguf.get("tokenizer.ggml.tokens").and_then(GgufValue::as_strings).unwrap_or(&[]);
    let types = gguf.get("tokenizer.ggml.token_type").and_then(GgufValue::as_integers).unwrap_or_default();
    for (id, (token, ty)) in (0u32..).zip(tokens.iter().zip(types)) {
        if ty == CONTROL && NAMES.contains(&token.as_str()) && !eos.contains(&id) {
            eos.push(id);
        }
    }
    Ok(eos)
}

/// A JSON object with look-ups that answer with errors naming file and field. A field that is null
/// counts as absent.
pub(super) struct Json {
    file: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl Json {
    fn read(path: &Path) -> Result<Self, LoadError> {
        Ok(Self { file: path.to_owned(), prefix: String::new(), map: read_json_object(path)? })
    }

    fn parse(file: &Path, text: &str) -> Result<Self, LoadError> {
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self { file: file.to_owned(), prefix: String::new(), map }),
            Ok(_) => Err(LoadError::malformed(file, "the file is not a JSON object")),
            Err(e) => Err(LoadError::malformed(file, format!("the file is not valid JSON: {e}"))),
        }
    }

    fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    pub(super) fn present(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    pub(super) fn error(&self, field: &str, reason: impl Into<String>) -> LoadError {
        LoadError::field(&self.file, format!("{}{field}", self.prefix), reason)
    }

    fn missing(&self, field: &str) -> LoadError {
        self.error(field, "this field is missing")
    }

    fn typed<'a, T>(
        &'a self,
        field: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        read(value).map(Some).ok_or_else(|| self.error(field, format!("{} is not {what}", excerpt(&value.to_string()))))
    }

    pub(super) fn optional_u32(&self, field: &str) -> Result<Option<u32>, LoadError> {
        self.typed(field, "an integer of 32 bits", |v| {
            let whole = v.as_f64().filter(|f| f.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(f));
            whole.map(|f| f as u32)
        })
    }

    pub(super) fn u32(&self, field: &str) -> Result<u32, LoadError> {
        self.optional_u32(field)?.ok_or_else(|| self.missing(field))
    }

    pub(super) fn optional_f64(&self, field: &str) -> Result<Option<f64>, LoadError> {
        self.typed(field, "a number", Value::as_f64)
    }

    pub(super) fn positive(&self, field: &str) -> Result<f64, LoadError> {
        let v = self.optional_f64(field)?.ok_or_else(|| self.missing(field))?;
        if v.is_finite() && v > 0.0 {
            return Ok(v);
        }
        Err(self.error(field, format!("{v} is not a positive number")))
    }

    pub(super) fn optional_bool(&self, field: &str) -> Result<Option<bool>, LoadError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    pub(super) fn optional_str(&self, field: &str) -> Result<Option<&str>, LoadError> {
        self.typed(field, "a string", Value::as_str)
    }

    pub(super) fn optional_object(&self, field: &str) -> Result<Option<Self>, LoadError> {
        Ok(self.typed(field, "an object", Value::as_object)?.map(|map| Self {
            file: self.file.clone(),
            prefix: format!("{}{field}.", self.prefix),
            map: map.clone(),
        }))
    }

    /// A token id, or a list of them.
    fn ids(&self, field: &str) -> Result<Vec<u32>, LoadError> {
        let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        Ok(self
            .typed(field, "a token id or a list of them", |v| match v {
                Value::Array(list) => list.iter().map(id).collect(),
                one => id(one).map(|id| vec![id]),
            })?
            .unwrap_or_default())
    }
}

fn hf_architecture(json: &Json) -> Result<Architecture, LoadError> {
    let classes: Vec<&str> = json
        .typed("architectures", "a list of names", |v| v.as_array()?.iter().map(Value::as_str).collect())?
        .unwrap_or_default();
    if let Some(class) = classes.first() {
        return Architecture::ALL.into_iter().find(|a| a.hf_class() == *class).ok_or_else(|| {
            let names = Architecture::ALL.map(Architecture::hf_class).join(", ");
            json.error("architectures", format!("'{}' is not supported (supported: {names})", excerpt(class)))
        });
    }
    let name = json.optional_str("model_type")?.ok_or_else(|| json.missing("model_type"))?;
    Architecture::ALL
        .into_iter()
        .find(|a| a.name() == name)
        .ok_or_else(|| unsupported_architecture(&json.file, name, &Architecture::ALL))
}

fn hf_rope(json: &Json, head_dim: u32) -> Result<RopeConfig, LoadError> {
    // Newer files hold base and scaling in one object, older ones in two fields.
    let parameters = json.optional_object("rope_parameters")?;
    let theta = match &parameters {
        Some(p) if p.present("rope_theta") => p.positive("rope_theta")?,
        _ if json.present("rope_theta") => json.positive("rope_theta")?,
        _ => 10_000.0,
    };
    if let Some(factor) = json.optional_f64("partial_rotary_factor")?
        && factor != 1.0
    {
        return Err(json.error("partial_rotary_factor", format!("{factor} is not supported (supported: 1)")));
    }
    let scaling = match parameters {
        Some(p) => Some(p),
        None => json.optional_object("rope_scaling")?,
    };
    let mut rope = RopeConfig::new(theta, head_dim, RopePairing::HalfSplit);
    if let Some(s) = scaling {
        let field = if s.present("rope_type") { "rope_type" } else { "type" };
        rope.scaling = match s.optional_str(field)? {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: s.positive("factor")? },
            Some("llama3") => {
                let (low, high) = (s.positive("low_freq_factor")?, s.positive("high_freq_factor")?);
                if high <= low {
                    return Err(
                        s.error("high_freq_factor", format!("{high} is not greater than low_freq_factor {low}"))
                    );
                }
                RopeScaling::Llama3 {
                    factor: s.positive("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_context: s.u32("original_max_position_embeddings")?,
                }
            }
            Some(other) => {
                return Err(s.error(
                    field,
                    format!("RoPE scaling '{}' is not supported (supported: default, linear, llama3)", excerpt(other)),
                ));
            }
        };
    }
    Ok(rope)
}

/// Per-layer windows. `layer_types` wins; without it a Qwen model with `use_sliding_window` has
/// windows from layer `max_window_layers` on.
fn hf_windows(
    json: &Json,
    architecture: Architecture,
    layers: u32,
    context_length: u32,
) -> Result<Vec<Option<u32>>, LoadError> {
    let full = vec![None; layers as usize];
    // The flag alone decides for Qwen; Llama's configuration has no windows without layer types.
    let used = json.optional_bool("use_sliding_window")?;
    let types: Option<Vec<&str>> =
        json.typed("layer_types", "a list of names", |v| v.as_array()?.iter().map(Value::as_str).collect())?;
    let window = || -> Result<Option<u32>, LoadError> {
        match json.optional_u32("sliding_window")? {
            None => Err(json.error("sliding_window", "this field is missing, but some layers have sliding windows")),
            Some(0) => Err(json.error("sliding_window", "a window of 0 tokens sees nothing")),
            // A window that no sequence outgrows is none.
            Some(w) => Ok((w < context_length).then_some(w)),
        }
    };
    if let Some(types) = types {
        if types.len() != layers as usize {
            return Err(json.error("layer_types", format!("it has {} entries for {layers} layers", types.len())));
        }
        return types
            .into_iter()
            .map(|t| match t {
                "full_attention" => Ok(None),
                "sliding_attention" => window(),
                other => Err(json.error(
                    "layer_types",
                    format!("'{}' is not supported (supported: full_attention, sliding_attention)", excerpt(other)),
                )),
            })
            .collect();
    }
    if matches!(architecture, Architecture::Llama | Architecture::DeepseekV2) || used != Some(true) {
        return Ok(full);
    }
    let first = json.optional_u32("max_window_layers")?.ok_or_else(|| json.missing("max_window_layers"))?;
    let window = window()?;
    Ok((0..layers).map(|i| if i >= first { window } else { None }).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test may panic")]
mod tests {
    use super::super::tiny::TinyModel;
    use super::*;
    use crate::load::gguf_write::GgufWriter;

    fn hf(text: &str) -> Result<DecoderConfig, LoadError> {
        DecoderConfig::from_hf_json(Path::new("config.json"), text)
    }

    /// A small Qwen2 configuration with some fields replaced (or, by null, removed).
    fn with(changes: &str) -> Result<DecoderConfig, LoadError> {
        let mut base: Value = serde_json::from_str(
            r#"{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
                "vocab_size": 320, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": true,
                "eos_token_id": [7, 9], "bos_token_id": 3}"#,
        )
        .unwrap();
        let changes: Map<String, Value> = serde_json::from_str(changes).unwrap();
        base.as_object_mut().unwrap().extend(changes);
        hf(&base.to_string())
    }

    #[test]
    fn a_hugging_face_configuration() {
        let c = with("{}").unwrap();
        assert_eq!(c.architecture, Architecture::Qwen2);
        assert_eq!((c.head_dim, c.layers, c.kv_heads), (16, 4, 2));
        assert!(c.qkv_bias && !c.qk_norm && c.tied_embedding);
        assert_eq!((c.eos.as_slice(), c.bos), (&[7, 9][..], Some(3)));
        assert_eq!(c.rope, RopeConfig::new(1e6, 16, RopePairing::HalfSplit));
        assert_eq!(c.windows, [None; 4]);
        let c = with(r#"{"architectures": null, "model_type": "qwen3", "head_dim": 32}"#).unwrap();
        assert!(c.qk_norm && !c.qkv_bias);
        assert_eq!(c.head_dim, 32);
        let c = with(r#"{"rope_theta": null, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}"#);
        assert_eq!(c.unwrap().rope.theta, 5e5);
        let drafter = r#"{"architectures": ["DFlashDraftModel"], "rope_theta": 100000.0, "rope_scaling": null}"#;
        let rope = RopeConfig::from_hf_json(Path::new("config.json"), drafter, 64).unwrap();
        assert_eq!(rope, RopeConfig::new(1e5, 64, RopePairing::HalfSplit));
    }

    #[test]
    fn windows_of_layers() {
        let sliding = r#""use_sliding_window": true, "sliding_window": 100"#;
        let c = with(&format!("{{{sliding}, \"max_window_layers\": 3}}")).unwrap();
        assert_eq!(c.windows, [None, None, None, Some(100)]);
        assert_eq!((c.window(3), c.window(0), c.window(9)), (Some(100), None, None));
        let types = r#""layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]"#;
        let c = with(&format!("{{{sliding}, {types}}}")).unwrap();
        assert_eq!(c.windows, [None, Some(100), None, Some(100)]);
        let c = with(r#"{"use_sliding_window": false, "sliding_window": 100}"#).unwrap();
        assert_eq!(c.windows, [None; 4]);
    }

    #[test]
    fn refusals_name_the_field_and_the_value() {
        for (changes, says) in [
            (r#"{"hidden_size": null}"#, "field 'hidden_size': this field is missing"),
            (r#"{"hidden_size": 0}"#, "hidden size is 0"),
            (r#"{"hidden_size": -64}"#, "-64 is not an integer"),
            (r#"{"hidden_size": 5000000000}"#, "5000000000 is not an integer"),
            (r#"{"hidden_size": "64"}"#, "\"64\" is not an integer"),
            (r#"{"hidden_size": 66}"#, "66 is not a multiple of the 4 query heads"),
            (r#"{"num_attention_heads": 0}"#, "0 query heads"),
            (r#"{"num_key_value_heads": 3}"#, "4 query heads are not a multiple of 3"),
            (r#"{"num_key_value_heads": 0}"#, "key and value heads is 0"),
            (r#"{"num_hidden_layers": 4000000000}"#, "layers is 4000000000"),
            (r#"{"head_dim": 15}"#, "head dimension 15 is odd"),
            (r#"{"head_dim": 4294967294}"#, "too wide"),
            (r#"{"architectures": ["GemmaForCausalLM"]}"#, "supported: LlamaForCausalLM, Qwen2"),
            (r#"{"architectures": null, "model_type": "gpt2"}"#, "supported: llama, qwen2, qwen3, deepseek_v2"),
            (r#"{"architectures": null}"#, "field 'model_type'"),
            (r#"{"hidden_act": "gelu"}"#, "'gelu' is not supported"),
            (r#"{"rope_scaling": {"type": "yarn", "factor": 4.0}}"#, "field 'rope_scaling.type': RoPE scaling 'yarn'"),
            (r#"{"rope_scaling": {"type": "linear"}}"#, "field 'rope_scaling.factor'"),
            (r#"{"rope_scaling": {"type": "linear", "factor": 0}}"#, "0 is not a positive"),
            (r#"{"rope_theta": -1}"#, "-1 is not a positive"),
            (r#"{"eos_token_id": 320}"#, "320 is not an id of the vocabulary of 320"),
            (r#"{"eos_token_id": "end"}"#, "not a token id"),
            (r#"{"use_sliding_window": true}"#, "field 'max_window_layers'"),
            (r#"{"use_sliding_window": true, "max_window_layers": 2}"#, "field 'sliding_window'"),
            (r#"{"layer_types": ["full_attention"]}"#, "1 entries for 4 layers"),
            (r#"{"layer_types": ["a", "b", "c", "d"]}"#, "'a' is not supported"),
            (r#"{"quantization_config": {}}"#, "quantization_config"),
            (r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": true}"#, "attention_bias"),
            (r#"{"partial_rotary_factor": 0.5}"#, "partial_rotary_factor"),
            (r#"{"rms_norm_eps": -1.0}"#, "epsilon -1"),
        ] {
            let message = with(changes).unwrap_err().to_string();
            assert!(message.contains(says) && message.contains("config.json"), "{changes}: {message}");
        }
        assert!(hf("[]").unwrap_err().to_string().contains("not a JSON object"));
        assert!(hf("{").unwrap_err().to_string().contains("not valid JSON"));
    }

    #[test]
    fn frequencies() {
        let mut rope = RopeConfig::new(10_000.0, 8, RopePairing::HalfSplit);
        let close = |a: &[f64], b: &[f64]| {
            assert_eq!(a.len(), b.len());
            for (a, b) in a.iter().zip(b) {
                assert!((a - b).abs() <= 1e-12 * b.abs(), "{a} {b}");
            }
        };
        close(&rope.inv_freq(), &[1.0, 0.1, 0.01, 0.001]);
        rope.scaling = RopeScaling::Linear { factor: 4.0 };
        close(&rope.inv_freq(), &[0.25, 0.025, 0.0025, 0.00025]);
        rope.scaling = RopeScaling::Divisors(vec![1.0, 2.0, 4.0, 8.0]);
        close(&rope.inv_freq(), &[1.0, 0.05, 0.0025, 0.000125]);
        // Wavelengths are 6.3, 63, 628 and 6283 tokens; 1,000 tokens hold 159, 15.9, 1.59, 0.159
        // turns, so with factors 1 and 4 the first two are kept, the last is divided, and the third
        // lies on the ramp.
        rope.scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 1000 };
        let keep = (10.0 / TAU - 1.0) / 3.0;
        let third = 0.01 * (keep + (1.0 - keep) / 8.0);
        close(&rope.inv_freq(), &[1.0, 0.1, third, 0.000125]);
    }

    fn from_gguf(w: &GgufWriter) -> Result<DecoderConfig, LoadError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, w.finish()).unwrap();
        DecoderConfig::from_gguf(&Gguf::open(&path)?)
    }

    #[test]
    fn a_gguf_configuration_of_each_architecture() {
        for architecture in Architecture::IN_GGUF {
            let tiny = TinyModel::new(architecture);
            let c = from_gguf(&tiny.gguf()).unwrap();
            assert_eq!(c.architecture, architecture);
            assert_eq!(c.hidden_size, tiny.hidden_size as u32);
            assert_eq!(c.qkv_bias, architecture == Architecture::Qwen2);
            assert_eq!(c.qk_norm, architecture == Architecture::Qwen3);
            let interleaved = c.rope.pairing == RopePairing::Interleaved;
            assert_eq!(interleaved, architecture == Architecture::Llama);
        }
    }

    #[test]
    fn gguf_refusals_name_the_key() {
        let change = |key: &str, value: GgufValue| {
            let mut w = TinyModel::new(Architecture::Llama).gguf();
            w.replace(key, value);
            from_gguf(&w).unwrap_err().to_string()
        };
        let text = |s: &str| GgufValue::String(s.into());
        assert!(change("general.architecture", text("mamba")).contains("'mamba' is not supported"));
        assert!(change("general.architecture", GgufValue::U32(1)).contains("not a string"));
        assert!(change("llama.block_count", GgufValue::U32(0)).contains("layers is 0"));
        assert!(change("llama.block_count", text("two")).contains("'llama.block_count': 'two'"));
        assert!(change("llama.vocab_size", GgufValue::U32(5)).contains("llama.vocab_size"));
        assert!(change("llama.rope.scaling.type", text("yarn")).contains("'yarn' is not supported"));
        assert!(change("llama.attention.sliding_window", GgufValue::U32(8)).contains("window of 8"));
        assert!(change("llama.expert_count", GgufValue::U32(8)).contains("llama.expert_count"));
        assert!(change("llama.rope.dimension_count", GgufValue::U32(7)).contains("RoPE dimension 7"));
        assert!(change("llama.rope.freq_base", GgufValue::F32(f32::NAN)).contains("RoPE base NaN"));
        let mut w = TinyModel::new(Architecture::Llama).gguf();
        w.remove("llama.embedding_length");
        let message = from_gguf(&w).unwrap_err().to_string();
        assert!(message.contains("'llama.embedding_length': this metadata key is missing"));
        let mut w = TinyModel::new(Architecture::Llama).gguf();
        w.remove("token_embd.weight");
        assert!(from_gguf(&w).unwrap_err().to_string().contains("token_embd.weight"));
    }

    #[test]
    fn rope_divisors_of_a_gguf_file() {
        let tiny = TinyModel::new(Architecture::Llama);
        let half = tiny.head_dim / 2;
        let with = |values: &[f32]| {
            let mut w = tiny.gguf();
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            w.tensor(ROPE_FREQS, &[values.len()], super::super::StoredType::F32, bytes);
            from_gguf(&w)
        };
        let plain = from_gguf(&tiny.gguf()).unwrap().inv_freq();
        let scaled = with(&vec![2.0; half]).unwrap().inv_freq();
        assert!(plain.iter().zip(&scaled).all(|(a, b)| *a == 2.0 * b));
        assert!(with(&vec![2.0; half + 1]).is_err());
        assert!(with(&vec![0.0; half]).unwrap_err().to_string().contains("divisor 0"));
    }

    #[test]
    fn names_in_both_formats() {
        use CheckpointFormat::{Gguf, HuggingFace};
        let w = WeightName::Layer(3, LayerWeight::Gate);
        assert_eq!(w.in_format(Gguf), "blk.3.ffn_gate.weight");
        assert_eq!(w.in_format(HuggingFace), "model.layers.3.mlp.gate_proj.weight");
        assert_eq!(WeightName::Output.in_format(Gguf), "output.weight");
        assert_eq!(WeightName::Output.in_format(HuggingFace), "lm_head.weight");
        let c = with("{}").unwrap();
        assert_eq!(c.weights().len(), 2 + 4 * 12);
        assert_eq!(WeightName::Layer(0, LayerWeight::KeyBias).shape(&c), [32]);
    }
}
