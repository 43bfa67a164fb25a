use std::path::{Path, PathBuf};

use polyattn_api::{DType, LayerConfig, ModelConfig, ProposerError, TargetFacts};
use polyattn_nn::{
    NnError,
    drafting::{DraftConfigFile, fits},
    layer::LayerShape,
    load::DecoderConfig,
};
use serde::Deserialize;

/// The name of the only layer kind.
const LAYER: &str = "draft";

/// What a checkpoint's `config.json` says, checked.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MtpConfig {
    /// The folder it lies in.
    pub folder: PathBuf,
    /// The model that it is part of, whose layers the prediction's is like.
    pub model: DecoderConfig,
    /// Format of queries and cache.
    pub dtype: DType,
    file: PathBuf,
}

#[derive(Deserialize)]
struct Raw {
    num_nextn_predict_layers: Option<u32>,
    mtp_num_hidden_layers: Option<u32>,
    #[serde(alias = "torch_dtype")]
    dtype: Option<String>,
}

impl MtpConfig {
    /// Reads the configuration of a checkpoint: a folder, or a file in one.
    ///
    /// # Errors
    /// A file that is missing, a model that is not supported, or one without a layer for the prediction or with several:
    /// the message names file, field and value.
    pub fn open(checkpoint: &Path) -> Result<Self, ProposerError> {
        if checkpoint.extension().is_some_and(|extension| extension == "gguf") {
            return Err(ProposerError::Checkpoint(format!(
                "{}: of a GGUF file no layers for multi-token prediction are read; name a folder with config.json and \
                 *.safetensors",
                checkpoint.display()
            )));
        }
        let config = DraftConfigFile::<Raw>::open(checkpoint, "multi-token prediction")?;
        let raw = &config.fields;
        let (field, count) = match (raw.num_nextn_predict_layers, raw.mtp_num_hidden_layers) {
            (Some(count), _) => ("num_nextn_predict_layers", count),
            (None, Some(count)) => ("mtp_num_hidden_layers", count),
            (None, None) => {
                return Err(config.fault(
                    "neither num_nextn_predict_layers nor mtp_num_hidden_layers is there: the checkpoint has no layer \
                     for multi-token prediction",
                ));
            }
        };
        if count != 1 {
            return Err(config.fault(format!("{field} is {count}, only 1 is supported")));
        }
        let model = DecoderConfig::from_hf_folder(&config.folder).map_err(NnError::from)?;
        let unsupported = [
            (model.latent.is_some(), "latent attention"),
            (model.experts.is_some(), "a mixture of experts"),
            (model.windows.iter().any(Option::is_some), "a sliding window"),
        ];
        if let Some((_, what)) = unsupported.iter().find(|(found, _)| *found) {
            return Err(config.fault(format!(
                "multi-token prediction in a model with {what} is not supported, only with grouped-query attention over \
                 all keys and a SwiGLU"
            )));
        }
        let dtype = match raw.dtype.as_deref() {
            Some("float32") => DType::F32,
            _ => DType::F16,
        };
        Ok(Self { model, dtype, folder: config.folder, file: config.file })
    }

    /// Checks that the layer was made for a target like this.
    ///
    /// # Errors
    /// [`ProposerError::Mismatch`] with the file, the field and both numbers.
    pub fn check(&self, target: &TargetFacts) -> Result<(), ProposerError> {
        let model = &self.model;
        fits(&self.file, "hidden_size", Some(model.hidden_size), target.hidden_size)?;
        fits(&self.file, "vocab_size", Some(model.vocab_size), target.vocab_size)?;
        fits(&self.file, "num_hidden_layers", Some(model.layers), target.layers)
    }

    /// The dimensions of its layer.
    #[must_use]
    pub fn shape(&self) -> LayerShape {
        let model = &self.model;
        LayerShape {
            hidden_size: model.hidden_size,
            query_heads: model.query_heads,
            kv_heads: model.kv_heads,
            head_dim: model.head_dim,
            intermediate_size: model.intermediate_size,
            eps: model.rms_norm_eps,
            pairing: model.rope.pairing,
            qkv_bias: model.qkv_bias,
            output_bias: false,
            qk_norm: model.qk_norm,
        }
    }

    /// Its attention layer, as the selector sees it.
    #[must_use]
    pub fn model_config(&self) -> ModelConfig {
        let model = &self.model;
        let layer = LayerConfig::gqa(LAYER, 1, model.query_heads, model.kv_heads, model.head_dim);
        ModelConfig { dtype: self.dtype, layers: vec![layer] }
    }
}
