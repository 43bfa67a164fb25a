use std::path::{Path, PathBuf};

use polyattn_api::{DType, LayerConfig, ModelConfig, ProposerError, TargetFacts};
use polyattn_nn::{
    drafting::{DraftConfigFile, fits},
    layer::LayerShape,
    load::{Checkpoint, RopeConfig},
};
use serde::Deserialize;

/// The name of the only layer kind.
const LAYER: &str = "draft";

/// Which of the methods a checkpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Version {
    /// EAGLE, and EAGLE-2, which has the same weights.
    Eagle1,
    /// EAGLE-3.
    Eagle3,
}

impl Version {
    /// The proposer's name.
    #[must_use]
    pub const fn method(self) -> &'static str {
        match self {
            Self::Eagle1 => "eagle",
            Self::Eagle3 => "eagle3",
        }
    }
}

/// What a checkpoint's `config.json` says, checked.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct EagleConfig {
    /// The folder it lies in.
    pub folder: PathBuf,
    /// The method it was read for.
    pub version: Version,
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
    /// Format of queries and cache.
    pub dtype: DType,
    /// EAGLE-3: whether the residual stream is the normed hidden state.
    pub norm_before_residual: bool,
    /// EAGLE-3: ids of its own output head.
    pub draft_vocab_size: Option<u32>,
    file: PathBuf,
    /// EAGLE-3: layers whose input is tapped, where the checkpoint names them.
    boundaries: Option<Vec<u32>>,
    vocab_size: Option<u32>,
    target_hidden_size: Option<u32>,
}

#[derive(Deserialize)]
struct Raw {
    hidden_size: u32,
    intermediate_size: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    #[serde(default = "one")]
    num_hidden_layers: u32,
    rms_norm_eps: f32,
    vocab_size: Option<u32>,
    draft_vocab_size: Option<u32>,
    target_hidden_size: Option<u32>,
    hidden_act: Option<String>,
    #[serde(alias = "torch_dtype")]
    dtype: Option<String>,
    #[serde(default)]
    norm_before_residual: bool,
    #[serde(default)]
    norm_before_fc: bool,
    #[serde(default)]
    parallel_drafting: bool,
    eagle_aux_hidden_state_layer_ids: Option<Vec<u32>>,
    #[serde(default)]
    eagle_config: RawEagle,
}

#[derive(Default, Deserialize)]
struct RawEagle {
    eagle_aux_hidden_state_layer_ids: Option<Vec<u32>>,
    use_aux_hidden_state: Option<bool>,
}

fn one() -> u32 {
    1
}

impl EagleConfig {
    /// Reads the configuration of a checkpoint, a folder or a file in one, for one of the methods.
    ///
    /// # Errors
    /// A file that is missing or is no EAGLE configuration, or one of a variant that is not supported: the message names
    /// file, field and value.
    pub fn open(checkpoint: &Path, version: Version) -> Result<Self, ProposerError> {
        Self::of_file(DraftConfigFile::open(checkpoint, "EAGLE")?, version)
    }

