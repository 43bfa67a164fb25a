use std::path::{Path, PathBuf};

use polyattn_api::{DType, LayerConfig, ModelConfig, ProposerError, TargetFacts, WindowConfig};
use polyattn_nn::{
    drafting::{DraftConfigFile, fits},
    load::RopeConfig,
};
use serde::Deserialize;

/// What a checkpoint's `config.json` says, checked.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DFlashConfig {
    /// The folder it lies in.
    pub folder: PathBuf,
    /// Rows of a block: the anchor and one less drafted tokens.
    pub block_size: u32,
    /// Layers of the target whose output is tapped.
    pub target_layers: Vec<u32>,
    /// The id in the place of a token that is to be drafted.
    pub mask_token: u32,
    /// Width of the residual stream, the target's too.
    pub hidden_size: u32,
    /// Width of the SwiGLU.
    pub intermediate_size: u32,
    /// Query heads.
    pub query_heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Epsilon of the norms.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether the projections of attention have biases.
    pub attention_bias: bool,
    /// For each layer its causality and its window in keys.
    pub layers: Vec<DraftLayer>,
    /// Format of queries and cache.
    pub dtype: DType,
    file: PathBuf,
    num_target_layers: Option<u32>,
    vocab_size: Option<u32>,
}

/// What tells one layer's attention from another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftLayer {
    /// Whether a row sees nothing behind it.
    pub causal: bool,
    /// Keys of the sliding window, the query's own included.
    pub window: Option<u32>,
}

impl DraftLayer {
    /// The name of its kind.
    #[must_use]
    pub fn kind(self) -> String {
        let causal = if self.causal { "-causal" } else { "" };
        match self.window {
            Some(keys) => format!("sliding-{keys}{causal}"),
            None => format!("full{causal}"),
        }
    }
}

#[derive(Deserialize)]
struct Raw {
    block_size: u32,
    #[serde(default)]
    dflash_config: RawDFlash,
    mask_token_id: Option<u32>,
    hidden_size: u32,
    intermediate_size: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    num_hidden_layers: u32,
    num_target_layers: Option<u32>,
    rms_norm_eps: f32,
    #[serde(default)]
    attention_bias: bool,
    layer_types: Option<Vec<String>>,
    sliding_window: Option<u32>,
    #[serde(default)]
    use_sliding_window: bool,
    is_causal: Option<bool>,
    #[serde(default)]
    sliding_window_non_causal: bool,
    vocab_size: Option<u32>,
    draft_vocab_size: Option<u32>,
    #[serde(default)]
    sample_from_anchor: bool,
    #[serde(default)]
    shift_label: bool,
    #[serde(alias = "noise_embed_scale")]
    input_embedding_scale: Option<f64>,
    output_multiplier: Option<f64>,
    hidden_act: Option<String>,
    #[serde(alias = "torch_dtype")]
    dtype: Option<String>,
}

#[derive(Default, Deserialize)]
struct RawDFlash {
    mask_token_id: Option<u32>,
    target_layer_ids: Option<Vec<u32>>,
    causal: Option<bool>,
    swa_window_size: Option<u32>,
    #[serde(default)]
    use_swa: bool,
}

impl DFlashConfig {
    /// Reads the configuration of a checkpoint: a folder, or a file in one.
    ///
    /// # Errors
    /// A file that is missing or is no DFlash configuration, or one of a variant that is not supported: the message
    /// names file, field and value.
    pub fn open(checkpoint: &Path) -> Result<Self, ProposerError> {
        Self::checked(DraftConfigFile::open(checkpoint, "DFlash")?)
    }

