//! Small random models for tests, in both file formats (feature `test-support`).

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::config::{Architecture, DecoderConfig, LayerWeight, WeightName};
use super::dequant::quantize;
use super::gguf::{GgufArray, GgufValue};
use super::gguf_write::GgufWriter;
use super::tokenizer::byte_to_char;
use super::{CheckpointFormat, StoredType};

/// Control tokens, with ids from 0.
const SPECIALS: [&str; 4] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"];

/// Merges over the byte alphabet, in order of rank.
const MERGES: [&str; 10] = ["t h", "th e", "Ġ the", "i n", "e r", "o n", "a n", "Ġ a", "the r", "o ther"];

/// A ChatML template, as SmolLM2's, without a system message of its own.
pub const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A decoder of random weights with a byte-level tokenizer and a chat template.
///
/// The weights are a function of the fields alone, and the GGUF file and the Hugging Face folder
/// hold the same model: in GGUF files of the architecture `llama` the rows of the query and key
/// projections are permuted for interleaved RoPE.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of `DecoderConfig`")]
pub struct TinyModel {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub layers: usize,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate_size: usize,
    pub context_length: usize,
    pub rope_theta: f32,
    pub rms_norm_eps: f32,
    pub tied_embedding: bool,
    /// How matrices are stored: F32, F16, BF16, Q8_0, Q4_0 or Q4_1 in GGUF files; in safetensors
    /// F16 and BF16 are kept and all others become F32. Norms and biases are always F32.
    pub ty: StoredType,
    /// Another seed gives other weights.
    pub seed: u64,
    /// Fields of `config.json` that one family alone has.
    pub more: Map<String, Value>,
}

impl TinyModel {
    /// Two layers of width 64 with 4 query and 2 key heads of dimension 16, stored as F32.
    pub fn new(architecture: Architecture) -> Self {
        Self {
            architecture,
            hidden_size: 64,
            layers: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 16,
            intermediate_size: 96,
            context_length: 512,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tied_embedding: true,
            ty: StoredType::F32,
            seed: 1,
            more: Map::new(),
        }
    }

    /// A DeepSeek-V2-style model of three layers: latent attention of 4 heads over a latent of 32 and a rotated key of 8
    /// elements, and with `experts` 8 of them behind the first layer, 3 to a token, beside one that all share. It has a
    /// Hugging Face folder alone.
    pub fn deepseek(experts: bool) -> Self {
        let mut more = json!({
            "q_lora_rank": null, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24,
        });
        if experts {
            more = json!({
                "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24,
                "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 40,
                "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": false, "topk_method": "greedy",
                "scoring_func": "softmax", "routed_scaling_factor": 1.5,
            });
        }
        let more = more.as_object().cloned().unwrap_or_default();
        Self { layers: 3, kv_heads: 4, more, ..Self::new(Architecture::DeepseekV2) }
    }

    /// Its configuration.
    ///
    /// # Panics
    /// If the fields contradict each other.
    pub fn config(&self) -> DecoderConfig {
        match DecoderConfig::from_hf_json(Path::new("config.json"), &self.config_json()) {
            Ok(config) => config,
            Err(error) => panic!("{error}"),
        }
    }

    /// Tokens of the vocabulary and rows of the embedding.
    pub fn vocab_size(&self) -> usize {
        SPECIALS.len() + 256 + MERGES.len()
    }

    /// The vocabulary in the order of ids.
    pub fn tokens(&self) -> Vec<String> {
        SPECIALS
            .iter()
            .map(|s| s.to_string())
            .chain((0..=255).map(|b| byte_to_char(b).to_string()))
            .chain(MERGES.iter().map(|m| m.replace(' ', "")))
            .collect()
    }

