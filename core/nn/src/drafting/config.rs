//! Configurations of drafters' checkpoints.

use std::path::{Path, PathBuf};

use polyattn_api::ProposerError;
use serde::de::DeserializeOwned;

const CONFIG: &str = "config.json";

/// The `config.json` of a drafter's checkpoint.
#[derive(Debug)]
pub struct DraftConfigFile<T> {
    /// The folder of the checkpoint.
    pub folder: PathBuf,
    /// The file.
    pub file: PathBuf,
    /// Its text.
    pub text: String,
    /// What was read of it.
    pub fields: T,
}

impl<T: DeserializeOwned> DraftConfigFile<T> {
    /// Reads the configuration of a checkpoint of a method: a folder, or a file in one.
    ///
    /// # Errors
    /// A file that is missing or no JSON object of these fields: the message names file and field.
    pub fn open(checkpoint: &Path, method: &str) -> Result<Self, ProposerError> {
        let is_part = |file: &Path| {
            file.file_name().is_some_and(|name| name == CONFIG) || file.extension().is_some_and(|e| e == "safetensors")
        };
        let folder = match checkpoint.parent() {
            _ if checkpoint.is_dir() => checkpoint,
            Some(folder) if is_part(checkpoint) => folder,
            _ => {
                return Err(ProposerError::Checkpoint(format!(
                    "{}: this is no {method} checkpoint: a folder with {CONFIG} and *.safetensors, or one of these files",
                    checkpoint.display()
                )));
            }
        };
        let file = folder.join(CONFIG);
        let text = std::fs::read_to_string(&file)
            .map_err(|error| ProposerError::Checkpoint(format!("{}: cannot read it: {error}", file.display())))?;
        Self::parse(file, text)
    }

    /// Reads the text of a configuration; `file` is named in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn parse(file: PathBuf, text: String) -> Result<Self, ProposerError> {
        let fault = |message: String| ProposerError::Checkpoint(format!("{}: {message}", file.display()));
        // serde would take an array for the fields in order.
        if text.trim_start().starts_with('[') {
            return Err(fault("it is no JSON object".into()));
        }
        let mut source = serde_json::Deserializer::from_str(&text);
        let fields = serde_path_to_error::deserialize(&mut source).map_err(|error| match error.path().to_string() {
            path if path == "." => fault(error.into_inner().to_string()),
            path => fault(format!("{path}: {}", error.into_inner())),
        })?;
        source.end().map_err(|error| fault(error.to_string()))?;
        Ok(Self { folder: file.parent().unwrap_or(&file).to_owned(), fields, file, text })
    }

    /// A fault of this file.
    #[must_use]
    pub fn fault(&self, message: impl std::fmt::Display) -> ProposerError {
        ProposerError::Checkpoint(format!("{}: {message}", self.file.display()))
    }

    /// That `field` is from 1 to `most`.
    ///
    /// # Errors
    /// It is not: the message names file, field and value.
    pub fn bounded(&self, field: &str, value: u32, most: u32) -> Result<u32, ProposerError> {
        match value {
            0 => Err(self.fault(format!("{field} is 0"))),
            value if value > most => Err(self.fault(format!("{field} is {value}, at most {most}"))),
            value => Ok(value),
        }
    }
}

/// That a drafter's number is the target's, where the checkpoint says one.
///
/// # Errors
/// [`ProposerError::Mismatch`] with the file, the field and both numbers.
pub fn fits(file: &Path, field: &str, value: Option<u32>, target: u32) -> Result<(), ProposerError> {
    match value {
        Some(value) if value != target => {
            Err(ProposerError::Mismatch(format!("{}: {field} is {value}, the target's is {target}", file.display())))
        }
        _ => Ok(()),
    }
}