    fn checked(file: DraftConfigFile<Raw>) -> Result<Self, ProposerError> {
        let raw = &file.fields;
        let fault = |message: String| Err(file.fault(message));
        if raw.block_size < 2 {
            return fault(format!("block_size is {}, a block is the anchor and at least one mask", raw.block_size));
        }
        let query_heads = file.bounded("num_attention_heads", raw.num_attention_heads, 1 << 12)?;
        let kv_heads =
            file.bounded("num_key_value_heads", raw.num_key_value_heads.unwrap_or(query_heads), query_heads)?;
        if !query_heads.is_multiple_of(kv_heads) {
            return fault(format!("num_key_value_heads {kv_heads} does not divide num_attention_heads {query_heads}"));
        }
        let hidden_size = file.bounded("hidden_size", raw.hidden_size, 1 << 20)?;
        let head_dim = file.bounded("head_dim", raw.head_dim.unwrap_or(hidden_size / query_heads), 1 << 14)?;
        if !head_dim.is_multiple_of(2) {
            return fault(format!("head_dim is {head_dim}, RoPE needs an even number"));
        }
        let rope = RopeConfig::from_hf_json(&file.file, &file.text, head_dim)
            .map_err(|error| ProposerError::Checkpoint(error.to_string()))?;
        let layer_count = file.bounded("num_hidden_layers", raw.num_hidden_layers, 1 << 10)?;
        if !(raw.rms_norm_eps.is_finite() && raw.rms_norm_eps >= 0.0) {
            return fault(format!("rms_norm_eps is {}", raw.rms_norm_eps));
        }
        let unsupported = [
            (raw.sample_from_anchor, "sample_from_anchor"),
            (raw.shift_label, "shift_label"),
            (raw.input_embedding_scale.is_some_and(|scale| scale != 1.0), "input_embedding_scale"),
            (raw.output_multiplier.is_some_and(|factor| factor <= 0.0), "an output_multiplier that is not positive"),
            (raw.draft_vocab_size.is_some_and(|size| Some(size) != raw.vocab_size), "draft_vocab_size"),
            (raw.hidden_act.as_deref().is_some_and(|name| name != "silu"), "a hidden_act other than silu"),
        ];
        if let Some((_, what)) = unsupported.iter().find(|(found, _)| *found) {
            return fault(format!("checkpoints with {what} are not supported"));
        }
        let mask_token = raw
            .dflash_config
            .mask_token_id
            .or(raw.mask_token_id)
            .ok_or_else(|| file.fault("neither dflash_config.mask_token_id nor mask_token_id is there"))?;
        let target_layers = match (&raw.dflash_config.target_layer_ids, raw.num_target_layers) {
            (Some(layers), _) if layers.is_empty() => {
                return fault("dflash_config.target_layer_ids is empty".into());
            }
            (Some(layers), _) => layers.clone(),
            (None, Some(layers)) => default_taps(layers, layer_count),
            (None, None) => {
                return fault("neither dflash_config.target_layer_ids nor num_target_layers is there".into());
            }
        };
        if let Some(types) = &raw.layer_types
            && types.len() != layer_count as usize
        {
            return fault(format!("layer_types has {} entries, num_hidden_layers is {layer_count}", types.len()));
        }
        let forced = raw.is_causal.or(raw.dflash_config.causal);
        let window = raw.dflash_config.swa_window_size.or(raw.sliding_window);
        let mut layers = Vec::new();
        for layer in 0..layer_count as usize {
            let sliding = match &raw.layer_types {
                Some(types) => match types[layer].as_str() {
                    "sliding_attention" => true,
                    "full_attention" => false,
                    other => return fault(format!("layer_types[{layer}] is '{other}'")),
                },
                None => raw.use_sliding_window || raw.dflash_config.use_swa,
            };
            let window = match (sliding, window) {
                (false, _) => None,
                (true, Some(keys)) if keys > 0 => Some(keys),
                (true, _) => return fault(format!("layer {layer} slides, but sliding_window is missing or 0")),
            };
            let causal = forced.unwrap_or(sliding && !raw.sliding_window_non_causal);
            layers.push(DraftLayer { causal, window });
        }
        Ok(Self {
            folder: file.folder.clone(),
            block_size: file.bounded("block_size", raw.block_size, 1 << 10)?,
            target_layers,
            mask_token,
            hidden_size,
            intermediate_size: file.bounded("intermediate_size", raw.intermediate_size, 1 << 22)?,
            query_heads,
            kv_heads,
            head_dim,
            rms_norm_eps: raw.rms_norm_eps,
            rope,
            attention_bias: raw.attention_bias,
            layers,
            dtype: match raw.dtype.as_deref() {
                Some("float32") => DType::F32,
                _ => DType::F16,
            },
            file: file.file.clone(),
            num_target_layers: raw.num_target_layers,
            vocab_size: raw.vocab_size,
        })
    }

    /// Checks that the drafter was made for a target like this.
    ///
    /// # Errors
    /// [`ProposerError::Mismatch`] with the file, the field and both numbers.
    pub fn check(&self, target: &TargetFacts) -> Result<(), ProposerError> {
        let file = &self.file;
        let fail = |message: String| Err(ProposerError::Mismatch(format!("{}: {message}", file.display())));
        if let Some(layers) = self.num_target_layers
            && layers != target.layers
        {
            return fail(format!("num_target_layers is {layers}, the target has {} layers", target.layers));
        }
        if let Some(tap) = self.target_layers.iter().find(|tap| **tap >= target.layers) {
            return fail(format!("target_layer_ids names layer {tap}, the target has {} layers", target.layers));
        }
        fits(file, "hidden_size", Some(self.hidden_size), target.hidden_size)?;
        fits(file, "vocab_size", self.vocab_size, target.vocab_size)?;
        if self.mask_token >= target.vocab_size {
            return fail(format!(
                "mask_token_id is {}, the target's vocabulary ends at {}",
                self.mask_token, target.vocab_size
            ));
        }
        if self.block_size > target.context_length {
            return fail(format!(
                "block_size is {}, the target's context is {}",
                self.block_size, target.context_length
            ));
        }
        Ok(())
    }

