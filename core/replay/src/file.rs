//! Reading and writing replay files.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::Write,
    path::Path,
};

use bytemuck::Pod;
use polyattn_api::{AttentionKind, AttentionProblem, BatchLayout, DType, KvDType, Mask, Role, TreeMask, Window};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    Case, ReplayError, Tolerance,
    case::{check_kind, phase_of},
};

const KEY: &str = "polyattn.problem";
const FORMAT: u64 = 1;

#[derive(Deserialize)]
struct Format {
    format: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u64,
    attention: Attention,
    tolerance: Tolerance,
}

#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Gqa,
    Mla,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Attention {
    kind: Kind,
    query_heads: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kv_heads: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    head_dim: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_dim: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    latent_dim: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_dim: Option<u32>,
    scale: f64,
    mask: Mask,
    #[serde(default)]
    window: Option<Window>,
    #[serde(default)]
    softcap: Option<f64>,
    dtype: DType,
    kv_dtype: KvDType,
    page_size: u32,
}

impl Attention {
    fn kind(&self) -> Result<AttentionKind, String> {
        let name = match self.kind {
            Kind::Gqa => "gqa",
            Kind::Mla => "mla",
        };
        let need = |field: &str, value: Option<u32>| {
            value.ok_or_else(|| format!("{KEY}: attention.{field} is missing, kind {name} needs it"))
        };
        let refuse = |field: &str, value: Option<u32>| match value {
            Some(value) => Err(format!("{KEY}: attention.{field} is {value}, kind {name} has no such field")),
            None => Ok(()),
        };
        let kind = match self.kind {
            Kind::Gqa => {
                refuse("latent_dim", self.latent_dim)?;
                refuse("rope_dim", self.rope_dim)?;
                let head_dim = need("head_dim", self.head_dim)?;
                AttentionKind::Gqa {
                    query_heads: self.query_heads,
                    kv_heads: need("kv_heads", self.kv_heads)?,
                    head_dim,
                    value_dim: self.value_dim.unwrap_or(head_dim),
                }
            }
            Kind::Mla => {
                refuse("head_dim", self.head_dim)?;
                refuse("value_dim", self.value_dim)?;
                if let Some(heads) = self.kv_heads.filter(|heads| *heads != 1) {
                    return Err(format!("{KEY}: attention.kv_heads is {heads}, kind mla has 1"));
                }
                AttentionKind::Mla {
                    query_heads: self.query_heads,
                    latent_dim: need("latent_dim", self.latent_dim)?,
                    rope_dim: need("rope_dim", self.rope_dim)?,
                }
            }
        };
        check_kind(kind).map_err(|reason| format!("{KEY}: attention.{reason}"))?;
        Ok(kind)
    }

    fn problem(&self) -> Result<AttentionProblem, String> {
        let mut problem = AttentionProblem::new(self.kind()?, self.dtype)
            .layer("replay")
            .mask(self.mask)
            .window(self.window)
            .page_size(self.page_size);
        problem.scale = finite("scale", self.scale)?;
        problem.kv_dtype = self.kv_dtype;
        problem.softcap = match self.softcap {
            Some(softcap) if softcap <= 0.0 => {
                return Err(format!("{KEY}: attention.softcap is {softcap}, it must be positive"));
            }
            Some(softcap) => Some(finite("softcap", softcap)?),
            None => None,
        };
        if self.page_size == 0 {
            return Err(format!("{KEY}: attention.page_size is 0"));
        }
        Ok(problem)
    }

