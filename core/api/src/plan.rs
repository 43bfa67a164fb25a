use std::sync::{Arc, OnceLock};

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

/// Plans that wait to be used again, with all their memory. A kernel owns one, so that planning a step like the last
/// one allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct PlanPool(Arc<Mutex<Pool>>);

#[derive(Debug, Default)]
struct Pool {
    /// Those that are in use have other owners.
    plans: Vec<Arc<Packed>>,
    words: Vec<Vec<u32>>,
}

/// What a plan is made of.
#[derive(Debug, Default)]
struct Packed {
    batch: BatchLayout,
    extra: Vec<u32>,
    index: Vec<u32>,
    buffer: Option<Buffer>,
    /// Looked for when rows are stored first; a batch that only attends may share what it likes.
    shared_slot: OnceLock<Option<SharedSlot>>,
}

/// A slot of the cache that rows of two sequences would be stored in.
#[derive(Clone, Copy, Debug)]
struct SharedSlot {
    slot: u64,
    sequences: [u32; 2],
}

impl PlanPool {
    /// An empty list for the words of the next plan, in memory that an earlier one had.
    #[must_use]
    pub fn words(&self) -> Vec<u32> {
        self.0.lock().words.pop().unwrap_or_default()
    }

    fn give_back(&self, mut words: Vec<u32>) {
        words.clear();
        self.0.lock().words.push(words);
    }

    /// One that nobody uses, if possible with a buffer of `bytes`.
    fn take(&self, bytes: u64) -> Arc<Packed> {
        let mut pool = self.0.lock();
        let large = |packed: &Packed| packed.buffer.as_ref().is_none_or(|buffer| buffer.bytes() >= bytes);
        let free = |packed: &mut Arc<Packed>| Arc::get_mut(packed).is_some();
        let place = pool
            .plans
            .iter_mut()
            .position(|packed| large(packed) && free(packed))
            .or_else(|| pool.plans.iter_mut().position(free));
        place.map(|place| pool.plans.swap_remove(place)).unwrap_or_default()
    }

    /// Takes in a plan in use, and words that are no longer.
    fn put(&self, packed: &Arc<Packed>, mut words: Vec<u32>) {
        let mut pool = self.0.lock();
        pool.plans.push(Arc::clone(packed));
        // Callers that bring words of their own would fill it without end.
        if pool.words.len() <= pool.plans.len() {
            words.clear();
            pool.words.push(words);
        }
    }
}

/// A batch, checked and ready on the device: made once a step, used by every layer.
#[derive(Clone, Debug)]
pub struct Plan {
    packed: Arc<Packed>,
    pool: PlanPool,
    parts: Vec<Plan>,
}

impl Plan {
    /// Validates `batch` and, on a GPU, uploads it with `extra` words of the backend's own behind it
    /// ([`PlanPool::words`] has memory for them).
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
        let places = Places::of(problem, batch);
        let bytes = (places.extra + extra.len()) as u64 * 4;
        let mut packed = pool.take(bytes);
        let in_use = || BackendError::Batch("the plan's memory is in use".into());
        let inner = Arc::get_mut(&mut packed).ok_or_else(in_use)?;
        inner.batch.copy_from(batch);
        inner.shared_slot.take();
        let spare = std::mem::replace(&mut inner.extra, extra);
        if !device.is_cpu() {
            pack(&mut inner.index, &places, problem, batch, &inner.extra);
            let buffer = match inner.buffer.take() {
                Some(buffer) if buffer.bytes() >= bytes => buffer,
                // Room to grow, so that a sequence that gains a page does not need a new buffer.
                _ => device.alloc((bytes * 2).next_power_of_two().max(1024), "batch index")?,
            };
            device.write(&buffer, 0, &inner.index)?;
            inner.buffer = Some(buffer);
        }
        pool.put(&packed, spare);
        Ok(Self { packed, pool: pool.clone(), parts: Vec::new() })
    }

    /// With the plans of the parts that a kernel serves it by, such as those of a [`Cascade`](crate::Cascade).
    #[must_use]
    pub fn with_parts(mut self, parts: Vec<Plan>) -> Self {
        self.parts = parts;
        self
    }

    /// The plans of its parts, none where it is served whole.
    #[must_use]
    pub fn parts(&self) -> &[Plan] {
        &self.parts
    }

    /// The batch it was made of.
    #[must_use]
    pub fn batch(&self) -> &BatchLayout {
        &self.packed.batch
    }

    /// Checks that it was made in this pool: a kernel can trust the words of its own plans, and no others.
    ///
    /// # Errors
    /// It was made by another kernel.
    pub fn made_in(&self, pool: &PlanPool) -> Result<(), BackendError> {
        match Arc::ptr_eq(&self.pool.0, &pool.0) {
            true => Ok(()),
            false => Err(BackendError::Batch("the plan was made by another kernel".into())),
        }
    }

    /// Checks that each row has a slot of the cache to itself, so that K and V can be stored.
    pub(crate) fn stores(&self) -> Result<(), BackendError> {
        match *self.packed.shared_slot.get_or_init(|| shared_slot(&self.packed.batch, &self.pool)) {
            None => Ok(()),
            Some(SharedSlot { slot, sequences: [first, second] }) => Err(BackendError::Batch(format!(
                "sequences {first} and {second} both store a row in slot {slot} of the cache"
            ))),
        }
    }

    /// The backend's own words.
    #[must_use]
    pub fn extra(&self) -> &[u32] {
        &self.packed.extra
    }

    /// The index buffer to bind first, where a kernel includes [`BATCH_WGSL`]. `commands` keep it until they are
    /// submitted, so the plan may be dropped before.
    ///
    /// # Errors
    /// A plan made for the CPU.
    pub fn index(&self, commands: &mut Commands) -> Result<BufferSlice<'_>, BackendError> {
        let no_index = || BackendError::Batch("a plan of the CPU device has no index".into());
        let buffer = self.packed.buffer.as_ref().ok_or_else(no_index)?;
        commands.keep(Arc::clone(&self.packed) as Arc<_>);
        Ok(buffer.whole())
    }
}

