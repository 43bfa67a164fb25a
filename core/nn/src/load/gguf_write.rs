//! A writer of GGUF files for tests (feature `test-support`).
//!
//! It writes what it is told, including versions and metadata that no reader accepts.

use super::StoredType;
use super::gguf::{GgufArray, GgufValue};

/// Collects metadata and tensors, and writes them as one GGUF file.
#[derive(Clone, Debug)]
pub struct GgufWriter {
    version: u32,
    metadata: Vec<(String, GgufValue)>,
    tensors: Vec<(String, Vec<usize>, StoredType, Vec<u8>)>,
}

impl Default for GgufWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl GgufWriter {
    /// An empty file of version 3.
    pub fn new() -> Self {
        Self { version: 3, metadata: Vec::new(), tensors: Vec::new() }
    }

    /// Sets the version field.
    pub fn version(&mut self, version: u32) -> &mut Self {
        self.version = version;
        self
    }

    /// Appends a metadata entry. `general.alignment` is obeyed where it is a `U32`.
    pub fn value(&mut self, key: &str, value: GgufValue) -> &mut Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    /// Puts a metadata entry in place of the one of the same key, or appends it.
    pub fn replace(&mut self, key: &str, value: GgufValue) -> &mut Self {
        self.remove(key).value(key, value)
    }

    /// Takes out a metadata entry or a tensor of this name.
    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(k, _)| k != key);
        self.tensors.retain(|(k, ..)| k != key);
        self
    }

    /// Appends a tensor of a row-major shape with its stored bytes.
    pub fn tensor(&mut self, name: &str, shape: &[usize], ty: StoredType, bytes: Vec<u8>) -> &mut Self {
        self.tensors.push((name.to_owned(), shape.to_vec(), ty, bytes));
        self
    }

    /// The metadata appended so far.
    pub fn metadata(&self) -> &[(String, GgufValue)] {
        &self.metadata
    }

    /// The whole file.
    pub fn finish(&self) -> Vec<u8> {
        let alignment = self
            .metadata
            .iter()
            .find_map(|(k, v)| match v {
                GgufValue::U32(a) if k == "general.alignment" => Some(*a as usize),
                _ => None,
            })
            .unwrap_or(32)
            .max(1);
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            string(&mut out, key);
            write_value(&mut out, value);
        }
        let mut offset = 0usize;
        for (name, shape, ty, bytes) in &self.tensors {
            string(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            for d in shape.iter().rev() {
                out.extend((*d as u64).to_le_bytes());
            }
            out.extend(ty.gguf_number().to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = (offset + bytes.len()).next_multiple_of(alignment);
        }
        for (.., bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(alignment), 0);
            out.extend(bytes);
        }
        out
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Writes the type number and then the value.
fn write_value(out: &mut Vec<u8>, value: &GgufValue) {
    macro_rules! number {
        ($ty:expr, $v:expr) => {{
            out.extend(u32::to_le_bytes($ty));
            out.extend($v.to_le_bytes());
        }};
    }
    match value {
        GgufValue::U8(v) => number!(0, v),
        GgufValue::I8(v) => number!(1, v),
        GgufValue::U16(v) => number!(2, v),
        GgufValue::I16(v) => number!(3, v),
        GgufValue::U32(v) => number!(4, v),
        GgufValue::I32(v) => number!(5, v),
        GgufValue::F32(v) => number!(6, v),
        GgufValue::Bool(v) => number!(7, u8::from(*v)),
        GgufValue::U64(v) => number!(10, v),
        GgufValue::I64(v) => number!(11, v),
        GgufValue::F64(v) => number!(12, v),
        GgufValue::String(v) => {
            out.extend(8u32.to_le_bytes());
            string(out, v);
        }
        GgufValue::Array(v) => {
            out.extend(9u32.to_le_bytes());
            write_array(out, v);
        }
    }
}

/// Writes the element type, the count and the elements.
fn write_array(out: &mut Vec<u8>, array: &GgufArray) {
    let mut head = |ty: u32| {
        out.extend(ty.to_le_bytes());
        out.extend((array.len() as u64).to_le_bytes());
    };
    macro_rules! numbers {
        ($ty:expr, $v:expr) => {{
            head($ty);
            out.extend($v.iter().flat_map(|v| v.to_le_bytes()));
        }};
    }
    match array {
        GgufArray::U8(v) => numbers!(0, v),
        GgufArray::I8(v) => numbers!(1, v),
        GgufArray::U16(v) => numbers!(2, v),
        GgufArray::I16(v) => numbers!(3, v),
        GgufArray::U32(v) => numbers!(4, v),
        GgufArray::I32(v) => numbers!(5, v),
        GgufArray::F32(v) => numbers!(6, v),
        GgufArray::U64(v) => numbers!(10, v),
        GgufArray::I64(v) => numbers!(11, v),
        GgufArray::F64(v) => numbers!(12, v),
        GgufArray::Bool(v) => {
            head(7);
            out.extend(v.iter().map(|v| u8::from(*v)));
        }
        GgufArray::String(v) => {
            head(8);
            for text in v {
                string(out, text);
            }
        }
        GgufArray::Array(v) => {
            head(9);
            for inner in v {
                write_array(out, inner);
            }
        }
    }
}