    fn of(problem: &AttentionProblem, page_size: u32) -> Result<Self, String> {
        let mut attention = Self {
            kind: Kind::Gqa,
            query_heads: problem.kind.query_heads(),
            kv_heads: None,
            head_dim: None,
            value_dim: None,
            latent_dim: None,
            rope_dim: None,
            // Through its shortest decimal form, so that 0.1 does not become 0.10000000149011612.
            scale: shortest(problem.scale),
            mask: problem.mask,
            window: problem.window,
            softcap: problem.softcap.map(shortest),
            dtype: problem.dtype,
            kv_dtype: problem.kv_dtype,
            page_size,
        };
        match problem.kind {
            AttentionKind::Gqa { kv_heads, head_dim, value_dim, .. } => {
                attention.kv_heads = Some(kv_heads);
                attention.head_dim = Some(head_dim);
                attention.value_dim = Some(value_dim);
            }
            AttentionKind::Mla { latent_dim, rope_dim, .. } => {
                attention.kind = Kind::Mla;
                attention.latent_dim = Some(latent_dim);
                attention.rope_dim = Some(rope_dim);
            }
            _ => return Err("this kind of attention has no replay format".into()),
        }
        Ok(attention)
    }
}

fn finite(field: &str, value: f64) -> Result<f32, String> {
    let narrow = value as f32;
    if narrow.is_finite() {
        return Ok(narrow);
    }
    Err(format!("{KEY}: attention.{field} is {value:?}, beyond 32-bit floats"))
}

fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut json = serde_json::Deserializer::from_str(text);
    let parsed =
        serde_path_to_error::deserialize(&mut json).map_err(|error| match error.path().to_string().as_str() {
            "." => format!("{KEY}: {}", error.inner()),
            path => format!("{KEY}: {path}: {}", error.inner()),
        })?;
    json.end().map_err(|error| format!("{KEY}: {error}"))?;
    Ok(parsed)
}

fn stored(dtype: KvDType) -> Dtype {
    match dtype {
        KvDType::F16 => Dtype::F16,
        KvDType::BF16 => Dtype::BF16,
        KvDType::Q8 => Dtype::I8,
        KvDType::F8E4M3 | KvDType::F8E5M2 => Dtype::U8,
        _ => Dtype::F32,
    }
}

/// One dimension of a tensor: its name, and its size where that is known beforehand.
type Dim = (&'static str, Option<u64>);

/// The tensors of a file, each to be asked for once.
struct Tensors<'a> {
    tensors: SafeTensors<'a>,
    asked: BTreeSet<&'static str>,
}

impl<'a> Tensors<'a> {
    fn optional(&mut self, name: &'static str, dtype: Dtype, shape: &[Dim]) -> Result<Option<TensorView<'a>>, String> {
        self.asked.insert(name);
        let Ok(tensor) = self.tensors.tensor(name) else { return Ok(None) };
        if tensor.dtype() != dtype {
            return Err(format!("tensor {name} is {:?}, expected {dtype:?}", tensor.dtype()));
        }
        let fits = tensor.shape().len() == shape.len()
            && tensor.shape().iter().zip(shape).all(|(has, (_, wanted))| wanted.is_none_or(|size| *has as u64 == size));
        if !fits {
            let wanted: Vec<_> = shape
                .iter()
                .map(|(name, size)| size.map_or((*name).to_owned(), |size| format!("{name} = {size}")))
                .collect();
            return Err(format!("tensor {name} has shape {:?}, expected [{}]", tensor.shape(), wanted.join(", ")));
        }
        Ok(Some(tensor))
    }

    fn required(&mut self, name: &'static str, dtype: Dtype, shape: &[Dim]) -> Result<TensorView<'a>, String> {
        self.optional(name, dtype, shape)?.ok_or_else(|| format!("tensor {name} is missing"))
    }

    fn floats(&mut self, name: &'static str, shape: &[Dim]) -> Result<Option<Vec<f32>>, String> {
        Ok(self.optional(name, Dtype::F32, shape)?.map(|tensor| elements(&tensor)))
    }

    /// Every tensor that nobody asked for is a mistake: a misspelt `sinks` must not pass for a file without sinks.
    fn finish(&self) -> Result<(), String> {
        match self.tensors.names().into_iter().filter(|name| !self.asked.contains(name)).min() {
            Some(name) => Err(format!("tensor {name} has no place in this problem")),
            None => Ok(()),
        }
    }
}

fn elements<T: Pod>(tensor: &TensorView<'_>) -> Vec<T> {
    bytemuck::pod_collect_to_vec(tensor.data())
}

/// I32 values that must not be negative.
fn counts(name: &str, tensor: &TensorView<'_>) -> Result<Vec<u32>, String> {
    elements::<i32>(tensor)
        .into_iter()
        .enumerate()
        .map(|(at, value)| u32::try_from(value).map_err(|_| format!("tensor {name} has {value} at element {at}")))
        .collect()
}

fn size(name: &str, tensor: &TensorView<'_>, dim: usize) -> Result<u32, String> {
    u32::try_from(tensor.shape()[dim]).map_err(|_| format!("tensor {name} has shape {:?}: too large", tensor.shape()))
}

fn read(bytes: &[u8]) -> Result<Case, String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| format!("no safetensors file: {error}"))?;
    let text = metadata
        .metadata()
        .as_ref()
        .and_then(|entries| entries.get(KEY))
        .ok_or_else(|| format!("no replay file: metadata key {KEY} is missing"))?;
    // Another format has other fields; its number is the better message.
    let Format { format } = parse(text)?;
    if format != FORMAT {
        return Err(format!("{KEY}: format is {format}, this version reads {FORMAT}"));
    }
    let Document { attention, tolerance, .. } = parse(text)?;
    let mut problem = attention.problem()?;

