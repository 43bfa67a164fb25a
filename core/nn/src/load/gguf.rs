//! A reader of GGUF files, versions 2 and 3, over a memory map.
//!
//! A file is read once from front to back and checked as it goes: counts are held against the
//! bytes that remain, sizes are multiplied with overflow checks, and every tensor's data must lie
//! inside the file, aligned and apart from all others. What this module hands out afterwards needs
//! no further checks.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::map::MappedFile;
use super::{LoadError, StoredType};

/// Alignment of tensor data where the file does not say otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Arrays inside arrays are legal, but nobody needs more levels than this.
const MAX_ARRAY_DEPTH: usize = 4;
/// The largest number of dimensions that the format allows.
const MAX_DIMENSIONS: u32 = 4;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the variants are the format's own type names")]
pub enum GgufValue {
    Array(GgufArray),
    Bool(bool),
    F32(f32),
    F64(f64),
    I16(i16),
    I32(i32),
    I64(i64),
    I8(i8),
    String(String),
    U16(u16),
    U32(u32),
    U64(u64),
    U8(u8),
}

/// A metadata array: all elements have one type, and are stored as that type.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the variants are the format's own type names")]
pub enum GgufArray {
    Array(Vec<GgufArray>),
    Bool(Vec<bool>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    I16(Vec<i16>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    I8(Vec<i8>),
    String(Vec<String>),
    U16(Vec<u16>),
    U32(Vec<u32>),
    U64(Vec<u64>),
    U8(Vec<u8>),
}

impl GgufValue {
    /// The value as an unsigned integer, whatever its stored width, if it is one that fits.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// The value as a number, if it is a float or an integer.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            Self::I64(v) => Some(v as f64),
            Self::I8(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            _ => self.as_u64().map(|v| v as f64),
        }
    }

    /// The value, if it is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(v) => Some(v),
            _ => None,
        }
    }

    /// The value, if it is a bool.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// The value, if it is an array of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Self::Array(GgufArray::String(v)) => Some(v),
            _ => None,
        }
    }

    /// The value as numbers that fit into an i64, if it is an array of integers.
    pub fn as_integers(&self) -> Option<Vec<i64>> {
        let Self::Array(array) = self else {
            return None;
        };
        match array {
            GgufArray::I8(v) => Some(v.iter().map(|v| (*v).into()).collect()),
            GgufArray::I16(v) => Some(v.iter().map(|v| (*v).into()).collect()),
            GgufArray::I32(v) => Some(v.iter().map(|v| (*v).into()).collect()),
            GgufArray::I64(v) => Some(v.clone()),
            GgufArray::U8(v) => Some(v.iter().map(|v| (*v).into()).collect()),
            GgufArray::U16(v) => Some(v.iter().map(|v| (*v).into()).collect()),
            GgufArray::U32(v) => Some(v.iter().map(|v| (*v).into()).collect()),
            GgufArray::U64(v) => v.iter().map(|v| (*v).try_into().ok()).collect(),
            _ => None,
        }
    }

    /// A short form for error messages: the value, or for arrays the length.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Array(a) => format!("an array of {} elements", a.len()),
            Self::Bool(v) => v.to_string(),
            Self::F32(v) => v.to_string(),
            Self::F64(v) => v.to_string(),
            Self::I16(v) => v.to_string(),
            Self::I32(v) => v.to_string(),
            Self::I64(v) => v.to_string(),
            Self::I8(v) => v.to_string(),
            Self::String(v) => format!("'{}'", excerpt(v)),
            Self::U16(v) => v.to_string(),
            Self::U32(v) => v.to_string(),
            Self::U64(v) => v.to_string(),
            Self::U8(v) => v.to_string(),
        }
    }
}

