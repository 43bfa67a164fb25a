use polyattn_api::{DType, LoadContext, ProposerError, TapSpec};
use polyattn_nn::{
    NnError, WeightLoader,
    drafting::{FeatureDrafter, FeatureEntry, FeatureHead, FeatureNetwork, NextFeature},
    layer::{DecoderLayer, LayerInput},
    load::Checkpoint,
    ops::{Matrix, RopeTable, Vector},
};

use crate::{EagleConfig, Version};

/// Tokens of a chain at the most. Acceptance falls with each, and each is a pass of the layer.
const MOST_TOKENS: u32 = 16;

/// Tokens of a chain where the user asked for no number.
const DEFAULT_TOKENS: u32 = 4;

/// Loads a checkpoint of a version.
///
/// # Errors
/// A checkpoint that is broken, of another version, or does not fit the target; too many tokens; no memory.
pub fn load(context: &LoadContext<'_>, version: Version) -> Result<FeatureDrafter, ProposerError> {
    let path = context.checkpoint.ok_or(ProposerError::NoCheckpoint(version.method()))?;
    let config = EagleConfig::open(path, version)?;
    config.check(context.target)?;
    if let Some(tokens) = context.num_speculative_tokens
        && tokens > MOST_TOKENS
    {
        let method = version.method();
        return Err(ProposerError::Unsupported(format!(
            "num_speculative_tokens is {tokens}, {method} drafts at most {MOST_TOKENS}"
        )));
    }
    let taps = match version {
        Version::Eagle1 => TapSpec::of_last_hidden(),
        Version::Eagle3 => TapSpec::of_layers(config.taps(context.target)?),
    };
    let checkpoint = Checkpoint::open(&config.folder).map_err(NnError::from)?;
    let network = Loading { config: &config, context, checkpoint: &checkpoint }.network(taps.count() as u32)?;
    Ok(FeatureDrafter::new(context, network, taps, DEFAULT_TOKENS, MOST_TOKENS)?)
}

/// A checkpoint on its way to a device.
struct Loading<'a> {
    config: &'a EagleConfig,
    context: &'a LoadContext<'a>,
    checkpoint: &'a Checkpoint,
}