    let tensors = SafeTensors::deserialize(bytes).map_err(|error| format!("no safetensors file: {error}"))?;
    let mut tensors = Tensors { tensors, asked: BTreeSet::new() };
    let kind = problem.kind;
    let known = |name, size: u32| (name, Some(u64::from(size)));
    let heads = known("query_heads", kind.query_heads());
    let kv_heads = known("kv_heads", kind.kv_heads());
    let page = known("page_size", attention.page_size);
    let cache = stored(problem.kv_dtype);

    let q = tensors.required(
        "q",
        stored(problem.dtype.into()),
        &[("tokens", None), heads, known("query_dim", kind.query_dim())],
    )?;
    let tokens = known("tokens", size("q", &q, 0)?);
    let (name, k, v) = match kind {
        AttentionKind::Mla { .. } => {
            let width = known("latent_dim + rope_dim", kind.query_dim());
            ("kv_cache", tensors.required("kv_cache", cache, &[("pages", None), page, width])?, None)
        }
        _ => {
            let dim = known("head_dim", kind.query_dim());
            let k = tensors.required("k_cache", cache, &[("pages", None), page, kv_heads, dim])?;
            let pages = known("pages", size("k_cache", &k, 0)?);
            let dim = known("value_dim", kind.output_dim());
            let v = tensors.required("v_cache", cache, &[pages, page, kv_heads, dim])?;
            ("k_cache", k, Some(v))
        }
    };
    let pool_pages = size(name, &k, 0)?;
    let pages = known("pages", pool_pages);

    let kv_len = tensors.required("kv_len", Dtype::I32, &[("batch", None)])?;
    let batch = size("kv_len", &kv_len, 0)?;
    let start = tensors.required("query_start", Dtype::I32, &[("batch + 1", Some(u64::from(batch) + 1))])?;
    let table = tensors.required("page_table", Dtype::I32, &[known("batch", batch), ("max_pages", None)])?;
    let mut layout = BatchLayout::new(attention.page_size, pool_pages);
    layout.query_start = counts("query_start", &start)?;
    layout.kv_len = counts("kv_len", &kv_len)?;
    layout.page_table = elements(&table);
    layout.max_pages = size("page_table", &table, 1)? as usize;
    if tokens.1 != Some(u64::from(layout.rows())) {
        return Err(format!(
            "tensor query_start ends with {}, tensor q has {} rows",
            layout.rows(),
            tokens.1.unwrap_or_default()
        ));
    }
    if let Some(tensor) = tensors.optional("causal", Dtype::I32, &[known("batch", batch)])? {
        let flags: Vec<i32> = elements(&tensor);
        if let Some(at) = flags.iter().position(|flag| !(0..=1).contains(flag)) {
            return Err(format!("tensor causal has {} at element {at}, expected 0 or 1", flags[at]));
        }
        layout.causal = Some(flags.into_iter().map(|flag| flag == 1).collect());
        problem.per_sequence_causal = true;
    }
    if let Some(tensor) = tensors.optional("prefix_spans", Dtype::I32, &[("spans", None), ("3", Some(3))])? {
        let numbers = counts("prefix_spans", &tensor)?;
        layout.prefix_spans = numbers.as_chunks::<3>().0.to_vec();
        problem.prefix_spans = !layout.prefix_spans.is_empty();
    }
    if problem.mask == Mask::Tree {
        let tensor = tensors.required("tree_mask", Dtype::U32, &[tokens, ("words", None)])?;
        layout.tree = Some(TreeMask { words: size("tree_mask", &tensor, 1)? as usize, bits: elements(&tensor) });
    }

