use polyattn_api::{LoadContext, ProposerError, TapSpec};
use polyattn_nn::{
    NnError, WeightLoader,
    drafting::{FeatureDrafter, FeatureEntry, FeatureHead, FeatureNetwork, NextFeature},
    layer::DecoderLayer,
    load::Checkpoint,
    ops::{RopeTable, Vector},
};

use crate::MtpConfig;

/// Tokens of a chain at the most: the layer was trained for the first, and runs on its own output for the others.
const MOST_TOKENS: u32 = 8;

/// Tokens of a chain where the user asked for no number.
const DEFAULT_TOKENS: u32 = 2;

/// How the layer's tensors are named, and what is fed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Form {
    /// DeepSeek's.
    DeepSeek,
    /// Qwen's.
    Qwen,
}

/// The tensors of a form.
struct Names {
    layer: String,
    embedding_norm: String,
    hidden_norm: String,
    project: String,
    norm: String,
}

impl Form {
    fn names(self, layers: u32) -> Names {
        let deepseek = format!("model.layers.{layers}.");
        match self {
            Self::DeepSeek => Names {
                embedding_norm: format!("{deepseek}enorm.weight"),
                hidden_norm: format!("{deepseek}hnorm.weight"),
                project: format!("{deepseek}eh_proj.weight"),
                norm: format!("{deepseek}shared_head.norm.weight"),
                layer: deepseek,
            },
            Self::Qwen => Names {
                layer: "mtp.layers.0.".into(),
                embedding_norm: "mtp.pre_fc_norm_embedding.weight".into(),
                hidden_norm: "mtp.pre_fc_norm_hidden.weight".into(),
                project: "mtp.fc.weight".into(),
                norm: "mtp.norm.weight".into(),
            },
        }
    }
}

/// Loads the layer of a checkpoint.
///
/// # Errors
/// A checkpoint that is broken, has no such layer, or does not fit the target; too many tokens; no memory.
pub fn load(context: &LoadContext<'_>) -> Result<FeatureDrafter, ProposerError> {
    let path = context.checkpoint.ok_or(ProposerError::NoCheckpoint("mtp"))?;
    let config = MtpConfig::open(path)?;
    config.check(context.target)?;
    if let Some(tokens) = context.num_speculative_tokens
        && tokens > MOST_TOKENS
    {
        return Err(ProposerError::Unsupported(format!(
            "num_speculative_tokens is {tokens}, mtp drafts at most {MOST_TOKENS}"
        )));
    }
    let checkpoint = Checkpoint::open(&config.folder).map_err(NnError::from)?;
    let has = |form: &Form| checkpoint.has(&form.names(config.model.layers).project);
    let form = [Form::DeepSeek, Form::Qwen].into_iter().find(has).ok_or_else(|| {
        ProposerError::Checkpoint(format!(
            "{}: neither '{}' nor '{}' is there: the checkpoint has no layer for multi-token prediction in a form \
             that is known",
            config.folder.display(),
            Form::DeepSeek.names(config.model.layers).project,
            Form::Qwen.names(config.model.layers).project,
        ))
    })?;
    let network = network(context, &config, &checkpoint, form).map_err(|error| match error {
        NnError::Shape(message) => ProposerError::Mismatch(format!("{}: {message}", config.folder.display())),
        error => error.into(),
    })?;
    Ok(FeatureDrafter::new(context, network, TapSpec::of_last_hidden(), DEFAULT_TOKENS, MOST_TOKENS)?)
}

fn network(
    context: &LoadContext<'_>,
    config: &MtpConfig,
    checkpoint: &Checkpoint,
    form: Form,
) -> Result<FeatureNetwork, NnError> {
    let mut ignore = |_: u64| {};
    let mut loader = WeightLoader::new(checkpoint, context.device, &mut ignore);
    let names = form.names(config.model.layers);
    let shape = config.shape();
    let hidden = shape.hidden_size;
    let layer = DecoderLayer::load(&mut loader, shape, |weight| format!("{}{}", names.layer, weight.hf_suffix()))?;
    let dtype = loader.held_as(&names.project)?;
    let weight = loader.matrix(std::slice::from_ref(&names.project), 2 * hidden, dtype)?;
    if weight.rows != hidden {
        return Err(NnError::Shape(format!("'{}' has {} rows, {hidden} are needed", names.project, weight.rows)));
    }
    let mut norm = |name: &String| -> Result<Vector, NnError> {
        let vector = loader.vector(std::slice::from_ref(name))?;
        match vector.len == hidden {
            true => Ok(vector),
            false => Err(NnError::Shape(format!("'{name}' has {} elements, {hidden} are needed", vector.len))),
        }
    };
    Ok(FeatureNetwork {
        shape,
        fuse: None,
        entry: FeatureEntry::Project {
            embedding_norm: Some(norm(&names.embedding_norm)?),
            feature_norm: Some(norm(&names.hidden_norm)?),
            weight,
            bias: None,
        },
        norm: Some(norm(&names.norm)?),
        layer,
        next: match form {
            Form::DeepSeek => NextFeature::Output,
            Form::Qwen => NextFeature::Normed,
        },
        head: FeatureHead::Target,
        zero_first: form == Form::DeepSeek,
        rope: RopeTable::new(context.device, &config.model.inv_freq(), context.pool_pages * context.page_size)?,
    })
}
