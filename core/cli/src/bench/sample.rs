//! Is a timed answer right? A few rows of it against the f64 reference.

use rayon::prelude::*;

use crate::{
    api::{AttentionKind, AttentionProblem, BatchLayout},
    replay::{Case, Tolerance, reference},
};

use super::{BenchError, Shape, value, values};

/// Seeds of the data: queries, keys, values, sinks.
pub(super) const SEEDS: [u32; 4] = [1, 2, 3, 4];

/// Rows checked of each answer.
const ROWS: u32 = 6;

/// Where the first element of a row lies in its tensor, of which [`value`] makes it: queries by sequence, row and head,
/// keys and values by sequence, position and head.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// Queries; the data named by seed 1.
    pub query: &'a (dyn Fn(u32, u32, u32) -> u32 + Sync),
    /// Keys; seed 2.
    pub key: &'a (dyn Fn(u32, u32, u32) -> u32 + Sync),
    /// Values; seed 3.
    pub value: &'a (dyn Fn(u32, u32, u32) -> u32 + Sync),
}

impl std::fmt::Debug for Places<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Places")
    }
}

/// Some rows of an answer, as they must be.
#[derive(Clone, Debug)]
pub struct Samples {
    tolerance: Tolerance,
    rows: Vec<Sample>,
}

#[derive(Clone, Debug)]
struct Sample {
    sequence: u32,
    row: u32,
    head: u32,
    want: Vec<f64>,
}

/// How far an answer is from the reference over the rows that were checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreement {
    /// Largest absolute difference of an element; NaN if one is NaN.
    pub max_abs_err: f64,
    /// Length of the difference over the length of what is expected: what tells a wrong answer from a right one where
    /// many keys average to little.
    pub rel_l2: f64,
    /// Whether every element is within the tolerance of the formats, and `rel_l2` too.
    pub within_tolerance: bool,
}

impl Samples {
    /// Computes first, last and random rows of the answer to `shape`.
    ///
    /// # Errors
    /// A format that is not measured.
    pub fn compute(shape: &Shape, places: Places<'_>) -> Result<Self, BenchError> {
        let heads = shape.problem.kind.query_heads();
        let below = |at: u32, limit: u32| ((value(5, at) + 2.0) / 4.0 * limit as f32) as u32 % limit;
        let mut chosen: Vec<[u32; 3]> = (2..ROWS)
            .map(|at| [below(at * 3, shape.batch), below(at * 3 + 1, shape.rows), below(at * 3 + 2, heads)])
            .chain([[0; 3], [shape.batch - 1, shape.rows - 1, heads - 1]])
            .collect();
        chosen.sort_unstable();
        chosen.dedup();
        let rows = chosen.into_par_iter().map(|[sequence, row, head]| {
            let case = case(shape, places, sequence, row, head)?;
            let (want, _) = reference::attention_f64(&case)?;
            Ok(Sample { sequence, row, head, want })
        });
        let tolerance = Tolerance::of(shape.problem.dtype, shape.problem.kv_dtype);
        Ok(Self { tolerance, rows: rows.collect::<Result<_, BenchError>>()? })
    }

    /// Compares; `read` gives what was answered for a sequence, a row and a head.
    ///
    /// # Errors
    /// Those of `read`; an answer of another length.
    pub fn compare<E: From<BenchError>>(
        &self,
        mut read: impl FnMut(u32, u32, u32) -> Result<Vec<f32>, E>,
    ) -> Result<Agreement, E> {
        let (mut largest, mut difference, mut expected, mut within) = (0f64, 0.0, 0.0, true);
        for Sample { sequence, row, head, want } in &self.rows {
            let got = read(*sequence, *row, *head)?;
            if got.len() != want.len() {
                let message = format!("{} elements were answered, {} are expected", got.len(), want.len());
                return Err(BenchError::Reference(message).into());
            }
            for (got, want) in got.iter().map(|got| f64::from(*got)).zip(want.iter().copied()) {
                let error = (got - want).abs();
                // f64::max drops a NaN.
                largest = if error.is_nan() || largest.is_nan() { f64::NAN } else { largest.max(error) };
                difference += error * error;
                expected += want * want;
                within &= self.tolerance.holds(got, want);
            }
        }
        let rel_l2 = if difference == 0.0 { 0.0 } else { (difference / expected).sqrt() };
        let within_tolerance = within && rel_l2 <= self.tolerance.rtol;
        Ok(Agreement { max_abs_err: largest, rel_l2, within_tolerance })
    }
}

/// One row of one head as an attention call of its own: what it sees ends at its own position.
fn case(shape: &Shape, places: Places<'_>, sequence: u32, row: u32, head: u32) -> Result<Case, BenchError> {
    const PAGE: u32 = 16;
    let AttentionProblem { kind, dtype, kv_dtype, .. } = shape.problem;
    let length = shape.context - shape.rows + row + 1;
    let kv_head = head / (kind.query_heads() / kind.kv_heads());
    let pages = length.div_ceil(PAGE);
    let mut batch = BatchLayout::new(PAGE, pages);
    batch.push(1, length, &(0..pages.cast_signed()).collect::<Vec<_>>());

    let mut problem = shape.problem.clone().page_size(PAGE);
    let v_dim = match &mut problem.kind {
        AttentionKind::Gqa { query_heads, kv_heads, value_dim, .. } => {
            (*query_heads, *kv_heads) = (1, 1);
            *value_dim
        }
        AttentionKind::Mla { query_heads, .. } => {
            *query_heads = 1;
            0
        }
        _ => return Err(BenchError::Reference("this kind of attention is not measured".into())),
    };
    let cache = |seed: u32, dim: u32, place: &(dyn Fn(u32, u32, u32) -> u32 + Sync)| {
        let mut data = Vec::with_capacity(pages as usize * (PAGE * dim) as usize * kv_dtype.bytes() as usize);
        for position in 0..if dim == 0 { 0 } else { length } {
            data.extend(values(seed, place(sequence, position, kv_head), dim, kv_dtype)?);
        }
        data.resize(pages as usize * (PAGE * dim) as usize * kv_dtype.bytes() as usize, 0);
        Ok::<_, BenchError>(data)
    };
    let q = values(SEEDS[0], (places.query)(sequence, row, head), kind.query_dim(), dtype.into())?;
    let keys = cache(SEEDS[1], kind.query_dim(), places.key)?;
    let values = cache(SEEDS[2], v_dim, places.value)?;
    let mut case = Case::new(problem, batch, q, keys, values);
    case.sinks = shape.problem.sinks.then(|| vec![value(SEEDS[3], head)]);
    Ok(case)
}
