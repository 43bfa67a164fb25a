use std::path::{Path, PathBuf};

use polyattn_api::{ProposerError, TargetFacts};
use polyattn_nn::drafting::{DraftConfigFile, fits};
use serde::Deserialize;

/// What a checkpoint's `config.json` says, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MedusaConfig {
    /// The folder it lies in.
    pub folder: PathBuf,
    /// Heads, and so the tokens of a draft.
    pub heads: u32,
    /// Residual blocks of a head.
    pub blocks: u32,
    file: PathBuf,
    hidden_size: Option<u32>,
    vocab_size: Option<u32>,
}

#[derive(Deserialize)]
struct Raw {
    medusa_num_heads: u32,
    #[serde(default = "one")]
    medusa_num_layers: u32,
    hidden_size: Option<u32>,
    vocab_size: Option<u32>,
}

fn one() -> u32 {
    1
}

impl MedusaConfig {
    /// Reads the configuration of a checkpoint: a folder, or a file in one.
    ///
    /// # Errors
    /// A file that is missing or is no Medusa configuration: the message names file, field and value.
    pub fn open(checkpoint: &Path) -> Result<Self, ProposerError> {
        let file = DraftConfigFile::<Raw>::open(checkpoint, "Medusa")?;
        let raw = &file.fields;
        Ok(Self {
            heads: file.bounded("medusa_num_heads", raw.medusa_num_heads, 64)?,
            blocks: file.bounded("medusa_num_layers", raw.medusa_num_layers, 64)?,
            hidden_size: raw.hidden_size,
            vocab_size: raw.vocab_size,
            folder: file.folder,
            file: file.file,
        })
    }

    /// Checks that the heads were made for a target like this.
    ///
    /// # Errors
    /// [`ProposerError::Mismatch`] with the file, the field and both numbers.
    pub fn check(&self, target: &TargetFacts) -> Result<(), ProposerError> {
        fits(&self.file, "hidden_size", self.hidden_size, target.hidden_size)?;
        fits(&self.file, "vocab_size", self.vocab_size, target.vocab_size)
    }
}
