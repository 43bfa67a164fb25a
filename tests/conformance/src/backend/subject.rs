use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionKind, AttentionProblem, BackendError, Capabilities, DType, Decline,
    Device, DeviceFacts, Dims, KvDType, Mask, Phase, RegisteredBackend,
};
use polyattn_replay::{
    Case, Comparison, Outcome, ReplayError,
    random::{self, Spec},
    reference,
};

use crate::Failure;

/// The backend under test on its device.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) backend: RegisteredBackend,
    pub(super) device: Device,
    /// Kernels by problem: trials share them, as compiling is what takes time.
    prepared: Arc<Mutex<Vec<Arc<dyn AttentionKernel>>>>,
}

/// Faults of the backend reach the kit as errors that name the function, and its kernels are kept.
impl AttentionBackend for Subject {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn capabilities(&self) -> &Capabilities {
        self.backend.backend.capabilities()
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        self.backend.declines(problem, device)
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let mut prepared = self.prepared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(kernel) = prepared.iter().find(|kernel| kernel.problem() == problem) {
            return Ok(Arc::clone(kernel));
        }
        let kernel = self.backend.prepare(device, problem)?;
        prepared.push(Arc::clone(&kernel));
        Ok(kernel)
    }
}

impl Subject {
    pub(super) fn new(backend: &RegisteredBackend, device: &Device) -> Self {
        Self { backend: backend.clone(), device: device.clone(), prepared: Arc::default() }
    }

    pub(super) fn can(&self) -> Capabilities {
        *self.capabilities()
    }

    /// The kinds of attention it advertises: small, with grouped heads.
    pub(super) fn kinds(&self) -> Vec<AttentionKind> {
        let can = self.can();
        let gqa = can.head_dims.nearest(64).filter(|_| can.gqa).map(|dim| gqa(6, 2, dim));
        let mla = can.latent_dims.nearest(64).zip(can.rope_dims.nearest(16)).filter(|_| can.mla);
        let mla = mla.map(|(latent_dim, rope_dim)| AttentionKind::Mla { query_heads: 6, latent_dim, rope_dim });
        gqa.into_iter().chain(mla).collect()
    }

    /// The phases it advertises, the one with the freest rows first.
    pub(super) fn phases(&self) -> Vec<Phase> {
        let order = [Phase::Prefill, Phase::Verify, Phase::Draft, Phase::Decode];
        order.into_iter().filter(|phase| self.can().phases.contains(*phase)).collect()
    }

    /// A mask it advertises, the plainest first.
    pub(super) fn mask(&self) -> Option<Mask> {
        let can = self.can();
        let masks = [(can.causal, Mask::Causal), (can.non_causal, Mask::Bidirectional), (can.tree, Mask::Tree)];
        masks.into_iter().find(|(served, _)| *served).map(|(_, mask)| mask)
    }

    /// Formats of queries and cache it advertises together.
    pub(super) fn formats(&self) -> Vec<(DType, KvDType)> {
        let can = self.can();
        let pairs = can.dtypes.iter().flat_map(|dtype| can.kv_dtypes.iter().map(move |kv_dtype| (dtype, kv_dtype)));
        pairs.filter(|(dtype, kv_dtype)| can.mixed_dtypes || KvDType::from(*dtype) == *kv_dtype).collect()
    }

    /// A plain specification within the capabilities: ragged sequences, the first formats. `None` where the
    /// capabilities serve nothing of this kind.
    pub(super) fn spec(&self, kind: AttentionKind) -> Option<Spec> {
        let (dtype, kv_dtype) = *self.formats().first()?;
        let page_size = self.can().page_sizes.nearest(16)?;
        let sequences = [(1, 75), (9, 40), (0, 5), (3, 3), (20, 33)];
        Some(Spec { kv_dtype, page_size, mask: self.mask()?, ..Spec::new(kind, dtype, &sequences) })
    }

    /// The case of a specification in a phase. Rows beyond what the phase or the capabilities allow are left out.
    pub(super) fn case(&self, seed: u64, spec: &Spec, phase: Phase) -> Case {
        let rows = if phase == Phase::Decode { 1 } else { self.can().max_query_rows.unwrap_or(u32::MAX) };
        let mut spec = spec.clone();
        spec.sequences.iter_mut().for_each(|(queries, _)| *queries = (*queries).min(rows));
        let mut case = random::case(seed, &spec);
        case.problem.phase = phase;
        case
    }

    /// Runs a case that must be served, and compares.
    pub(super) fn check(&self, case: &Case) -> Result<(), Failure> {
        match self.answer(case)? {
            Some(_) => Ok(()),
            None => {
                let reasons = self.declines_of(case);
                Err(Failure::new(format!("it advertises this and declines it: {reasons}; asked was {}", Told(case))))
            }
        }
    }

