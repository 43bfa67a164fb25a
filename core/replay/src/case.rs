use std::fmt;

use polyattn_api::{AttentionKind, AttentionProblem, BatchLayout, DType, KvDType, Mask, Phase};
use serde::{Deserialize, Serialize};

use crate::ReplayError;

/// How far an answer may be from what is expected: `|got − want| ≤ atol + rtol · |want|` for every element.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tolerance {
    /// Absolute part.
    pub atol: f64,
    /// Part relative to the expected value.
    pub rtol: f64,
}

impl Tolerance {
    /// What a backend is held to: 1e-4 where queries and cache are f32, else 1e-2, both absolute and relative.
    #[must_use]
    pub fn of(dtype: DType, kv_dtype: KvDType) -> Self {
        let size = if dtype == DType::F32 && kv_dtype == KvDType::F32 { 1e-4 } else { 1e-2 };
        Self { atol: size, rtol: size }
    }

    /// Whether `got` is close enough to `want`. NaN never is, equal infinities are.
    #[must_use]
    pub fn holds(self, got: f64, want: f64) -> bool {
        got == want || ((got - want).abs() <= self.atol + self.rtol * want.abs() && want.is_finite())
    }
}

/// One attention call with its data, on the host. Raw tensors are little-endian bytes in their stored format. Caches
/// lie as below whatever the problem's layout: a run brings them into it.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct Case {
    /// What is computed. Its page size is always set.
    pub problem: AttentionProblem,
    /// The batch.
    pub batch: BatchLayout,
    /// `[tokens, query_heads, query_dim]` of the problem's dtype.
    pub q: Vec<u8>,
    /// `[pages, page_size, kv_heads, head_dim]` of the cache's dtype; with MLA `[pages, page_size, latent_dim + rope_dim]`.
    pub k_cache: Vec<u8>,
    /// `[pages, page_size, kv_heads, value_dim]` of the cache's dtype; with MLA empty.
    pub v_cache: Vec<u8>,
    /// `[pages, page_size, kv_heads]`, with `q8`.
    pub k_scale: Option<Vec<f32>>,
    /// `[pages, page_size, kv_heads]`, with `q8`; MLA without it scales values as keys.
    pub v_scale: Option<Vec<f32>>,
    /// `[query_heads]`, where the problem has sinks.
    pub sinks: Option<Vec<f32>>,
    /// `[query_heads]`, where the problem has ALiBi.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Expected output, `[tokens, query_heads, output_dim]`.
    pub out: Option<Vec<f32>>,
    /// Expected LSE, `[tokens, query_heads]`.
    pub lse: Option<Vec<f32>>,
    /// How far an answer may be from it.
    pub tolerance: Tolerance,
}

impl Case {
    /// A call without scales, sinks, slopes or an expected answer, with the tolerance of its dtypes. `v_cache` is empty
    /// with MLA. The problem's page size becomes the batch's.
    #[must_use]
    pub fn new(problem: AttentionProblem, batch: BatchLayout, q: Vec<u8>, k_cache: Vec<u8>, v_cache: Vec<u8>) -> Self {
        let problem = problem.page_size(batch.page_size);
        let tolerance = Tolerance::of(problem.dtype, problem.kv_dtype);
        Self {
            problem,
            batch,
            q,
            k_cache,
            v_cache,
            k_scale: None,
            v_scale: None,
            sinks: None,
            alibi_slopes: None,
            out: None,
            lse: None,
            tolerance,
        }
    }

    /// Elements of the output.
    #[must_use]
    pub fn out_elements(&self) -> usize {
        self.lse_elements() * self.problem.kind.output_dim() as usize
    }

    /// Elements of the LSE.
    #[must_use]
    pub fn lse_elements(&self) -> usize {
        self.batch.rows() as usize * self.problem.kind.query_heads() as usize
    }