    fn of_file(config: DraftConfigFile<Raw>, version: Version) -> Result<Self, ProposerError> {
        let raw = &config.fields;
        let query_heads = config.bounded("num_attention_heads", raw.num_attention_heads, 1 << 12)?;
        let kv_heads = raw.num_key_value_heads.unwrap_or(query_heads);
        let kv_heads = config.bounded("num_key_value_heads", kv_heads, query_heads)?;
        if !query_heads.is_multiple_of(kv_heads) {
            let message = format!("num_key_value_heads {kv_heads} does not divide num_attention_heads {query_heads}");
            return Err(config.fault(message));
        }
        let hidden_size = config.bounded("hidden_size", raw.hidden_size, 1 << 20)?;
        let head_dim = config.bounded("head_dim", raw.head_dim.unwrap_or(hidden_size / query_heads), 1 << 14)?;
        if !head_dim.is_multiple_of(2) {
            return Err(config.fault(format!("head_dim is {head_dim}, RoPE needs an even number")));
        }
        if raw.num_hidden_layers != 1 {
            return Err(config.fault(format!("num_hidden_layers is {}, only 1 is supported", raw.num_hidden_layers)));
        }
        if !(raw.rms_norm_eps.is_finite() && raw.rms_norm_eps >= 0.0) {
            return Err(config.fault(format!("rms_norm_eps is {}", raw.rms_norm_eps)));
        }
        let unsupported = [
            (raw.norm_before_fc, "norm_before_fc"),
            (raw.parallel_drafting, "parallel_drafting (P-EAGLE)"),
            (raw.hidden_act.as_ref().is_some_and(|name| name != "silu"), "a hidden_act other than silu"),
            (raw.eagle_config.use_aux_hidden_state == Some(false), "use_aux_hidden_state: false"),
        ];
        if let Some((_, what)) = unsupported.iter().find(|(found, _)| *found) {
            return Err(config.fault(format!("checkpoints with {what} are not supported")));
        }
        let listed = raw.eagle_config.eagle_aux_hidden_state_layer_ids.as_ref();
        let boundaries = listed.or(raw.eagle_aux_hidden_state_layer_ids.as_ref()).cloned();
        if let Some(ids) = &boundaries
            && (ids.is_empty() || ids.contains(&0))
        {
            return Err(config.fault(format!(
                "eagle_aux_hidden_state_layer_ids is {ids:?}: each names the layer that a hidden state enters, from 1"
            )));
        }
        let rope = RopeConfig::from_hf_json(&config.file, &config.text, head_dim)
            .map_err(|error| ProposerError::Checkpoint(error.to_string()))?;
        Ok(Self {
            version,
            hidden_size,
            intermediate_size: config.bounded("intermediate_size", raw.intermediate_size, 1 << 22)?,
            query_heads,
            kv_heads,
            head_dim,
            rms_norm_eps: raw.rms_norm_eps,
            rope,
            dtype: match raw.dtype.as_deref() {
                Some("float32") => DType::F32,
                _ => DType::F16,
            },
            norm_before_residual: raw.norm_before_residual,
            draft_vocab_size: raw.draft_vocab_size,
            boundaries,
            vocab_size: raw.vocab_size,
            target_hidden_size: raw.target_hidden_size,
            folder: config.folder,
            file: config.file,
        })
    }

    /// Checks that the drafter was made for a target like this.
    ///
    /// # Errors
    /// [`ProposerError::Mismatch`] with the file, the field and both numbers.
    pub fn check(&self, target: &TargetFacts) -> Result<(), ProposerError> {
        fits(&self.file, "hidden_size", Some(self.hidden_size), target.hidden_size)?;
        fits(&self.file, "target_hidden_size", self.target_hidden_size, target.hidden_size)?;
        fits(&self.file, "vocab_size", self.vocab_size, target.vocab_size)?;
        if let Some(draft) = self.draft_vocab_size.filter(|draft| *draft > target.vocab_size) {
            return Err(ProposerError::Mismatch(format!(
                "{}: draft_vocab_size is {draft}, the target's vocabulary ends at {}",
                self.file.display(),
                target.vocab_size
            )));
        }
        match self.version {
            Version::Eagle1 => Ok(()),
            Version::Eagle3 => self.taps(target).map(drop),
        }
    }