    /// All weights with their row-major shapes, in the row order of Hugging Face checkpoints.
    pub fn weights(&self) -> Vec<(WeightName, Vec<usize>, Vec<f32>)> {
        let config = self.config();
        let mut names = vec![WeightName::TokenEmbedding, WeightName::OutputNorm];
        if !self.tied_embedding {
            names.push(WeightName::Output);
        }
        names.extend((0..config.layers).flat_map(|layer| config.layer_weights(layer)));
        let mut random = Random(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        names
            .into_iter()
            .map(|name| {
                let shape = name.shape(&config);
                let count = shape.iter().product();
                let values = match (shape.len(), name) {
                    (2, WeightName::TokenEmbedding) => random.values(count, 1.0),
                    (2, _) => {
                        let columns = shape.last().copied().unwrap_or(1);
                        random.values(count, 1.7 / (columns as f32).sqrt())
                    }
                    (_, WeightName::Layer(_, w)) if w.gguf_suffix().ends_with("bias") => random.values(count, 0.5),
                    // Norm weights lie around 1.
                    _ => random.values(count, 0.25).iter().map(|v| v + 1.0).collect(),
                };
                (name, shape, values)
            })
            .collect()
    }

    /// The model as a GGUF file that can still be changed.
    ///
    /// # Panics
    /// If `ty` is one of the K types, rows are not whole blocks of it, or the architecture is not read from GGUF files.
    pub fn gguf(&self) -> GgufWriter {
        assert!(Architecture::IN_GGUF.contains(&self.architecture), "{:?} in a GGUF file", self.architecture);
        let name = self.architecture.name();
        let mut w = GgufWriter::new();
        let text = |s: &str| GgufValue::String(s.to_owned());
        w.value("general.architecture", text(name));
        for (suffix, v) in [
            ("block_count", self.layers),
            ("context_length", self.context_length),
            ("embedding_length", self.hidden_size),
            ("feed_forward_length", self.intermediate_size),
            ("attention.head_count", self.query_heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
            ("vocab_size", self.vocab_size()),
        ] {
            w.value(&format!("{name}.{suffix}"), GgufValue::U32(v as u32));
        }
        w.value(&format!("{name}.rope.freq_base"), GgufValue::F32(self.rope_theta));
        w.value(&format!("{name}.attention.layer_norm_rms_epsilon"), GgufValue::F32(self.rms_norm_eps));
        let tokens = self.tokens();
        let kinds = (0..tokens.len()).map(|i| if i < SPECIALS.len() { 3 } else { 1 });
        let list = |l: Vec<String>| GgufValue::Array(GgufArray::String(l));
        w.value("tokenizer.ggml.model", text("gpt2"));
        w.value("tokenizer.ggml.pre", text("smollm"));
        w.value("tokenizer.ggml.token_type", GgufValue::Array(GgufArray::I32(kinds.collect())));
        w.value("tokenizer.ggml.tokens", list(tokens));
        w.value("tokenizer.ggml.merges", list(MERGES.iter().map(|m| m.to_string()).collect()));
        w.value("tokenizer.ggml.bos_token_id", GgufValue::U32(1));
        w.value("tokenizer.ggml.eos_token_id", GgufValue::U32(2));
        w.value("tokenizer.ggml.add_bos_token", GgufValue::Bool(false));
        w.value("tokenizer.chat_template", text(CHATML));

        for (name, shape, mut values) in self.weights() {
            if self.architecture == Architecture::Llama
                && let WeightName::Layer(_, LayerWeight::Query | LayerWeight::Key) = name
            {
                values = self.interleaved(&values);
            }
            let ty = match shape.len() {
                1 => StoredType::F32,
                _ => self.ty,
            };
            let Some(bytes) = quantize(ty, &values) else {
                panic!("{name:?} of shape {shape:?} cannot be written as {ty}");
            };
            w.tensor(&name.in_format(CheckpointFormat::Gguf), &shape, ty, bytes);
        }
        w
    }

    /// Within each head, row `2i + s` of the outcome is row `s · head_dim/2 + i`.
    fn interleaved(&self, values: &[f32]) -> Vec<f32> {
        let half = self.head_dim / 2;
        values
            .chunks(self.head_dim * self.hidden_size)
            .flat_map(|head| {
                (0..self.head_dim).flat_map(move |row| {
                    let from = (row % 2) * half + row / 2;
                    head[from * self.hidden_size..(from + 1) * self.hidden_size].iter()
                })
            })
            .copied()
            .collect()
    }

    /// Writes the model as one GGUF file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_gguf(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, self.gguf().finish())
    }

    /// `config.json`.
    pub fn config_json(&self) -> String {
        let mut config = json!({
            "architectures": [self.architecture.hf_class()],
            "model_type": self.architecture.name(),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size(),
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied_embedding,
            "bos_token_id": 1,
            "eos_token_id": 2,
        });
        if let Some(fields) = config.as_object_mut() {
            fields.extend(self.more.clone());
        }
        config.to_string()
    }

    /// `tokenizer.json`.
    pub fn tokenizer_json(&self) -> String {
        let vocab: serde_json::Map<String, serde_json::Value> =
            self.tokens().into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
        let added: Vec<_> = SPECIALS
            .iter()
            .enumerate()
            .map(|(id, token)| {
                json!({ "id": id, "content": token, "single_word": false, "lstrip": false,
                        "rstrip": false, "normalized": false, "special": true })
            })
            .collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
                { "type": "Digits", "individual_digits": true },
                { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                  "use_regex": true } ] },
            "post_processor": null,
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                         "use_regex": true },
            "model": { "type": "BPE", "dropout": null, "unk_token": null,
                       "continuing_subword_prefix": null, "end_of_word_suffix": null,
                       "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                       "vocab": vocab, "merges": MERGES },
        })
        .to_string()
    }

    /// Writes the model as a Hugging Face folder, which must exist, with one weight file.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write_hf_folder(&self, folder: &Path) -> io::Result<()> {
        self.write_hf_folder_of(self.weights(), folder)
    }

    /// The same with other weights, of the names and shapes of [`weights`](Self::weights).
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write_hf_folder_of(
        &self,
        weights: Vec<(WeightName, Vec<usize>, Vec<f32>)>,
        folder: &Path,
    ) -> io::Result<()> {
        std::fs::write(folder.join("config.json"), self.config_json())?;
        std::fs::write(folder.join("tokenizer.json"), self.tokenizer_json())?;
        let tokenizer = json!({ "chat_template": CHATML, "bos_token": "<|im_start|>",
                                "eos_token": { "content": "<|im_end|>" },
                                "add_bos_token": false });
        std::fs::write(folder.join("tokenizer_config.json"), tokenizer.to_string())?;
        let generation = json!({ "eos_token_id": [2, 0] });
        std::fs::write(folder.join("generation_config.json"), generation.to_string())?;

        let stored: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = weights
            .into_iter()
            .map(|(name, shape, values)| {
                let (ty, dtype) = match (shape.len(), self.ty) {
                    (2, StoredType::F16) => (StoredType::F16, Dtype::F16),
                    (2, StoredType::BF16) => (StoredType::BF16, Dtype::BF16),
                    _ => (StoredType::F32, Dtype::F32),
                };
                let bytes = quantize(ty, &values).unwrap_or_default();
                let name = name.in_format(CheckpointFormat::HuggingFace);
                (name, dtype, shape, bytes)
            })
            .collect();
        let views = stored
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                TensorView::new(*dtype, shape.clone(), bytes).map(|v| (name.as_str(), v))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(io::Error::other)?;
        let metadata: Option<HashMap<String, String>> = None;
        let bytes = ::safetensors::serialize(views, metadata).map_err(io::Error::other)?;
        std::fs::write(folder.join("model.safetensors"), bytes)
    }
}

