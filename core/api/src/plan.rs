use std::sync::Arc;

use parking_lot::Mutex;
use polyattn_device::{Buffer, BufferSlice, Commands, Device};

use crate::{AttentionProblem, BackendError, BatchLayout};

/// WGSL that reads the batch of a [`Plan`]; put it into a kernel whose binding 0 of group 0 is the plan's index.
///
/// `BATCH_SEQUENCES`-like accessors: `batch_sequences()`, `batch_rows()`, `batch_page_size()`, `sequence_start(s)`,
/// `sequence_queries(s)`, `sequence_kv_len(s)`, `sequence_causal(s)`, `row_sequence(r)`, `slot(s, position)`,
/// `page(s, logical)`, `tree_bit(r, j)`, `row_reach(r)`, `extra(i)`.
pub const BATCH_WGSL: &str = include_str!("batch.wgsl");

const HEADER: usize = 12;
const SEQUENCE_WORDS: usize = 4;

/// Index buffers that wait to be used again. A kernel owns one.
#[derive(Clone, Debug, Default)]
pub struct PlanPool(Arc<Mutex<Vec<Buffer>>>);

#[derive(Debug)]
struct Index {
    buffer: Buffer,
    pool: PlanPool,
}

impl Drop for Index {
    fn drop(&mut self) {
        self.pool.0.lock().push(self.buffer.clone());
    }
}

/// A batch, checked and ready on the device: made once a step, used by every layer.
#[derive(Clone, Debug)]
pub struct Plan {
    batch: Arc<BatchLayout>,
    extra: Vec<u32>,
    index: Option<Arc<Index>>,
}

impl Plan {
    /// Validates `batch` and, on a GPU, uploads it with `extra` words of the backend's own behind it.
    ///
    /// # Errors
    /// An invalid batch; no memory.
    pub fn new(
        device: &Device,
        pool: &PlanPool,
        problem: &AttentionProblem,
        batch: &BatchLayout,
        extra: Vec<u32>,
    ) -> Result<Self, BackendError> {
        batch.validate(problem)?;
        let index = if device.is_cpu() { None } else { Some(upload(device, pool, problem, batch, &extra)?) };
        Ok(Self { batch: Arc::new(batch.clone()), extra, index })
    }

    /// The batch it was made of.
    #[must_use]
    pub fn batch(&self) -> &BatchLayout {
        &self.batch
    }

    /// The backend's own words.
    #[must_use]
    pub fn extra(&self) -> &[u32] {
        &self.extra
    }

    /// The index buffer to bind first, where a kernel includes [`BATCH_WGSL`]. `commands` keep it until they are
    /// submitted, so the plan may be dropped before.
    ///
    /// # Errors
    /// A plan made for the CPU.
    pub fn index(&self, commands: &mut Commands) -> Result<BufferSlice<'_>, BackendError> {
        let index =
            self.index.as_ref().ok_or_else(|| BackendError::Batch("a plan of the CPU device has no index".into()))?;
        commands.keep(Arc::clone(index) as Arc<_>);
        Ok(index.buffer.whole())
    }
}

fn upload(
    device: &Device,
    pool: &PlanPool,
    problem: &AttentionProblem,
    batch: &BatchLayout,
    extra: &[u32],
) -> Result<Arc<Index>, BackendError> {
    let sequences = batch.sequences();
    let rows = batch.rows() as usize;
    let row_start = HEADER + sequences * SEQUENCE_WORDS;
    let page_start = row_start + rows;
    let tree_start = page_start + batch.page_table.len();
    let tree_words = batch.tree.as_ref().map_or(0, |tree| tree.words);
    let reach_start = tree_start + batch.tree.as_ref().map_or(0, |tree| tree.bits.len());
    let extra_start = reach_start + if problem.prefix_spans { rows } else { 0 };

    let mut words = vec![0u32; HEADER];
    words[..10].copy_from_slice(&[
        sequences as u32,
        rows as u32,
        batch.max_pages as u32,
        batch.page_size,
        row_start as u32,
        page_start as u32,
        tree_start as u32,
        tree_words as u32,
        extra_start as u32,
        reach_start as u32,
    ]);
    for sequence in 0..sequences {
        let (start, queries) = batch.queries(sequence);
        let causal = u32::from(batch.is_causal(sequence, problem.mask));
        words.extend([start, queries, batch.kv_len[sequence], causal]);
    }
    for sequence in 0..sequences {
        words.extend(std::iter::repeat_n(sequence as u32, batch.queries(sequence).1 as usize));
    }
    words.extend(batch.page_table.iter().map(|page| *page as u32));
    if let Some(tree) = &batch.tree {
        words.extend_from_slice(&tree.bits);
    }
    if problem.prefix_spans {
        words.resize(words.len() + rows, 0);
        for [sequence, first, last] in &batch.prefix_spans {
            let (start, queries) = batch.queries(*sequence as usize);
            let context = batch.kv_len[*sequence as usize] - queries;
            for position in context.max(*first)..(context + queries).min(last + 1) {
                let reach = &mut words[reach_start + (start + position - context) as usize];
                *reach = (*reach).max(*last);
            }
        }
    }
    words.extend_from_slice(extra);

    let bytes = (words.len() * 4) as u64;
    let reused = {
        let mut waiting = pool.0.lock();
        waiting.iter().position(|buffer| buffer.bytes() >= bytes).map(|place| waiting.swap_remove(place))
    };
    let buffer = match reused {
        Some(buffer) => buffer,
        // Room to grow, so that a sequence that gains a page does not need a new buffer.
        None => device.alloc((bytes * 2).next_power_of_two().max(1024), "batch index")?,
    };
    device.write(&buffer, 0, &words)?;
    Ok(Arc::new(Index { buffer, pool: pool.clone() }))
}
