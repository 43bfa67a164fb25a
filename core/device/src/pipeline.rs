use std::{fmt, sync::Arc};

/// How a shader uses a storage binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    ReadWrite,
}

/// Everything that makes a compute pipeline; equal specifications share one pipeline.
#[derive(Clone, Debug)]
pub struct PipelineSpec<'a> {
    /// Name in errors and debuggers.
    pub label: &'a str,
    /// The whole WGSL text.
    pub source: &'a str,
    /// Entry point.
    pub entry: &'a str,
    /// Storage bindings 0, 1, … of group 0.
    pub bindings: &'a [Access],
    /// Bytes of `var<immediate>`, a multiple of 4.
    pub immediate_bytes: u32,
    /// Values of `override` constants.
    pub constants: &'a [(&'a str, f64)],
}

/// A compiled compute pipeline. Cloning it shares it.
#[derive(Clone)]
pub struct Pipeline(pub(crate) Arc<PipelineInner>);

pub(crate) struct PipelineInner {
    pub(crate) layout_id: u64,
    pub(crate) id: u64,
    pub(crate) label: String,
    pub(crate) layout: wgpu::BindGroupLayout,
    pub(crate) bindings: usize,
    pub(crate) immediate_bytes: u32,
    pub(crate) pipeline: wgpu::ComputePipeline,
}

impl fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pipeline('{}')", self.0.label)
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PipelineKey {
    source: String,
    entry: String,
    bindings: Vec<Access>,
    immediate_bytes: u32,
    constants: Vec<(String, u64)>,
}

impl From<&PipelineSpec<'_>> for PipelineKey {
    fn from(spec: &PipelineSpec<'_>) -> Self {
        Self {
            source: spec.source.to_owned(),
            entry: spec.entry.to_owned(),
            bindings: spec.bindings.to_vec(),
            immediate_bytes: spec.immediate_bytes,
            constants: spec.constants.iter().map(|(name, value)| ((*name).to_owned(), value.to_bits())).collect(),
        }
    }
}