/// Numbers spread evenly around 0.
struct Random(u64);

impl Random {
    fn values(&mut self, count: usize, most: f32) -> Vec<f32> {
        (0..count)
            .map(|_| {
                self.0 ^= self.0 << 13;
                self.0 ^= self.0 >> 7;
                self.0 ^= self.0 << 17;
                let unit = (self.0 >> 40) as f32 / (1u64 << 24) as f32;
                (2.0 * unit - 1.0) * most
            })
            .collect()
    }
}

/// The real model's GGUF file for tests that need it: `$POLYATTN_TEST_GGUF`, or else
/// `smollm2.gguf` in the user's cache folder. Without one it prints why the test is skipped.
pub fn cached_model() -> Option<PathBuf> {
    const VARIABLE: &str = "POLYATTN_TEST_GGUF";
    if let Some(path) = std::env::var_os(VARIABLE).filter(|p| !p.is_empty()) {
        let path = PathBuf::from(path);
        if path.exists() {
            return Some(path);
        }
        eprintln!("skipped: ${VARIABLE} is {}, which does not exist", path.display());
        return None;
    }
    let cache =
        std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(std::env::home_dir()?.join(".cache")));
    let path = cache?.join("polyattn").join("smollm2.gguf");
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: there is no model at {}, and ${VARIABLE} is not set", path.display());
    None
}
