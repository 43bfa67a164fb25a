use std::path::{Path, PathBuf};

/// Why a model, or a part of one, could not be loaded.
///
/// Each message is a sentence that names the file, the field and the value at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The chat template does not compile, does not render, or refuses the conversation.
    #[error("{}: chat template {template}: {reason}", file.display())]
    ChatTemplate {
        /// The file that holds the template.
        file: PathBuf,
        /// The key or file name of the template.
        template: String,
        /// What is wrong, as a sentence.
        reason: String,
    },
    /// A configuration field is missing, malformed, or contradicts another one.
    #[error("{}: field '{field}': {reason}", file.display())]
    Field {
        /// The file that holds the field.
        file: PathBuf,
        /// The field's full name.
        field: String,
        /// What is wrong, with the value.
        reason: String,
    },
    /// The operating system refused to open or read a file.
    #[error("{}: cannot {action}: {source}", file.display())]
    Io {
        /// The file or folder.
        file: PathBuf,
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// What the operating system answered.
        source: std::io::Error,
    },
    /// The bytes of a file are not what its format demands.
    #[error("{}: {reason}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong, with the place and the value.
        reason: String,
    },
    /// A tensor that is needed is not in the checkpoint.
    #[error("{}: there is no tensor '{tensor}' among its {count} tensors", file.display())]
    MissingTensor {
        /// The checkpoint.
        file: PathBuf,
        /// The name that was looked up.
        tensor: String,
        /// How many tensors the checkpoint has.
        count: usize,
    },
    /// A tensor has another shape than the model needs.
    #[error(
        "{}: tensor '{tensor}' has shape {found:?}, but the configuration needs {expected:?}",
        file.display()
    )]
    Shape {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Row-major shape in the file.
        found: Vec<usize>,
        /// Row-major shape that is needed.
        expected: Vec<usize>,
    },
    /// A tensor cannot be read as asked: its type is not supported, or the range lies outside it.
    #[error("{}: tensor '{tensor}': {reason}", file.display())]
    Tensor {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong, with the value.
        reason: String,
    },
    /// The tokenizer is malformed, of an unsupported kind, or does not fit the model.
    #[error("{}: tokenizer: {reason}", file.display())]
    Tokenizer {
        /// The file that holds the tokenizer.
        file: PathBuf,
        /// What is wrong, with the value.
        reason: String,
    },
    /// The file or model is well formed, but of a kind that is not supported.
    #[error("{}: {reason}", file.display())]
    Unsupported {
        /// The file or folder.
        file: PathBuf,
        /// What is not supported, and what is.
        reason: String,
    },
}

impl LoadError {
    pub(crate) fn field(file: &Path, field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Field { file: file.to_owned(), field: field.into(), reason: reason.into() }
    }

    pub(crate) fn io(file: &Path, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { file: file.to_owned(), action, source }
    }

    pub(crate) fn malformed(file: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { file: file.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(file: &Path, tensor: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { file: file.to_owned(), tensor: tensor.into(), reason: reason.into() }
    }

    pub(crate) fn tokenizer(file: &Path, reason: impl Into<String>) -> Self {
        Self::Tokenizer { file: file.to_owned(), reason: reason.into() }
    }

    pub(crate) fn unsupported(file: &Path, reason: impl Into<String>) -> Self {
        Self::Unsupported { file: file.to_owned(), reason: reason.into() }
    }
}