    /// The layers of a target whose output EAGLE-3 sees: those before the layers that the checkpoint names, or before
    /// layers 2, N ÷ 2 and N − 3 of N.
    ///
    /// # Errors
    /// A layer that the target does not have.
    pub fn taps(&self, target: &TargetFacts) -> Result<Vec<u32>, ProposerError> {
        let fail = |message: String| Err(ProposerError::Mismatch(format!("{}: {message}", self.file.display())));
        let layers = target.layers;
        let boundaries = match &self.boundaries {
            Some(boundaries) => boundaries.clone(),
            None if layers < 6 => {
                return fail(format!(
                    "eagle_aux_hidden_state_layer_ids is missing, and a target of {layers} layers has no 2, N / 2 and \
                     N - 3 that rise; at least 6"
                ));
            }
            None => vec![2, layers / 2, layers - 3],
        };
        if let Some(boundary) = boundaries.iter().find(|boundary| **boundary > layers) {
            return fail(format!(
                "eagle_aux_hidden_state_layer_ids names boundary {boundary}, the target has {layers} layers"
            ));
        }
        // The hidden state that enters a layer is the output of the one before.
        Ok(boundaries.iter().map(|boundary| boundary - 1).collect())
    }

    /// The dimensions of its layer, whose biases and norms the tensors behind `prefix` tell.
    #[must_use]
    pub fn shape(&self, checkpoint: &Checkpoint, prefix: &str) -> LayerShape {
        let has = |name: &str| checkpoint.has(&format!("{prefix}self_attn.{name}"));
        LayerShape {
            hidden_size: self.hidden_size,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            intermediate_size: self.intermediate_size,
            eps: self.rms_norm_eps,
            pairing: self.rope.pairing,
            qkv_bias: has("q_proj.bias"),
            output_bias: has("o_proj.bias"),
            qk_norm: has("q_norm.weight"),
        }
    }

    /// Its attention layer, as the selector sees it.
    #[must_use]
    pub fn model_config(&self) -> ModelConfig {
        let layer = LayerConfig::gqa(LAYER, 1, self.query_heads, self.kv_heads, self.head_dim);
        ModelConfig { dtype: self.dtype, layers: vec![layer] }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test may panic")]
mod tests {
    use polyattn_api::{ProposerError, TargetFacts};
    use polyattn_nn::drafting::DraftConfigFile;

    use super::{EagleConfig, Version};

    const BASE: &str = r#"{"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 101, "draft_vocab_size": 53 EXTRA}"#;

    fn parse(extra: &str) -> Result<EagleConfig, ProposerError> {
        let text = BASE.replace("EXTRA", extra);
        EagleConfig::of_file(DraftConfigFile::parse("drafter/config.json".into(), text)?, Version::Eagle3)
    }

    #[test]
    fn taps_stand_before_the_layers_that_are_named() {
        let taps = |extra: &str, layers| parse(extra).unwrap().taps(&TargetFacts::new(layers, 32, 101, 512));
        assert_eq!(taps("", 32).unwrap(), [1, 15, 28]);
        assert_eq!(taps("", 6).unwrap(), [1, 2, 2]);
        let named = r#", "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}"#;
        assert_eq!(taps(named, 6).unwrap(), [0, 2, 5]);
        assert!(taps(named, 5).unwrap_err().to_string().contains("boundary 6, the target has 5 layers"));
        assert!(taps("", 5).unwrap_err().to_string().contains("5 layers"));
        let zero = parse(r#", "eagle_aux_hidden_state_layer_ids": [0, 3]"#).unwrap_err().to_string();
        assert!(zero.contains("drafter/config.json") && zero.contains("[0, 3]"), "{zero}");
    }

    #[test]
    fn refuses_what_it_cannot_run_or_does_not_fit() {
        for (extra, says) in [
            (r#", "num_hidden_layers": 2"#, "num_hidden_layers is 2"),
            (r#", "norm_before_fc": true"#, "norm_before_fc"),
            (r#", "hidden_act": "gelu""#, "hidden_act"),
            (r#", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}"#, "yarn"),
        ] {
            let error = parse(extra).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let config = parse("").unwrap();
        config.check(&TargetFacts::new(8, 32, 101, 512)).unwrap();
        for (target, expected) in [
            (TargetFacts::new(8, 64, 101, 512), "hidden_size is 32, the target's is 64"),
            (TargetFacts::new(8, 32, 100, 512), "vocab_size is 101, the target's is 100"),
        ] {
            assert!(config.check(&target).unwrap_err().to_string().contains(expected));
        }
    }
}