impl GgufArray {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Array(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::String(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::U8(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One tensor of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GgufTensor {
    /// The tensor's name.
    pub name: String,
    /// How the elements are stored.
    pub ty: StoredType,
    /// Row-major shape, slowest dimension first: a matrix is `[rows, columns]`.
    pub shape: Vec<usize>,
    /// Where the data starts, in bytes from the start of the file.
    pub offset: usize,
    /// How many bytes the data has.
    pub bytes: usize,
}

/// A GGUF file, mapped and checked.
#[derive(Debug)]
pub struct Gguf {
    file: Arc<MappedFile>,
    version: u32,
    alignment: u64,
    metadata: Vec<(String, GgufValue)>,
    metadata_index: HashMap<String, usize>,
    tensors: Vec<GgufTensor>,
    tensor_index: HashMap<String, usize>,
    data_offset: usize,
}

impl Gguf {
    /// Maps a GGUF file and reads its header.
    ///
    /// # Errors
    /// If the file cannot be mapped, is not GGUF of version 2 or 3 in little-endian order, is
    /// truncated, or contradicts itself in any way; and if a tensor has a type that cannot be read.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        Self::read(Arc::new(MappedFile::open(path)?))
    }

    fn read(file: Arc<MappedFile>) -> Result<Self, LoadError> {
        let mut r = Reader { path: file.path(), bytes: file.bytes(), at: 0 };
        let magic = r.take(4, "the magic number")?;
        if magic != b"GGUF" {
            return Err(r.malformed(format!("this is not a GGUF file: it starts with {magic:?} in place of 'GGUF'")));
        }
        let version = r.u32("the version")?;
        if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
            return Err(LoadError::unsupported(r.path, "the file is in big-endian order, which is not supported"));
        }
        if !(2..=3).contains(&version) {
            return Err(LoadError::unsupported(
                r.path,
                format!("GGUF version {version} is not supported (supported: 2, 3)"),
            ));
        }
        // A tensor takes at least 32 bytes (name length, count, one dimension, type, offset) less
        // its name, a metadata entry at least 13 (key length, type, one byte).
        let tensor_count = r.count(32, "tensors")?;
        let metadata_count = r.count(13, "metadata entries")?;

        let mut metadata = Vec::with_capacity(metadata_count);
        let mut metadata_index = HashMap::with_capacity(metadata_count);
        for i in 0..metadata_count {
            let what = format!("key {i} of the metadata");
            let key = r.string(&what)?;
            let what = format!("metadata '{}'", excerpt(&key));
            let ty = r.u32(&what)?;
            let value = r.value(ty, &what)?;
            if metadata_index.insert(key.clone(), i).is_some() {
                return Err(r.malformed(format!("{what} is there twice")));
            }
            metadata.push((key, value));
        }

        let alignment = match metadata_index.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(&i) => {
                let value = &metadata[i].1;
                value.as_u64().filter(|a| a.is_power_of_two() && *a <= 1 << 30).ok_or_else(|| {
                    LoadError::field(
                        r.path,
                        "general.alignment",
                        format!("{} is not a power of two from 1 to 2^30", value.describe()),
                    )
                })?
            }
        };

        let mut tensors: Vec<GgufTensor> = Vec::with_capacity(tensor_count);
        let mut tensor_index = HashMap::with_capacity(tensor_count);
        for i in 0..tensor_count {
            let (tensor, relative) = r.tensor(i)?;
            if relative % alignment != 0 {
                return Err(LoadError::tensor(
                    r.path,
                    tensor.name,
                    format!("its offset {relative} is not a multiple of the alignment {alignment}"),
                ));
            }
            if tensor_index.insert(tensor.name.clone(), i).is_some() {
                return Err(LoadError::tensor(r.path, tensor.name, "the name is there twice"));
            }
            tensors.push(GgufTensor {
                // Made absolute below, once the header's end is known. On 32-bit targets a file
                // that could be mapped has only offsets that fit.
                offset: usize::try_from(relative).unwrap_or(usize::MAX),
                ..tensor
            });
        }

        let data_offset = (r.at as u64).next_multiple_of(alignment);
        let file_len = r.bytes.len();
        let data_offset = usize::try_from(data_offset).unwrap_or(usize::MAX);
        for t in &mut tensors {
            let start = t.offset.checked_add(data_offset);
            let end = start.and_then(|s| s.checked_add(t.bytes));
            match (start, end) {
                (Some(start), Some(end)) if end <= file_len => t.offset = start,
                _ => {
                    return Err(LoadError::tensor(
                        file.path(),
                        t.name.as_str(),
                        format!(
                            "its {} bytes at offset {} of the data do not lie within the file, whose data has {} bytes",
                            t.bytes,
                            t.offset,
                            file_len.saturating_sub(data_offset)
                        ),
                    ));
                }
            }
        }
        let mut order: Vec<&GgufTensor> = tensors.iter().collect();
        order.sort_by_key(|t| t.offset);
        for pair in order.windows(2) {
            if pair[0].offset + pair[0].bytes > pair[1].offset {
                return Err(LoadError::tensor(
                    file.path(),
                    pair[1].name.as_str(),
                    format!("its data overlaps that of tensor '{}'", pair[0].name),
                ));
            }
        }

        Ok(Self { file, version, alignment, metadata, metadata_index, tensors, tensor_index, data_offset })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of tensor data in bytes, a power of two.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Where the tensor data starts, in bytes from the start of the file.
    pub fn data_offset(&self) -> usize {
        self.data_offset
    }

    /// All metadata in the file's order.
    pub fn metadata(&self) -> &[(String, GgufValue)] {
        &self.metadata
    }

    /// The metadata value of a key.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        Some(&self.metadata.get(*self.metadata_index.get(key)?)?.1)
    }

    /// All tensors in the file's order.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(*self.tensor_index.get(name)?)
    }

