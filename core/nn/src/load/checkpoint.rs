//! Named tensors on disk, whatever the file format.

use std::ops::Range;
use std::path::Path;

use super::gguf::Gguf;
use super::safetensors::SafetensorsFiles;
use super::{LoadError, StoredType, dequantize};

/// The naming and layout convention of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CheckpointFormat {
    /// A GGUF file: names like `blk.0.attn_q.weight`.
    Gguf,
    /// Safetensors: names like `model.layers.0.self_attn.q_proj.weight`.
    HuggingFace,
}

/// The tensors of a model file or folder, memory-mapped.
///
/// A tensor is a matrix of rows here: all dimensions but the last count as rows, and a vector is one
/// row. Reading dequantises just the rows asked for. All methods take `&self` and may be called from
/// several threads at once.
#[derive(Debug)]
pub struct Checkpoint {
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Gguf(Gguf),
    Safetensors(SafetensorsFiles),
}

impl Checkpoint {
    /// Opens a `.gguf` file, a `.safetensors` file, or a folder with `config.json` and
    /// `*.safetensors`. A file with another extension is taken for GGUF if it starts like one.
    ///
    /// # Errors
    /// If there is nothing at `path`, or what is there cannot be read as a checkpoint.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let metadata = std::fs::metadata(path).map_err(|e| LoadError::io(path, "open the model", e))?;
        let inner = if metadata.is_dir() {
            if !path.join("config.json").exists() {
                return Err(LoadError::malformed(
                    path,
                    "the folder has no config.json, so it is not a Hugging Face model",
                ));
            }
            Inner::Safetensors(SafetensorsFiles::open_folder(path)?)
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            Inner::Safetensors(SafetensorsFiles::open_file(path)?)
        } else {
            Inner::Gguf(Gguf::open(path)?)
        };
        Ok(Self { inner })
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        match &self.inner {
            Inner::Gguf(g) => g.path(),
            Inner::Safetensors(s) => s.path(),
        }
    }

    /// The naming convention.
    pub fn format(&self) -> CheckpointFormat {
        match &self.inner {
            Inner::Gguf(_) => CheckpointFormat::Gguf,
            Inner::Safetensors(_) => CheckpointFormat::HuggingFace,
        }
    }

    /// The GGUF file behind this checkpoint, if it is one, for its metadata.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.inner {
            Inner::Gguf(g) => Some(g),
            Inner::Safetensors(_) => None,
        }
    }

    /// The names of all tensors: in the file's order for GGUF, sorted for safetensors.
    pub fn names(&self) -> Vec<&str> {
        match &self.inner {
            Inner::Gguf(g) => g.tensors().iter().map(|t| t.name.as_str()).collect(),
            Inner::Safetensors(s) => s.tensors().keys().map(String::as_str).collect(),
        }
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        match &self.inner {
            Inner::Gguf(g) => g.tensors().len(),
            Inner::Safetensors(s) => s.tensors().len(),
        }
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        match &self.inner {
            Inner::Gguf(g) => g.tensor(name).is_some(),
            Inner::Safetensors(s) => s.tensors().contains_key(name),
        }
    }

    /// The row-major shape of a tensor.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize], LoadError> {
        Ok(self.view(name)?.shape)
    }

    /// How a tensor is stored.
    ///
    /// # Errors
    /// If there is no such tensor, or its type cannot be read.
    pub fn dtype(&self, name: &str) -> Result<StoredType, LoadError> {
        self.view(name)?.readable(self, name)
    }

    /// Checks a tensor's row-major shape, and that its type can be read.
    ///
    /// # Errors
    /// If there is no such tensor, if its type cannot be read, or if the shape differs; that
    /// message shows both.
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<(), LoadError> {
        let view = self.view(name)?;
        view.readable(self, name)?;
        if view.shape != shape {
            return Err(LoadError::Shape {
                file: self.path().to_owned(),
                tensor: name.to_owned(),
                found: view.shape.to_vec(),
                expected: shape.to_vec(),
            });
        }
        Ok(())
    }

    /// The stored bytes of a range of rows.
    ///
    /// # Errors
    /// If there is no such tensor, its type cannot be read, or the range lies outside it.
    pub fn row_bytes(&self, name: &str, rows: Range<usize>) -> Result<&[u8], LoadError> {
        let view = self.view(name)?;
        let ty = view.readable(self, name)?;
        let (all, columns) = rows_and_columns(view.shape);
        if rows.start > rows.end || rows.end > all {
            return Err(LoadError::tensor(
                self.path(),
                name,
                format!("rows {} to {} were asked for, but there are {all}", rows.start, rows.end),
            ));
        }
        // Rows are whole blocks, checked for GGUF on opening and trivial for the other types.
        let row = ty.bytes_of(columns).unwrap_or(0);
        Ok(view.data.get(rows.start * row..rows.end * row).unwrap_or(&[]))
    }

    /// Dequantises a range of rows into `out`, row after row; `out` has
    /// `rows.len() × columns` elements. Runs on the calling thread.
    ///
    /// # Errors
    /// As [`row_bytes`](Self::row_bytes), and if `out` has another length.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<(), LoadError> {
        let bytes = self.row_bytes(name, rows)?;
        let ty = self.dtype(name)?;
        dequantize(ty, bytes, out).map_err(|e| LoadError::tensor(self.path(), name, e.to_string()))
    }

    /// The elements of a tensor of whole numbers, I32 or I64: no weights, but maps between vocabularies and the like.
    ///
    /// # Errors
    /// If there is no such tensor, or it is of another type.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>, LoadError> {
        let view = self.view(name)?;
        let ty = match view.ty {
            Ok(ty) => ty.to_string(),
            Err("I64") => return Ok(view.data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()),
            Err("I32") => {
                return Ok(view.data.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes).into()).collect());
            }
            Err(ty) => ty.to_owned(),
        };
        Err(LoadError::tensor(self.path(), name, format!("its type {ty} is not supported here (supported: I32, I64)")))
    }

    /// Gives back the memory that reading a tensor's bytes took, where the system lets a program do so: the map of a
    /// file that was read would stand beside the weights that were made of it. It can be read again.
    pub fn release(&self, name: &str) {
        match &self.inner {
            Inner::Gguf(g) => g.tensor(name).into_iter().for_each(|tensor| g.release(tensor)),
            Inner::Safetensors(s) => s.tensors().get(name).into_iter().for_each(|entry| s.release(entry)),
        }
    }

    /// Rows and columns of a tensor, as [`read_rows`](Self::read_rows) counts them.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn rows_and_columns(&self, name: &str) -> Result<(usize, usize), LoadError> {
        Ok(rows_and_columns(self.view(name)?.shape))
    }

    /// Bytes of all tensors as stored.
    pub fn stored_bytes(&self) -> usize {
        match &self.inner {
            Inner::Gguf(g) => g.tensors().iter().map(|t| t.bytes).sum(),
            Inner::Safetensors(s) => s.tensors().values().map(|e| s.data(e).len()).sum(),
        }
    }

    fn view(&self, name: &str) -> Result<View<'_>, LoadError> {
        let view = match &self.inner {
            Inner::Gguf(g) => g.tensor(name).map(|t| View { ty: Ok(t.ty), shape: &t.shape, data: g.data(t) }),
            Inner::Safetensors(s) => s.tensors().get(name).map(|e| View {
                ty: e.ty.as_ref().copied().map_err(String::as_str),
                shape: &e.shape,
                data: s.data(e),
            }),
        };
        view.ok_or_else(|| LoadError::MissingTensor {
            file: self.path().to_owned(),
            tensor: name.to_owned(),
            count: self.len(),
        })
    }
}