impl Loading<'_> {
    fn network(&self, taps: u32) -> Result<FeatureNetwork, ProposerError> {
        let (config, checkpoint) = (self.config, self.checkpoint);
        let hidden = config.hidden_size;
        // Where the layer's tensors are, and what tells an EAGLE-3 checkpoint.
        let prefix = if checkpoint.has("midlayer.self_attn.q_proj.weight") { "midlayer." } else { "layers.0." };
        let of_eagle3 = checkpoint.has(&format!("{prefix}hidden_norm.weight"));
        if of_eagle3 != (config.version == Version::Eagle3) {
            let folder = config.folder.display();
            return Err(ProposerError::Checkpoint(match of_eagle3 {
                true => format!(
                    "{folder}: '{prefix}hidden_norm.weight' makes this an EAGLE-3 checkpoint, which method 'eagle3' reads"
                ),
                false => format!(
                    "{folder}: there is no '{prefix}hidden_norm.weight', so this is no EAGLE-3 checkpoint; method 'eagle' reads those of EAGLE"
                ),
            }));
        }
        let mut ignore = |_: u64| {};
        let mut loader = WeightLoader::new(checkpoint, self.context.device, &mut ignore);
        let shape = config.shape(checkpoint, prefix);
        let positions = self.context.pool_pages * self.context.page_size;
        let rope = RopeTable::new(self.context.device, &config.rope.inv_freq(), positions).map_err(NnError::from)?;
        let input = match config.version {
            Version::Eagle1 => LayerInput::Bare,
            Version::Eagle3 => LayerInput::Apart(2 * hidden),
        };
        let layer =
            DecoderLayer::load_for(&mut loader, shape, input, |weight| format!("{prefix}{}", weight.hf_suffix()))?;
        match config.version {
            Version::Eagle1 => {
                if checkpoint.has("layers.0.input_layernorm.weight") {
                    return Err(ProposerError::Checkpoint(format!(
                        "{}: 'layers.0.input_layernorm.weight' is there, but EAGLE's layer has no norm before its attention; \
                         this variant is not supported",
                        config.folder.display()
                    )));
                }
                let bias =
                    checkpoint.has("fc.bias").then(|| self.vector(&mut loader, "fc.bias", hidden)).transpose()?;
                let weight = self.matrix(&mut loader, "fc.weight", hidden, 2 * hidden)?;
                let entry = FeatureEntry::Project { embedding_norm: None, feature_norm: None, weight, bias };
                Ok(FeatureNetwork {
                    shape,
                    fuse: None,
                    entry,
                    layer,
                    norm: None,
                    next: NextFeature::Output,
                    head: FeatureHead::Target,
                    zero_first: false,
                    rope,
                })
            }
            Version::Eagle3 => Ok(FeatureNetwork {
                shape,
                fuse: Some(self.matrix(&mut loader, "fc.weight", hidden, taps * hidden)?),
                entry: FeatureEntry::Beside {
                    embedding_norm: self.vector(&mut loader, &format!("{prefix}input_layernorm.weight"), hidden)?,
                    feature_norm: self.vector(&mut loader, &format!("{prefix}hidden_norm.weight"), hidden)?,
                    residual_normed: config.norm_before_residual,
                },
                layer,
                norm: Some(self.vector(&mut loader, "norm.weight", hidden)?),
                next: NextFeature::Output,
                head: self.head(&mut loader)?,
                zero_first: false,
                rope,
            }),
        }
    }

    /// EAGLE-3's own head, or the target's where it has none.
    fn head(&self, loader: &mut WeightLoader<'_>) -> Result<FeatureHead, ProposerError> {
        let vocab = self.context.target.vocab_size;
        let draft = self.config.draft_vocab_size.unwrap_or(vocab);
        if !self.checkpoint.has("lm_head.weight") {
            return match draft == vocab {
                true => Ok(FeatureHead::Target),
                false => Err(self.mismatch(format!(
                    "there is no 'lm_head.weight' for a draft_vocab_size of {draft}, and the target's head has {vocab} ids"
                ))),
            };
        }
        let weight = self.matrix(loader, "lm_head.weight", draft, self.config.hidden_size)?;
        if !self.checkpoint.has("d2t") {
            return match draft == vocab {
                true => Ok(FeatureHead::Own { weight, target_ids: None }),
                false => Err(self.mismatch(format!(
                    "there is no 'd2t' from a draft_vocab_size of {draft} to the target's vocabulary of {vocab}"
                ))),
            };
        }
        let offsets = self.checkpoint.integers("d2t").map_err(NnError::from)?;
        if offsets.len() != draft as usize {
            return Err(self.mismatch(format!("'d2t' has {} entries, draft_vocab_size is {draft}", offsets.len())));
        }
        // Each entry is how far the target's id lies behind the draft's.
        let target_id = |(id, offset): (i64, &i64)| {
            let target = id.checked_add(*offset).and_then(|target| u32::try_from(target).ok());
            target.filter(|target| *target < vocab).ok_or_else(|| {
                self.mismatch(format!("'d2t' moves id {id} by {offset}, the target's vocabulary has {vocab} ids"))
            })
        };
        let target_ids = (0..).zip(&offsets).map(target_id).collect::<Result<_, _>>()?;
        Ok(FeatureHead::Own { weight, target_ids: Some(target_ids) })
    }

    fn mismatch(&self, message: String) -> ProposerError {
        ProposerError::Mismatch(format!("{}: {message}", self.config.folder.display()))
    }

    fn matrix(&self, loader: &mut WeightLoader<'_>, name: &str, rows: u32, cols: u32) -> Result<Matrix, ProposerError> {
        let found = self.checkpoint.rows_and_columns(name).map_err(NnError::from)?;
        if found != (rows as usize, cols as usize) {
            let (found_rows, found_cols) = found;
            return Err(self.mismatch(format!("'{name}' is [{found_rows}, {found_cols}], [{rows}, {cols}] is needed")));
        }
        let dtype: DType = loader.held_as(name)?;
        Ok(loader.matrix(&[name.to_owned()], cols, dtype)?)
    }

    fn vector(&self, loader: &mut WeightLoader<'_>, name: &str, len: u32) -> Result<Vector, ProposerError> {
        let vector = loader.vector(&[name.to_owned()])?;
        match vector.len == len {
            true => Ok(vector),
            false => Err(self.mismatch(format!("'{name}' has {} elements, {len} are needed", vector.len))),
        }
    }
}
