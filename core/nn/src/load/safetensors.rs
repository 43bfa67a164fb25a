//! Safetensors checkpoints: one file, or several in a folder.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ::safetensors::{Dtype, SafeTensors};

use super::gguf::excerpt;
use super::map::{MappedFile, read_json_object};
use super::{LoadError, StoredType};

/// The index of a sharded checkpoint.
const INDEX: &str = "model.safetensors.index.json";
/// A checkpoint that is not sharded.
const SINGLE: &str = "model.safetensors";
/// Bytes before the header: its length.
const LENGTH_BYTES: usize = 8;

/// One tensor of a safetensors checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    shard: usize,
    /// The stored type, or the name of one that cannot be read.
    pub(crate) ty: Result<StoredType, String>,
    /// Row-major shape.
    pub(crate) shape: Vec<usize>,
    range: Range<usize>,
}

/// The tensors of one or several safetensors files, mapped and checked.
///
/// Tensors of types other than F32, F16 and BF16 may be there; only reading them is an error.
#[derive(Debug)]
pub struct SafetensorsFiles {
    /// The file or folder that was opened.
    path: PathBuf,
    shards: Vec<MappedFile>,
    tensors: BTreeMap<String, Entry>,
}

impl SafetensorsFiles {
    /// Opens one `.safetensors` file.
    ///
    /// # Errors
    /// If the file cannot be mapped, is truncated, or its header contradicts itself.
    pub fn open_file(path: &Path) -> Result<Self, LoadError> {
        let mut files = Self::empty(path);
        files.add(path)?;
        Ok(files)
    }

    /// Opens the checkpoint of a folder: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names, or else every `.safetensors` file.
    ///
    /// # Errors
    /// As [`open_file`](Self::open_file); and if there is no such file, if the index names a shard
    /// outside the folder, if a tensor is in two shards, or not in the one that the index names.
    pub fn open_folder(folder: &Path) -> Result<Self, LoadError> {
        let mut files = Self::empty(folder);
        let single = folder.join(SINGLE);
        let index = folder.join(INDEX);
        if single.exists() {
            files.add(&single)?;
        } else if index.exists() {
            files.add_sharded(folder, &index)?;
        } else {
            for path in safetensors_files(folder)? {
                files.add(&path)?;
            }
            if files.shards.is_empty() {
                return Err(LoadError::malformed(folder, "the folder has no .safetensors file"));
            }
        }
        Ok(files)
    }

    fn empty(path: &Path) -> Self {
        Self { path: path.to_owned(), shards: Vec::new(), tensors: BTreeMap::new() }
    }

    fn add(&mut self, path: &Path) -> Result<(), LoadError> {
        let file = MappedFile::open(path)?;
        let (header, metadata) = SafeTensors::read_metadata(file.bytes())
            .map_err(|e| LoadError::malformed(path, format!("this is not a sound safetensors file: {e}")))?;
        let data = LENGTH_BYTES + header;
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                shard,
                ty: match info.dtype {
                    Dtype::F32 => Ok(StoredType::F32),
                    Dtype::F16 => Ok(StoredType::F16),
                    Dtype::BF16 => Ok(StoredType::BF16),
                    other => Err(format!("{other:?}")),
                },
                shape: info.shape.clone(),
                // Both were checked against the file's length by `read_metadata`.
                range: data + start..data + end,
            };
            if let Some(earlier) = self.tensors.get(&name) {
                let other = self.shards[earlier.shard].path().to_owned();
                return Err(LoadError::tensor(path, name, format!("the name is also in {}", other.display())));
            }
            self.tensors.insert(name, entry);
        }
        self.shards.push(file);
        Ok(())
    }

    fn add_sharded(&mut self, folder: &Path, index: &Path) -> Result<(), LoadError> {
        let json = read_json_object(index)?;
        let map = json
            .get("weight_map")
            .and_then(serde_json::Value::as_object)
            .ok_or_else(|| LoadError::field(index, "weight_map", "this field must be an object"))?;
        let mut shards: BTreeMap<&str, usize> = BTreeMap::new();
        for (tensor, shard) in map {
            let field = || format!("weight_map.{}", excerpt(tensor));
            let shard =
                shard.as_str().ok_or_else(|| LoadError::field(index, field(), "a shard is named by a string"))?;
            // A name with a separator, or of a drive, could point anywhere on the machine.
            if shard.contains(['/', '\\', ':', '\0']) || !shard.ends_with(".safetensors") {
                return Err(LoadError::field(
                    index,
                    field(),
                    format!("'{}' is not the name of a .safetensors file in the same folder", excerpt(shard)),
                ));
            }
            let next = shards.len();
            shards.entry(shard).or_insert(next);
        }
        if shards.is_empty() {
            return Err(LoadError::field(index, "weight_map", "it names no tensor"));
        }
        for (at, shard) in shards.values_mut().enumerate() {
            *shard = at;
        }
        for shard in shards.keys() {
            self.add(&folder.join(shard))?;
        }
        for (tensor, shard) in map {
            let wanted = shard.as_str().and_then(|s| shards.get(s)).copied();
            let found = self.tensors.get(tensor).map(|e| e.shard);
            if found.is_none() || found != wanted {
                return Err(LoadError::field(
                    index,
                    format!("weight_map.{}", excerpt(tensor)),
                    format!("the shard {shard} has no such tensor"),
                ));
            }
        }
        Ok(())
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn tensors(&self) -> &BTreeMap<String, Entry> {
        &self.tensors
    }

    pub(crate) fn data(&self, entry: &Entry) -> &[u8] {
        self.shards.get(entry.shard).and_then(|s| s.bytes().get(entry.range.clone())).unwrap_or(&[])
    }

    /// Gives back the memory that reading a tensor's bytes took.
    pub(crate) fn release(&self, entry: &Entry) {
        if let Some(shard) = self.shards.get(entry.shard) {
            shard.release(entry.range.clone());
        }
    }
}

/// The `.safetensors` files of a folder in the order of their names.
fn safetensors_files(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let read = |e| LoadError::io(folder, "list the folder", e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