/// A slot that two rows of a valid batch would be stored in.
fn shared_slot(batch: &BatchLayout, pool: &PlanPool) -> Option<SharedSlot> {
    // Of each page that rows go to: the page, its first and last slot of those, the sequence.
    const WORDS: usize = 4;
    let mut parts = pool.words();
    for sequence in 0..batch.sequences() {
        let end = batch.kv_len[sequence];
        let mut position = end - batch.queries(sequence).1;
        while position < end {
            let offset = position % batch.page_size;
            let count = (batch.page_size - offset).min(end - position);
            let page = (batch.slot(sequence, position) / batch.page_size as usize) as u32;
            parts.extend([page, offset, offset + count - 1, sequence as u32]);
            position += count;
        }
    }
    let (parts_of_pages, _) = parts.as_chunks_mut::<WORDS>();
    parts_of_pages.sort_unstable();
    let shared = parts_of_pages.windows(2).find(|pair| pair[0][0] == pair[1][0] && pair[1][1] <= pair[0][2]);
    let shared = shared.map(|pair| SharedSlot {
        slot: u64::from(pair[1][0]) * u64::from(batch.page_size) + u64::from(pair[1][1]),
        sequences: [pair[0][3], pair[1][3]],
    });
    pool.give_back(parts);
    shared
}

/// Where the parts of an index begin, in words.
struct Places {
    rows: usize,
    pages: usize,
    tree: usize,
    reach: usize,
    extra: usize,
}

impl Places {
    fn of(problem: &AttentionProblem, batch: &BatchLayout) -> Self {
        let rows = HEADER + batch.sequences() * SEQUENCE_WORDS;
        let pages = rows + batch.rows() as usize;
        let tree = pages + batch.page_table.len();
        let reach = tree + batch.tree.as_ref().map_or(0, |tree| tree.bits.len());
        let extra = reach + if problem.prefix_spans { batch.rows() as usize } else { 0 };
        Self { rows, pages, tree, reach, extra }
    }
}

/// Writes a batch into `words` as `batch.wgsl` reads it.
fn pack(words: &mut Vec<u32>, places: &Places, problem: &AttentionProblem, batch: &BatchLayout, extra: &[u32]) {
    let (sequences, rows) = (batch.sequences(), batch.rows() as usize);
    let tree_words = batch.tree.as_ref().map_or(0, |tree| tree.words);
    words.clear();
    words.resize(HEADER, 0);
    words[..10].copy_from_slice(&[
        sequences as u32,
        rows as u32,
        batch.max_pages as u32,
        batch.page_size,
        places.rows as u32,
        places.pages as u32,
        places.tree as u32,
        tree_words as u32,
        places.extra as u32,
        places.reach as u32,
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
                let reach = &mut words[places.reach + (start + position - context) as usize];
                *reach = (*reach).max(*last);
            }
        }
    }
    words.extend_from_slice(extra);
}