    let (q, k_cache) = (q.data().to_vec(), k.data().to_vec());
    let mut case = Case::new(problem, layout, q, k_cache, v.map_or_else(Vec::new, |v| v.data().to_vec()));
    case.tolerance = tolerance;
    if case.problem.kv_dtype == KvDType::Q8 {
        case.k_scale = tensors.floats("k_scale", &[pages, page, kv_heads])?;
        case.v_scale = tensors.floats("v_scale", &[pages, page, kv_heads])?;
    }
    case.sinks = tensors.floats("sinks", &[heads])?;
    case.problem.sinks = case.sinks.is_some();
    case.alibi_slopes = tensors.floats("alibi_slopes", &[heads])?;
    case.problem.alibi = case.alibi_slopes.is_some();
    case.out = tensors.floats("out", &[tokens, heads, known("output_dim", kind.output_dim())])?;
    case.lse = tensors.floats("lse", &[tokens, heads])?;
    tensors.finish()?;
    case.problem.phase = phase_of(&case.batch);
    case.problem.role = Role::Target;
    case.check()?;
    Ok(case)
}

/// A tensor on its way into a file.
type Entry<'a> = (Dtype, Vec<usize>, &'a [u8]);

pub(crate) fn serialize(
    tensors: BTreeMap<&str, Entry<'_>>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>, String> {
    let mut views = Vec::new();
    for (name, (dtype, shape, data)) in tensors {
        let view = TensorView::new(dtype, shape, data).map_err(|error| format!("tensor {name}: {error}"))?;
        views.push((name, view));
    }
    safetensors::serialize(views, metadata).map_err(|error| error.to_string())
}

/// Writes beside the file and renames, so that nobody finds half a file.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), ReplayError> {
    let failed = |source| ReplayError::Io { file: path.display().to_string(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| {
        // The first error is the one to report; what is left behind is a matter of tidiness.
        let _ = fs::remove_file(&temporary);
        failed(error)
    })
}