    /// Its attention layers, as the selector sees them.
    #[must_use]
    pub fn model_config(&self) -> ModelConfig {
        let mut kinds: Vec<LayerConfig> = Vec::new();
        for layer in &self.layers {
            let name = layer.kind();
            if let Some(kind) = kinds.iter_mut().find(|kind| kind.name == name) {
                kind.count += 1;
                continue;
            }
            let mut kind = LayerConfig::gqa(name, 1, self.query_heads, self.kv_heads, self.head_dim);
            kind.causal = Some(layer.causal);
            kind.window = layer.window.map(WindowConfig::Keys);
            kinds.push(kind);
        }
        ModelConfig { dtype: self.dtype, layers: kinds }
    }
}

/// The taps of a target of N layers where a checkpoint names none: one in the middle, or A of them spread evenly from 1
/// to N − 3, rounded half to even.
fn default_taps(target_layers: u32, taps: u32) -> Vec<u32> {
    if taps == 1 {
        return vec![target_layers / 2];
    }
    let step = (f64::from(target_layers) - 4.0) / f64::from(taps - 1);
    (0..taps).map(|tap| (1.0 + f64::from(tap) * step).round_ties_even().max(0.0) as u32).collect()
}

#[cfg(test)]
mod tests {
    use polyattn_api::TargetFacts;
    use polyattn_nn::drafting::DraftConfigFile;

    use super::{DFlashConfig, DraftLayer, default_taps};

    const BASE: &str = r#"{"block_size": 8, "dflash_config": {"mask_token_id": 7, "target_layer_ids": [1, 2]},
        "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
        "num_hidden_layers": 2, "num_target_layers": 6, "rms_norm_eps": 1e-6, "vocab_size": 101 EXTRA}"#;

    fn parse(extra: &str) -> Result<DFlashConfig, String> {
        let file = DraftConfigFile::parse("drafter/config.json".into(), BASE.replace("EXTRA", extra));
        file.and_then(DFlashConfig::checked).map_err(|error| error.to_string())
    }

    #[test]
    fn spreads_taps_half_to_even() {
        assert_eq!(default_taps(30, 5), [1, 8, 14, 20, 27]);
        assert_eq!(default_taps(36, 5), [1, 9, 17, 25, 33]);
        assert_eq!(default_taps(24, 5), [1, 6, 11, 16, 21]);
        assert_eq!(default_taps(24, 1), [12]);
    }

    #[test]
    fn causality_and_windows_by_layer() {
        let layers = |extra: &str| parse(extra).unwrap().layers;
        let full = DraftLayer { causal: false, window: None };
        assert_eq!(layers(""), [full; 2]);
        let mixed = r#", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6"#;
        assert_eq!(layers(mixed), [DraftLayer { causal: true, window: Some(6) }, full]);
        let both_ways = format!("{mixed}, \"sliding_window_non_causal\": true");
        assert_eq!(layers(&both_ways)[0], DraftLayer { causal: false, window: Some(6) });
        let forced = format!("{mixed}, \"is_causal\": true");
        assert_eq!(layers(&forced)[1], DraftLayer { causal: true, window: None });
        assert!(parse(r#", "use_sliding_window": true"#).unwrap_err().contains("sliding_window is missing"));
    }

    #[test]
    fn refuses_what_it_cannot_run_or_does_not_fit() {
        assert!(parse(r#", "sample_from_anchor": true"#).unwrap_err().contains("sample_from_anchor"));
        assert!(parse(r#", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}"#).unwrap_err().contains("yarn"));
        let config = parse("").unwrap();
        let target = TargetFacts::new(6, 48, 101, 512);
        config.check(&target).unwrap();
        let cases = [
            (TargetFacts::new(5, 48, 101, 512), "num_target_layers is 6, the target has 5 layers"),
            (TargetFacts::new(6, 64, 101, 512), "hidden_size is 48, the target's is 64"),
            (TargetFacts::new(6, 48, 100, 512), "vocab_size is 101, the target's is 100"),
            (TargetFacts::new(6, 48, 101, 4), "block_size is 8"),
        ];
        for (target, expected) in cases {
            assert!(config.check(&target).unwrap_err().to_string().contains(expected));
        }
    }
}