struct View<'a> {
    ty: Result<StoredType, &'a str>,
    shape: &'a [usize],
    data: &'a [u8],
}

impl View<'_> {
    fn readable(&self, checkpoint: &Checkpoint, name: &str) -> Result<StoredType, LoadError> {
        self.ty.map_err(|ty| {
            LoadError::tensor(
                checkpoint.path(),
                name,
                format!("its type {ty} is not supported (supported: F32, F16, BF16)"),
            )
        })
    }
}

/// All dimensions but the last are rows; a scalar is one row of one column.
fn rows_and_columns(shape: &[usize]) -> (usize, usize) {
    match shape.split_last() {
        None => (1, 1),
        Some((columns, rows)) => (rows.iter().product(), *columns),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test may panic")]
mod tests {
    use std::collections::HashMap;

    use ::safetensors::Dtype;
    use ::safetensors::tensor::TensorView;

    use super::super::dequant::quantize;
    use super::super::gguf_write::GgufWriter;
    use super::*;

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| i as f32 / 8.0 - 3.0).collect()
    }

    fn write_safetensors(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
        let views: Vec<(String, TensorView<'_>)> =
            tensors.iter().map(|(n, d, s, b)| (n.to_string(), TensorView::new(*d, s.clone(), b).unwrap())).collect();
        let none: Option<HashMap<String, String>> = None;
        std::fs::write(path, ::safetensors::serialize(views, none).unwrap()).unwrap();
    }

    #[test]
    fn rows_of_a_gguf_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let mut w = GgufWriter::new();
        let values = ramp(4 * 64);
        for (name, ty) in [("a", StoredType::F32), ("b", StoredType::F16)] {
            w.tensor(name, &[4, 64], ty, quantize(ty, &values).unwrap());
        }
        w.tensor("q", &[4, 64], StoredType::Q8_0, quantize(StoredType::Q8_0, &values).unwrap());
        w.tensor("v", &[64], StoredType::F32, quantize(StoredType::F32, &values[..64]).unwrap());
        std::fs::write(&path, w.finish()).unwrap();
        let c = Checkpoint::open(&path).unwrap();
        assert_eq!(c.names(), ["a", "b", "q", "v"]);
        assert_eq!(c.format(), CheckpointFormat::Gguf);
        for name in ["a", "b", "q"] {
            let mut out = [0.0; 128];
            c.read_rows(name, 1..3, &mut out).unwrap();
            for (got, want) in out.iter().zip(&values[64..]) {
                assert!((got - want).abs() < 0.1, "{name}: {got} {want}");
            }
        }
        let mut out = [0.0; 64];
        c.read_rows("v", 0..1, &mut out).unwrap();
        assert_eq!(out, values[..64]);
        assert_eq!(c.rows_and_columns("v").unwrap(), (1, 64));
        for name in ["a", "b", "q", "v", "absent"] {
            c.release(name);
        }
        c.read_rows("v", 0..1, &mut out).unwrap();
        assert_eq!(out, values[..64], "what was released can be read again");

        let error = |r: Result<(), LoadError>| r.unwrap_err().to_string();
        assert!(error(c.read_rows("a", 2..5, &mut out)).contains("rows 2 to 5"));
        #[expect(clippy::reversed_empty_ranges, reason = "a bad range is the point")]
        let reversed = 3..2;
        assert!(c.read_rows("a", reversed, &mut []).is_err());
        assert!(error(c.read_rows("a", 0..2, &mut out)).contains("512 bytes of F32"));
        assert!(error(c.read_rows("z", 0..1, &mut out)).contains("no tensor 'z'"));
        let shape = error(c.expect_shape("a", &[64, 4]));
        assert!(shape.contains("[4, 64]") && shape.contains("[64, 4]"), "{shape}");
    }

    #[test]
    fn safetensors_alone_and_sharded() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        let bytes = |ty| quantize(ty, &ramp(12)).unwrap();
        write_safetensors(
            &folder.join("one.safetensors"),
            &[
                ("h", Dtype::F16, vec![3, 4], bytes(StoredType::F16)),
                ("b", Dtype::BF16, vec![3, 4], bytes(StoredType::BF16)),
            ],
        );
        write_safetensors(
            &folder.join("two.safetensors"),
            &[("f", Dtype::F32, vec![2, 2, 3], bytes(StoredType::F32)), ("i", Dtype::I64, vec![1], vec![0; 8])],
        );
        let one = Checkpoint::open(&folder.join("one.safetensors")).unwrap();
        assert_eq!(one.names(), ["b", "h"]);

        let none = Checkpoint::open(folder).unwrap_err().to_string();
        assert!(none.contains("no config.json"), "{none}");
        std::fs::write(folder.join("config.json"), "{}").unwrap();
        // Without an index, every file counts.
        let all = Checkpoint::open(folder).unwrap();
        assert_eq!(all.names(), ["b", "f", "h", "i"]);
        assert_eq!(all.rows_and_columns("f").unwrap(), (4, 3));
        let mut out = [0.0; 6];
        all.read_rows("f", 1..3, &mut out).unwrap();
        assert_eq!(out, ramp(12)[3..9]);
        all.read_rows("b", 1..2, &mut out[..4]).unwrap();
        assert_eq!(out[..4], ramp(12)[4..8]);
        assert_eq!(all.integers("i").unwrap(), [0]);
        assert!(all.integers("f").unwrap_err().to_string().contains("F32"));
        let int = all.dtype("i").unwrap_err().to_string();
        assert!(int.contains("tensor 'i'") && int.contains("I64"), "{int}");

        let index = folder.join("model.safetensors.index.json");
        let check = |map: &str| {
            std::fs::write(&index, format!("{{\"weight_map\": {map}}}")).unwrap();
            Checkpoint::open(folder)
        };
        let sound = r#"{"h": "one.safetensors", "b": "one.safetensors", "f": "two.safetensors"}"#;
        assert_eq!(check(sound).unwrap().len(), 4);
        for (bad, says) in [
            (r#"{"h": "../one.safetensors"}"#, "same folder"),
            (r#"{"h": "/etc/passwd"}"#, "same folder"),
            (r#"{"h": "C:one.safetensors"}"#, "same folder"),
            (r#"{"h": "three.safetensors"}"#, "cannot open"),
            (r#"{"f": "one.safetensors"}"#, "no such tensor"),
            (r#"{"z": "one.safetensors"}"#, "no such tensor"),
            (r#"{"h": 3}"#, "weight_map.h"),
            ("{}", "names no tensor"),
            ("7", "weight_map"),
        ] {
            let message = check(bad).unwrap_err().to_string();
            assert!(message.contains(says), "{bad}: {message}");
        }
    }

    #[test]
    fn broken_safetensors_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        let bytes = quantize(StoredType::F32, &ramp(12)).unwrap();
        write_safetensors(&path, &[("a", Dtype::F32, vec![3, 4], bytes)]);
        let sound = std::fs::read(&path).unwrap();
        for len in (0..sound.len()).step_by(7) {
            std::fs::write(&path, &sound[..len]).unwrap();
            assert!(Checkpoint::open(&path).is_err(), "{len} bytes");
        }
        for at in 0..sound.len() {
            for mask in [0x01, 0x80, 0xff] {
                let mut b = sound.clone();
                b[at] ^= mask;
                std::fs::write(&path, &b).unwrap();
                if let Ok(c) = Checkpoint::open(&path) {
                    for name in c.names() {
                        let (rows, columns) = c.rows_and_columns(name).unwrap();
                        let mut out = vec![0.0; rows * columns];
                        let _ = c.read_rows(name, 0..rows, &mut out);
                    }
                }
            }
        }
    }
}
