//! The one place where files are mapped into memory, and the one with unsafe code.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::LoadError;

/// The largest JSON file (configuration, tokenizer, template) that is read, in bytes.
const MAX_TEXT_FILE: u64 = 256 << 20;

/// A file mapped read-only.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the regular file at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(|e| LoadError::io(path, "open the file", e))?;
        let metadata = file.metadata().map_err(|e| LoadError::io(path, "read the file's size", e))?;
        if !metadata.is_file() {
            return Err(LoadError::malformed(path, "this is not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(LoadError::malformed(path, "the file is empty"));
        }
        // SAFETY: the map is read-only and private to this struct, which hands out only shared
        // slices tied to its own lifetime. No other code of this process writes to model files.
        // Another process that truncates or rewrites the file while it is mapped is outside what
        // can be defended against here; like every loader by memory map, this one relies on model
        // files staying as they are while in use.
        let map =
            unsafe { memmap2::Mmap::map(&file) }.map_err(|e| LoadError::io(path, "map the file into memory", e))?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// Where the file lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Gives back the memory that reading these bytes took; reading them again takes it anew.
    pub(crate) fn release(&self, bytes: Range<usize>) {
        if bytes.is_empty() || bytes.end > self.map.len() {
            return;
        }
        #[cfg(unix)]
        {
            // SAFETY: the map is of a file, read-only and never written to, so that a page that is dropped comes back
            // from the file with the same bytes; slices of it stay valid.
            let released = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len())
            };
            // Advice that is not taken costs memory, nothing else.
            if let Err(error) = released {
                tracing::debug!("{}: the system keeps its pages: {error}", self.path.display());
            }
        }
    }
}

/// Reads a small text file whole, up to 256 MiB.
pub(crate) fn read_text(path: &Path) -> Result<String, LoadError> {
    let metadata = std::fs::metadata(path).map_err(|e| LoadError::io(path, "open the file", e))?;
    if !metadata.is_file() {
        return Err(LoadError::malformed(path, "this is not a regular file"));
    }
    if metadata.len() > MAX_TEXT_FILE {
        return Err(LoadError::malformed(
            path,
            format!(
                "the file has {} bytes, more than the {MAX_TEXT_FILE} that a text file of a model may have",
                metadata.len()
            ),
        ));
    }
    std::fs::read_to_string(path).map_err(|e| LoadError::io(path, "read the file as text", e))
}

/// Reads a JSON object from a small text file.
pub(crate) fn read_json_object(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>, LoadError> {
    let text = read_text(path)?;
    match serde_json::from_str(&text) {
        Ok(serde_json::Value::Object(map)) => Ok(map),
        Ok(_) => Err(LoadError::malformed(path, "the file is not a JSON object")),
        Err(e) => Err(LoadError::malformed(path, format!("the file is not valid JSON: {e}"))),
    }
}