    /// Checks that problem, batch and data fit together, so that everything else may index without checks.
    ///
    /// # Errors
    /// [`ReplayError::Case`] with the first thing that is wrong.
    pub fn validate(&self) -> Result<(), ReplayError> {
        self.check().map_err(ReplayError::Case)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let problem = &self.problem;
        check_kind(problem.kind)?;
        if !problem.scale.is_finite() {
            return Err(format!("scale is {}", problem.scale));
        }
        if let Some(softcap) = problem.softcap
            && !(softcap.is_finite() && softcap > 0.0)
        {
            return Err(format!("softcap is {softcap}, it must be a positive number"));
        }
        for (name, value) in [("atol", self.tolerance.atol), ("rtol", self.tolerance.rtol)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("tolerance.{name} is {value}, it must be a number that is not negative"));
            }
        }
        if problem.page_size != Some(self.batch.page_size) {
            return Err(format!("page_size is {:?}, the batch has {}", problem.page_size, self.batch.page_size));
        }
        self.batch.validate(problem).map_err(|error| match error {
            polyattn_api::BackendError::Batch(reason) => reason,
            error => error.to_string(),
        })?;
        if self.batch.tree.is_some() && problem.mask != Mask::Tree {
            return Err("tree_mask is given, but the mask is no tree".into());
        }

        let rows = u128::from(self.batch.rows());
        let heads = u128::from(problem.kind.query_heads());
        let slots = u128::from(self.batch.pool_pages) * u128::from(self.batch.page_size);
        let slot_heads = slots * u128::from(problem.kind.kv_heads());
        let kv_bytes = u128::from(problem.kv_dtype.bytes());
        let mla = matches!(problem.kind, AttentionKind::Mla { .. });
        let v_dim = if mla { 0 } else { u128::from(problem.kind.output_dim()) };
        let query_dim = u128::from(problem.kind.query_dim());
        for (name, has, needs) in [
            ("q", self.q.len(), rows * heads * query_dim * u128::from(problem.dtype.bytes())),
            ("k_cache", self.k_cache.len(), slot_heads * query_dim * kv_bytes),
            ("v_cache", self.v_cache.len(), slot_heads * v_dim * kv_bytes),
        ] {
            if has as u128 != needs {
                return Err(format!("{name} has {has} bytes, the problem needs {needs}"));
            }
        }
        let q8 = problem.kv_dtype == KvDType::Q8;
        for (name, values, needs, wanted) in [
            ("k_scale", &self.k_scale, slot_heads, Some(q8)),
            ("v_scale", &self.v_scale, slot_heads, if q8 && mla { None } else { Some(q8) }),
            ("sinks", &self.sinks, heads, Some(problem.sinks)),
            ("alibi_slopes", &self.alibi_slopes, heads, Some(problem.alibi)),
            ("out", &self.out, rows * heads * u128::from(problem.kind.output_dim()), None),
            ("lse", &self.lse, rows * heads, None),
        ] {
            match (values, wanted) {
                (None, Some(true)) => return Err(format!("{name} is missing")),
                (Some(_), Some(false)) => return Err(format!("{name} is given, but the problem has no use for it")),
                (Some(values), _) if values.len() as u128 != needs => {
                    return Err(format!("{name} has {} elements, the problem needs {needs}", values.len()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The data would fill the screen.
        f.debug_struct("Case")
            .field("problem", &self.problem)
            .field("tolerance", &self.tolerance)
            .finish_non_exhaustive()
    }
}

/// Replay files do not say what a pass is for; the number of query rows does.
pub(crate) fn phase_of(batch: &BatchLayout) -> Phase {
    let most = (1..batch.query_start.len())
        .map(|at| batch.query_start[at].saturating_sub(batch.query_start[at - 1]))
        .max()
        .unwrap_or(0);
    match most {
        0 | 1 => Phase::Decode,
        2..=64 => Phase::Verify,
        _ => Phase::Prefill,
    }
}

/// Dims that a kernel can count in 32 bits.
pub(crate) fn check_kind(kind: AttentionKind) -> Result<(), String> {
    let (heads, kv_heads, dims) = match kind {
        AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim } => {
            (query_heads, kv_heads, [("head_dim", head_dim), ("value_dim", value_dim)])
        }
        AttentionKind::Mla { query_heads, latent_dim, rope_dim } => {
            (query_heads, 1, [("latent_dim", latent_dim), ("rope_dim", rope_dim)])
        }
        _ => return Err("this kind of attention has no replay format".into()),
    };
    for (name, size) in [("query_heads", heads), ("kv_heads", kv_heads)].into_iter().chain(dims) {
        if size == 0 {
            return Err(format!("{name} is 0"));
        }
    }
    if !heads.is_multiple_of(kv_heads) {
        return Err(format!("query_heads {heads} is no multiple of kv_heads {kv_heads}"));
    }
    let widest = dims.iter().map(|(_, size)| u64::from(*size)).sum::<u64>().saturating_mul(u64::from(heads));
    if widest > u64::from(u32::MAX) {
        return Err(format!("{heads} heads of dims {} and {} exceed 32 bits", dims[0].1, dims[1].1));
    }
    Ok(())
}