impl Case {
    /// Reads a replay file. The problem's role is [`Role::Target`]; its phase follows from the query rows: decode with
    /// at most one a sequence, verify with up to 64, else prefill.
    ///
    /// # Errors
    /// A file that cannot be read, is malformed or contradicts itself.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ReplayError> {
        let path = path.as_ref();
        let file = path.display().to_string();
        let bytes = fs::read(path).map_err(|source| ReplayError::Io { file: file.clone(), source })?;
        Self::from_bytes(&file, &bytes)
    }

    /// Reads the bytes of a replay file called `file` in messages.
    ///
    /// # Errors
    /// Bytes that are malformed or contradict themselves.
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<Self, ReplayError> {
        read(bytes).map_err(|reason| ReplayError::Invalid { file: file.to_owned(), reason })
    }

    /// The bytes of a replay file.
    ///
    /// # Errors
    /// A case that contradicts itself.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ReplayError> {
        self.check().and_then(|()| self.bytes()).map_err(ReplayError::Case)
    }

    fn bytes(&self) -> Result<Vec<u8>, String> {
        let (problem, batch) = (&self.problem, &self.batch);
        let attention = Attention::of(problem, batch.page_size)?;
        let document = Document { format: FORMAT, attention, tolerance: self.tolerance };
        let text = serde_json::to_string(&document).map_err(|error| error.to_string())?;

        let [tokens, pages, page] = [batch.rows(), batch.pool_pages, batch.page_size].map(|size| size as usize);
        let kind = problem.kind;
        let [heads, kv_heads, query_dim, output_dim] =
            [kind.query_heads(), kind.kv_heads(), kind.query_dim(), kind.output_dim()].map(|size| size as usize);
        let sequences = batch.sequences();
        let cache = stored(problem.kv_dtype);
        let causal: Option<Vec<i32>> =
            batch.causal.as_ref().map(|flags| flags.iter().map(|flag| i32::from(*flag)).collect());
        // I32 and U32 share their bits as long as no count exceeds 31 bits.
        let counts = batch.query_start.iter().chain(&batch.kv_len).chain(batch.prefix_spans.as_flattened());
        if let Some(count) = counts.into_iter().find(|count| i32::try_from(**count).is_err()) {
            return Err(format!("{count} exceeds the 32-bit integers of the file format"));
        }

        let mut tensors: BTreeMap<&str, Entry<'_>> = BTreeMap::new();
        tensors.insert("q", (stored(problem.dtype.into()), vec![tokens, heads, query_dim], &self.q));
        if matches!(kind, AttentionKind::Mla { .. }) {
            tensors.insert("kv_cache", (cache, vec![pages, page, query_dim], &self.k_cache));
        } else {
            tensors.insert("k_cache", (cache, vec![pages, page, kv_heads, query_dim], &self.k_cache));
            tensors.insert("v_cache", (cache, vec![pages, page, kv_heads, output_dim], &self.v_cache));
        }
        let bytes = |numbers: &'_ [u32]| -> Vec<u8> { bytemuck::cast_slice(numbers).to_vec() };
        let query_start = bytes(&batch.query_start);
        let kv_len = bytes(&batch.kv_len);
        tensors.insert("query_start", (Dtype::I32, vec![sequences + 1], &query_start));
        tensors.insert("kv_len", (Dtype::I32, vec![sequences], &kv_len));
        let table = bytemuck::cast_slice(&batch.page_table);
        tensors.insert("page_table", (Dtype::I32, vec![sequences, batch.max_pages], table));
        if let Some(causal) = &causal {
            tensors.insert("causal", (Dtype::I32, vec![sequences], bytemuck::cast_slice(causal)));
        }
        let spans = batch.prefix_spans.as_flattened();
        if !spans.is_empty() {
            tensors.insert("prefix_spans", (Dtype::I32, vec![spans.len() / 3, 3], bytemuck::cast_slice(spans)));
        }
        if let Some(tree) = &batch.tree {
            tensors.insert("tree_mask", (Dtype::U32, vec![tokens, tree.words], bytemuck::cast_slice(&tree.bits)));
        }
        for (name, shape, values) in [
            ("k_scale", vec![pages, page, kv_heads], &self.k_scale),
            ("v_scale", vec![pages, page, kv_heads], &self.v_scale),
            ("sinks", vec![heads], &self.sinks),
            ("alibi_slopes", vec![heads], &self.alibi_slopes),
            ("out", vec![tokens, heads, output_dim], &self.out),
            ("lse", vec![tokens, heads], &self.lse),
        ] {
            if let Some(values) = values {
                tensors.insert(name, (Dtype::F32, shape, bytemuck::cast_slice(values)));
            }
        }
        serialize(tensors, Some(HashMap::from([(KEY.to_owned(), text)])))
    }

    /// Writes a replay file, under a temporary name first.
    ///
    /// # Errors
    /// A case that contradicts itself; a file that cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), ReplayError> {
        write(path.as_ref(), &self.to_bytes()?)
    }
}