    /// The stored bytes of a tensor of this file.
    pub fn data(&self, tensor: &GgufTensor) -> &[u8] {
        // Ranges were checked on opening; a tensor of another file gives at worst nothing.
        tensor.offset.checked_add(tensor.bytes).and_then(|end| self.file.bytes().get(tensor.offset..end)).unwrap_or(&[])
    }

    /// Gives back the memory that reading a tensor's bytes took.
    pub(crate) fn release(&self, tensor: &GgufTensor) {
        self.file.release(tensor.offset..tensor.offset.saturating_add(tensor.bytes));
    }
}

/// A cursor over the header.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn malformed(&self, reason: impl Into<String>) -> LoadError {
        LoadError::malformed(self.path, reason)
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], LoadError> {
        let bytes = self.at.checked_add(len).and_then(|end| self.bytes.get(self.at..end)).ok_or_else(|| {
            self.malformed(format!(
                "the file ends within {what}: {len} bytes are needed at byte {}, {} are left",
                self.at,
                self.remaining()
            ))
        })?;
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], LoadError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, LoadError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, LoadError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things of at least `least` bytes each, held against what is left of the file.
    fn count(&mut self, least: usize, what: &str) -> Result<usize, LoadError> {
        let count = self.u64(&format!("the number of {what}"))?;
        self.check_count(count, least, what)
    }

    fn check_count(&self, count: u64, least: usize, what: &str) -> Result<usize, LoadError> {
        usize::try_from(count)
            .ok()
            .filter(|c| c.checked_mul(least).is_some_and(|bytes| bytes <= self.remaining()))
            .ok_or_else(|| {
                self.malformed(format!("the file claims {count} {what}, but only {} bytes are left", self.remaining()))
            })
    }

    fn string(&mut self, what: &str) -> Result<String, LoadError> {
        let len = self.u64(what)?;
        let len = self.check_count(len, 1, &format!("bytes of text for {what}"))?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|e| self.malformed(format!("{what} is not valid UTF-8: {e}")))
    }

    fn bool(&mut self, what: &str) -> Result<bool, LoadError> {
        match self.array::<1>(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.malformed(format!("{what} is a bool of value {other}"))),
        }
    }

    fn value(&mut self, ty: u32, what: &str) -> Result<GgufValue, LoadError> {
        Ok(match ty {
            0 => GgufValue::U8(u8::from_le_bytes(self.array(what)?)),
            1 => GgufValue::I8(i8::from_le_bytes(self.array(what)?)),
            2 => GgufValue::U16(u16::from_le_bytes(self.array(what)?)),
            3 => GgufValue::I16(i16::from_le_bytes(self.array(what)?)),
            4 => GgufValue::U32(self.u32(what)?),
            5 => GgufValue::I32(i32::from_le_bytes(self.array(what)?)),
            6 => GgufValue::F32(f32::from_le_bytes(self.array(what)?)),
            7 => GgufValue::Bool(self.bool(what)?),
            8 => GgufValue::String(self.string(what)?),
            9 => GgufValue::Array(self.array_value(what, 1)?),
            10 => GgufValue::U64(self.u64(what)?),
            11 => GgufValue::I64(i64::from_le_bytes(self.array(what)?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.array(what)?)),
            other => {
                return Err(self.malformed(format!("{what} has the unknown value type {other}")));
            }
        })
    }

    fn array_value(&mut self, what: &str, depth: usize) -> Result<GgufArray, LoadError> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(self.malformed(format!("{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")));
        }
        let ty = self.u32(what)?;
        let elements = format!("elements of {what}");
        Ok(match ty {
            0 => GgufArray::U8(self.numbers(&elements, u8::from_le_bytes)?),
            1 => GgufArray::I8(self.numbers(&elements, i8::from_le_bytes)?),
            2 => GgufArray::U16(self.numbers(&elements, u16::from_le_bytes)?),
            3 => GgufArray::I16(self.numbers(&elements, i16::from_le_bytes)?),
            4 => GgufArray::U32(self.numbers(&elements, u32::from_le_bytes)?),
            5 => GgufArray::I32(self.numbers(&elements, i32::from_le_bytes)?),
            6 => GgufArray::F32(self.numbers(&elements, f32::from_le_bytes)?),
            10 => GgufArray::U64(self.numbers(&elements, u64::from_le_bytes)?),
            11 => GgufArray::I64(self.numbers(&elements, i64::from_le_bytes)?),
            12 => GgufArray::F64(self.numbers(&elements, f64::from_le_bytes)?),
            7 => {
                let count = self.count(1, &elements)?;
                GgufArray::Bool((0..count).map(|_| self.bool(what)).collect::<Result<_, _>>()?)
            }
            8 => {
                let count = self.count(8, &elements)?;
                let mut strings = Vec::with_capacity(count);
                for _ in 0..count {
                    strings.push(self.string(&elements)?);
                }
                GgufArray::String(strings)
            }
            9 => {
                let count = self.count(12, &elements)?;
                let mut arrays = Vec::new();
                for _ in 0..count {
                    arrays.push(self.array_value(what, depth + 1)?);
                }
                GgufArray::Array(arrays)
            }
            other => {
                return Err(self.malformed(format!("{what} is an array of the unknown value type {other}")));
            }
        })
    }

    fn numbers<const N: usize, T>(&mut self, what: &str, one: fn([u8; N]) -> T) -> Result<Vec<T>, LoadError> {
        let count = self.count(N, what)?;
        let bytes = self.take(count * N, what)?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|b| one(*b)).collect())
    }

    /// One entry of the tensor table, and its offset relative to the tensor data.
    fn tensor(&mut self, i: usize) -> Result<(GgufTensor, u64), LoadError> {
        let what = format!("entry {i} of the tensor table");
        let name = self.string(&what)?;
        let error = |r: &Self, reason: String| LoadError::tensor(r.path, name.as_str(), reason);
        let dimensions = self.u32(&what)?;
        if dimensions == 0 || dimensions > MAX_DIMENSIONS {
            return Err(error(self, format!("it has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let d = self.u64(&what)?;
            match usize::try_from(d) {
                Ok(d) if d > 0 => shape.push(d),
                _ => return Err(error(self, format!("it has a dimension of size {d}"))),
            }
        }
        // The file lists the fastest dimension first.
        shape.reverse();
        let number = self.u32(&what)?;
        let ty = StoredType::from_gguf_number(number).ok_or_else(|| {
            error(
                self,
                format!(
                    "it has type {number}{}, which is not supported (supported: {})",
                    other_type_name(number).map(|n| format!(" ({n})")).unwrap_or_default(),
                    StoredType::names()
                ),
            )
        })?;
        let columns = shape.last().copied().unwrap_or(0);
        if columns % ty.block_len() != 0 {
            return Err(error(
                self,
                format!("its rows of {columns} values are not whole blocks of {} values of {ty}", ty.block_len()),
            ));
        }
        let bytes = shape
            .iter()
            .try_fold(1usize, |n, d| n.checked_mul(*d))
            .and_then(|elements| ty.bytes_of(elements))
            .ok_or_else(|| error(self, format!("its shape {shape:?} is too large")))?;
        let offset = self.u64(&what)?;
        Ok((GgufTensor { name, ty, shape, offset: 0, bytes }, offset))
    }
}

/// The first characters of a text that may be arbitrarily long, for error messages.
pub(crate) fn excerpt(text: &str) -> String {
    const MOST: usize = 80;
    if text.chars().nth(MOST).is_none() {
        return text.to_owned();
    }
    text.chars().take(MOST).chain("…".chars()).collect()
}

/// The names of tensor types that exist but cannot be read.
fn other_type_name(number: u32) -> Option<&'static str> {
    Some(match number {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test may panic")]
mod tests {
    use super::super::gguf_write::GgufWriter;
    use super::*;

    fn open(bytes: &[u8]) -> Result<Gguf, LoadError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.gguf");
        std::fs::write(&path, bytes).unwrap();
        Gguf::open(&path)
    }

    fn message(bytes: &[u8]) -> String {
        open(bytes).unwrap_err().to_string()
    }

    fn sample() -> GgufWriter {
        let mut w = GgufWriter::new();
        w.value("a.u8", GgufValue::U8(200));
        w.value("a.i8", GgufValue::I8(-3));
        w.value("a.u16", GgufValue::U16(60000));
        w.value("a.i16", GgufValue::I16(-300));
        w.value("a.u32", GgufValue::U32(7));
        w.value("a.i32", GgufValue::I32(-7));
        w.value("a.f32", GgufValue::F32(1.5));
        w.value("a.bool", GgufValue::Bool(true));
        w.value("a.str", GgufValue::String("héllo".into()));
        w.value("a.u64", GgufValue::U64(1 << 40));
        w.value("a.i64", GgufValue::I64(-(1 << 40)));
        w.value("a.f64", GgufValue::F64(0.25));
        w.value("a.list", GgufValue::Array(GgufArray::String(vec!["x".into(), String::new()])));
        w.value(
            "a.nested",
            GgufValue::Array(GgufArray::Array(vec![GgufArray::I32(vec![1, -2]), GgufArray::Bool(vec![false])])),
        );
        w.tensor("w", &[3, 32], StoredType::Q8_0, vec![1; 3 * 34]);
        w.tensor("v", &[5], StoredType::F32, vec![0; 20]);
        w
    }

    #[test]
    fn reads_back_every_value_type_and_shape() {
        for version in [2, 3] {
            let mut w = sample();
            w.version(version);
            let g = open(&w.finish()).unwrap();
            assert_eq!(g.version(), version);
            assert_eq!(g.metadata().len(), 14);
            for (key, value) in sample().metadata() {
                assert_eq!(g.get(key), Some(value), "{key}");
            }
            assert_eq!(g.get("a.i64").and_then(GgufValue::as_u64), None);
            assert_eq!(g.get("a.u8").and_then(GgufValue::as_u64), Some(200));
            let t = g.tensor("w").unwrap();
            assert_eq!((t.shape.as_slice(), t.ty), (&[3, 32][..], StoredType::Q8_0));
            assert_eq!(g.data(t), [1; 102]);
            let v = g.tensor("v").unwrap();
            assert_eq!(v.shape, [5]);
            assert_eq!(v.offset % 32, 0);
            assert!(g.tensor("u").is_none());
        }
    }

    #[test]
    fn other_files_are_named_as_such() {
        assert!(message(b"").contains("empty"));
        assert!(message(b"GG").contains("ends within the magic number"));
        assert!(message(b"PK\x03\x04aaaaaaaaaaaaaaaaaaaaaaaaaaa").contains("not a GGUF file"));
        let mut w = sample();
        w.version(1);
        assert!(message(&w.finish()).contains("version 1 is not supported"));
        w.version(3u32.swap_bytes());
        assert!(message(&w.finish()).contains("big-endian"));
    }

    #[test]
    fn lies_are_errors_that_name_the_culprit() {
        let base = sample().finish();
        let patched = |at: usize, with: &[u8]| {
            let mut b = base.clone();
            b[at..at + with.len()].copy_from_slice(with);
            b
        };
        let huge = u64::MAX.to_le_bytes();
        assert!(message(&patched(8, &huge)).contains("claims 18446744073709551615 tensors"));
        assert!(message(&patched(16, &huge)).contains("metadata entries"));
        assert!(message(&patched(24, &huge)).contains("key 0 of the metadata"));
        // The first key 'a.u8' has four bytes; its type follows.
        assert!(message(&patched(36, &99u32.to_le_bytes())).contains("unknown value type 99"));

        let find = |needle: &[u8]| base.windows(needle.len()).position(|w| w == needle).unwrap();
        let list = find(b"a.list") + 6 + 4;
        assert!(message(&patched(list + 4, &huge)).contains("elements of metadata 'a.list'"));
        assert!(message(&patched(list, &77u32.to_le_bytes())).contains("unknown value type 77"));
        let text = find("héllo".as_bytes());
        assert!(message(&patched(text, &[0xff])).contains("not valid UTF-8"));
        let flag = find(b"a.bool") + 6 + 4;
        assert!(message(&patched(flag, &[2])).contains("bool of value 2"));

        // Tensor 'w': name length 8, name 1, then dimensions.
        let w = find(b"\x01\0\0\0\0\0\0\0w\x02\0\0\0") + 9;
        assert!(message(&patched(w, &5u32.to_le_bytes())).contains("5 dimensions"));
        assert!(message(&patched(w, &0u32.to_le_bytes())).contains("0 dimensions"));
        assert!(message(&patched(w + 4, &0u64.to_le_bytes())).contains("dimension of size 0"));
        assert!(message(&patched(w + 4, &31u64.to_le_bytes())).contains("not whole blocks"));
        assert!(message(&patched(w + 12, &(u64::MAX / 2).to_le_bytes())).contains("too large"));
        assert!(message(&patched(w + 12, &1000u64.to_le_bytes())).contains("within the file"));
        let unknown = message(&patched(w + 20, &10u32.to_le_bytes()));
        assert!(unknown.contains("tensor 'w'") && unknown.contains("type 10 (Q2_K)"), "{unknown}");
        assert!(message(&patched(w + 24, &3u64.to_le_bytes())).contains("multiple of the alignment"));
        let far = (u64::MAX - 31).to_le_bytes();
        assert!(message(&patched(w + 24, &far)).contains("within the file"));
        // 'v' is the second tensor, at offset 128; moved to 0 it overlaps.
        let v = find(b"v\x01\0\0\0") + 1 + 4 + 8 + 4;
        assert!(message(&patched(v, &0u64.to_le_bytes())).contains("overlaps"));
    }

    #[test]
    fn duplicates_depth_and_alignment() {
        let mut w = sample();
        w.value("a.u8", GgufValue::U8(1));
        assert!(message(&w.finish()).contains("metadata 'a.u8' is there twice"));
        let mut w = sample();
        w.tensor("w", &[1], StoredType::F32, vec![0; 4]);
        assert!(message(&w.finish()).contains("tensor 'w': the name is there twice"));

        let mut deep = GgufArray::U8(vec![1]);
        for _ in 0..5 {
            deep = GgufArray::Array(vec![deep]);
        }
        let mut w = GgufWriter::new();
        w.value("deep", GgufValue::Array(deep));
        assert!(message(&w.finish()).contains("more than 4 deep"));

        for bad in [GgufValue::U32(0), GgufValue::U32(24), GgufValue::F32(32.0)] {
            let mut w = sample();
            w.value("general.alignment", bad);
            assert!(message(&w.finish()).contains("field 'general.alignment'"));
        }
        let mut w = sample();
        w.value("general.alignment", GgufValue::U32(64));
        assert_eq!(open(&w.finish()).unwrap().alignment(), 64);
    }

    #[test]
    fn a_long_key_is_cut_in_messages() {
        let mut w = GgufWriter::new();
        let key = "k".repeat(5000);
        w.value(&key, GgufValue::Bool(true));
        w.value(&key, GgufValue::Bool(true));
        assert!(message(&w.finish()).len() < 400);
    }
}