    /// Runs a case and compares; `None` where it is declined.
    pub(super) fn answer(&self, case: &Case) -> Result<Option<Outcome>, Failure> {
        let outcome = match case.run(&self.device, self) {
            Ok(outcome) => outcome,
            Err(ReplayError::Declined(_)) => return Ok(None),
            Err(error) => return Err(self.failed(case, &error.to_string())),
        };
        let comparison = Comparison::of(case, &outcome).map_err(|error| Failure::new(error.to_string()))?;
        if comparison.within_tolerance {
            return Ok(Some(outcome));
        }
        let nan = outcome.out.iter().filter(|x| x.is_nan()).count();
        let lse = comparison.lse_max_abs_err.map_or(String::new(), |error| format!(", of the LSE {error:.2e}"));
        let what = match nan {
            0 => format!("the answer is wrong: largest error {:.2e}{lse}", comparison.max_abs_err),
            _ => format!("{nan} of {} output elements are NaN or were not written", outcome.out.len()),
        };
        Err(self.failed(case, &what))
    }

    pub(super) fn declines_of(&self, case: &Case) -> String {
        let reasons = self.declines(&case.problem, self.device.facts());
        reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    /// A failure with the case written down.
    pub(super) fn failed(&self, case: &Case, what: &str) -> Failure {
        let failure = Failure::new(format!("{what}; asked was {}", Told(case)));
        match self.write(case) {
            Ok(path) => failure.with_replay(path),
            Err(error) => Failure::new(format!("{}; no replay file: {error}", failure.message())),
        }
    }

    fn write(&self, case: &Case) -> Result<PathBuf, ReplayError> {
        let mut case = case.clone();
        if case.out.is_none() {
            let (out, lse) = reference::attention_f64(&case)?;
            let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
            (case.out, case.lse) = (Some(narrow(out)), Some(narrow(lse)));
        }
        let folder = std::env::var_os("POLYATTN_CONFORMANCE_DIR")
            .map_or_else(|| std::env::temp_dir().join("polyattn-conformance"), PathBuf::from);
        std::fs::create_dir_all(&folder)
            .map_err(|error| ReplayError::Case(format!("{}: {error}", folder.display())))?;
        // Named by its content, so that a case that fails again is one file.
        let bytes = case.to_bytes()?;
        let hash = bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        let path = folder.join(format!("{}-{hash:016x}.safetensors", self.name()));
        case.save(&path)?;
        Ok(path)
    }
}

pub(super) fn gqa(query_heads: u32, kv_heads: u32, head_dim: u32) -> AttentionKind {
    AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim: head_dim }
}

/// `gqa` or `mla`, to begin a trial's name.
pub(super) fn kind_name(kind: AttentionKind) -> &'static str {
    match kind {
        AttentionKind::Gqa { .. } => "gqa",
        _ => "mla",
    }
}

/// Some sizes of a set, the smallest and the largest among them.
pub(super) fn samples(dims: Dims, wishes: &[u32]) -> Vec<u32> {
    let ends = match dims {
        Dims::Steps { min, max, .. } => vec![min, max],
        Dims::List(sizes) => sizes.to_vec(),
        _ => Vec::new(),
    };
    let nearest = wishes.iter().chain(&ends).filter_map(|size| dims.nearest(*size));
    let mut sizes: Vec<_> = nearest.filter(|size| *size > 0).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// A case in a line, for messages.
struct Told<'a>(&'a Case);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (problem, batch) = (&self.0.problem, &self.0.batch);
        write!(f, "{:?}, {:?} {} ", problem.kind, problem.mask, problem.phase)?;
        write!(f, "{} over {} in pages of {}", problem.dtype, problem.kv_dtype, batch.page_size)?;
        if let Some(window) = problem.window {
            write!(f, ", {window:?}")?;
        }
        if let Some(softcap) = problem.softcap {
            write!(f, ", softcap {softcap}")?;
        }
        for (asked, name) in [
            (problem.sinks, "sinks"),
            (problem.alibi, "ALiBi"),
            (problem.per_sequence_causal, "causality per sequence"),
            (problem.prefix_spans, "prefix spans"),
        ] {
            if asked {
                write!(f, ", {name}")?;
            }
        }
        let sequences = (0..batch.sequences()).map(|one| (batch.queries(one).1, batch.kv_len[one]));
        write!(f, ", (rows, keys) {:?}", sequences.collect::<Vec<_>>())
    }
}
