//! Attention of sequences that share a prefix.

use std::sync::Arc;

use parking_lot::Mutex;
use polyattn_device::{Buffer, Commands, Device};

use crate::{
    AttentionBackend, AttentionIo, AttentionKernel, AttentionProblem, AttentionState, BackendError, BatchLayout,
    Decline, Mask, MergeStates, Plan, StoreKv, StoreRotated, merge_states,
};

/// Bytes whose reading is taken to cost as much as two more dispatches: about 5 µs on the fastest GPUs.
const DISPATCH_BYTES: u64 = 16 << 20;

/// A kernel that attends to pages which neighbouring sequences share once for all of them, to the rest of each sequence
/// apart, and merges the two ([`merge_states`]).
///
/// It is made of two kernels of one backend: one for the problem with its LSE, and one, not causal, for what is shared.
/// [`plan`](AttentionKernel::plan) finds in the page table which sequences begin with the same physical pages, and
/// shares them where that saves more reading than merging costs; a batch that shares too little is served as by the
/// backend alone. Which keys are shared decides the order of a row's sums: the answer is as near, but its bits depend on
/// the batch, so a backend that offers this must not claim to be batch-invariant.
///
/// Windows and ALiBi need the positions of rows among the shared keys, which one sequence of all rows has not: such
/// problems are declined.
///
/// Source: cascade inference of FlashInfer (arXiv 2501.01005).
#[derive(Debug)]
pub struct Cascade {
    device: Device,
    problem: AttentionProblem,
    shared: Arc<dyn AttentionKernel>,
    own: Arc<dyn AttentionKernel>,
    states: Mutex<States>,
    least: u64,
}

/// Memory for states. Steps and layers use it one after the other, as the device runs them.
#[derive(Clone, Debug)]
struct States {
    /// Results over shared keys.
    out: Buffer,
    lse: Buffer,
    /// The LSE over a sequence's own keys, where the problem wants none.
    own_lse: Buffer,
}

impl Cascade {
    /// Why `problem` cannot be served by shared prefixes, whatever the backend; `None` if it can.
    #[must_use]
    pub fn declines(problem: &AttentionProblem) -> Option<Decline> {
        let what = match (problem.window.is_some(), problem.alibi) {
            (true, _) => "a shared prefix under a sliding window",
            (_, true) => "a shared prefix under ALiBi",
            _ => return None,
        };
        Some(Decline::Other(what.into()))
    }

    /// Prepares the kernels of `backend` that serve `problem` by shared prefixes.
    ///
    /// # Errors
    /// A problem that cannot be served so, or that the backend declines, with LSE or without causality; a device that
    /// fails.
    pub fn prepare(
        backend: &dyn AttentionBackend,
        device: &Device,
        problem: &AttentionProblem,
    ) -> Result<Self, BackendError> {
        if let Some(decline) = Self::declines(problem) {
            return Err(BackendError::Declined(vec![decline]));
        }
        let own = AttentionProblem { lse: true, ..problem.clone() };
        // A sink is one more logit of a row, not of each part of its keys.
        let shared = AttentionProblem {
            mask: Mask::Bidirectional,
            per_sequence_causal: false,
            prefix_spans: false,
            sinks: false,
            ..own.clone()
        };
        for problem in [&own, &shared] {
            let declines = backend.declines(problem, device.facts());
            if !declines.is_empty() {
                return Err(BackendError::Declined(declines));
            }
        }
        let empty = || device.alloc(16, "states of a shared prefix");
        Ok(Self {
            device: device.clone(),
            problem: problem.clone(),
            shared: backend.prepare(device, &shared)?,
            own: backend.prepare(device, &own)?,
            states: Mutex::new(States { out: empty()?, lse: empty()?, own_lse: empty()? }),
            least: DISPATCH_BYTES,
        })
    }

    /// Shares where more than `bytes` of reading are saved beyond what merging moves; 16 MiB unless set.
    #[must_use]
    pub fn sharing_above(mut self, bytes: u64) -> Self {
        self.least = bytes;
        self
    }

    /// Whether sharing saves more reading than its states and dispatches cost.
    fn pays(&self, batch: &BatchLayout, groups: &[Group]) -> bool {
        let kind = self.problem.kind;
        let rows = u64::from(batch.rows());
        let tokens = |group: &Group| u64::from(group.pages) * u64::from(batch.page_size);
        let saved: u64 = groups.iter().map(|group| (group.sequences - 1) * tokens(group)).sum();
        let token = u64::from(kind.kv_heads()) * u64::from(kind.query_dim() + kind.output_dim());
        // A state of the prefix is written and read, the one that it is merged into read and written again.
        let merged = rows * u64::from(kind.query_heads()) * u64::from(kind.output_dim() + 1) * 4 * 4;
        saved * token * self.problem.kv_dtype.bytes() > merged.saturating_add(self.least)
    }

    /// Makes room for the states of this many rows.
    fn reserve(&self, rows: u32) -> Result<(), BackendError> {
        let lse = u64::from(rows) * u64::from(self.problem.kind.query_heads()) * 4;
        let out = lse * u64::from(self.problem.kind.output_dim());
        let mut states = self.states.lock();
        let States { out: a, lse: b, own_lse: c } = &mut *states;
        for (buffer, bytes) in [(a, out), (b, lse), (c, lse)] {
            if buffer.bytes() < bytes {
                *buffer = self.device.alloc(bytes.next_power_of_two(), "states of a shared prefix")?;
            }
        }
        Ok(())
    }
}

/// Neighbouring sequences that begin with the same pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    /// The first one, and the one behind the last.
    first: usize,
    end: usize,
    /// Of those, the ones that have query rows.
    sequences: u64,
    pages: u32,
}

/// Groups of at least two sequences with query rows and one shared page. A sequence joins its neighbours where as many
/// keys are spared as without it, so a long prefix is not given up for a short one that more have.
fn groups(batch: &BatchLayout) -> Vec<Group> {
    let table = |sequence: usize| &batch.page_table[sequence * batch.max_pages..][..batch.max_pages];
    let mut groups = Vec::new();
    let mut last: Option<Group> = None;
    for sequence in 0..batch.sequences() {
        let (_, queries) = batch.queries(sequence);
        if queries == 0 {
            continue;
        }
        // Rows stand behind what is shared, in pages of their own.
        let context = (batch.kv_len[sequence] - queries) / batch.page_size;
        if let Some(group) = &mut last {
            let most = group.pages.min(context) as usize;
            let pairs = table(group.first)[..most].iter().zip(table(sequence));
            let pages = pairs.take_while(|(a, b)| a == b).count() as u32;
            if pages > 0 && group.sequences * u64::from(pages) >= (group.sequences - 1) * u64::from(group.pages) {
                *group = Group { end: sequence + 1, sequences: group.sequences + 1, pages, ..*group };
                continue;
            }
        }
        groups.extend(last.replace(Group { first: sequence, end: sequence + 1, sequences: 1, pages: context }));
    }
    groups.extend(last);
    groups.retain(|group| group.sequences > 1 && group.pages > 0);
    groups
}

/// What is shared as a batch: one sequence for each group, of all query rows up to the next group. Rows of sequences
/// between groups come along, and their states are not merged. `None` where there are more rows than shared keys.
fn shared(batch: &BatchLayout, groups: &[Group]) -> Option<BatchLayout> {
    let mut shared = BatchLayout::new(batch.page_size, batch.pool_pages);
    for (at, group) in groups.iter().enumerate() {
        let end = groups.get(at + 1).map_or(batch.rows(), |next| batch.query_start[next.first]);
        let (rows, keys) = (end - shared.rows(), group.pages * batch.page_size);
        if rows > keys {
            return None;
        }
        let pages = &batch.page_table[group.first * batch.max_pages..][..group.pages as usize];
        shared.push(rows, keys, pages);
    }
    Some(shared)
}

/// The batch without what its groups share.
fn own(batch: &BatchLayout, groups: &[Group]) -> BatchLayout {
    let mut own = batch.clone();
    for group in groups {
        for sequence in (group.first..group.end).filter(|sequence| batch.queries(*sequence).1 > 0) {
            let pages = group.pages as usize;
            own.kv_len[sequence] -= group.pages * batch.page_size;
            let row = &mut own.page_table[sequence * batch.max_pages..][..batch.max_pages];
            row.copy_within(pages.., 0);
            row[batch.max_pages - pages..].fill(-1);
        }
    }
    // A span ends as many keys earlier; its part among the shared keys is seen by every row.
    own.prefix_spans.retain_mut(|[sequence, first, last]| {
        let gone = batch.kv_len[*sequence as usize] - own.kv_len[*sequence as usize];
        let kept = *last >= gone;
        (*first, *last) = (first.saturating_sub(gone), last.saturating_sub(gone));
        kept
    });
    own
}

impl AttentionKernel for Cascade {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        let plan = self.own.plan(batch)?;
        self.reserve(batch.rows())?;
        let groups = groups(batch);
        if !self.pays(batch, &groups) {
            return Ok(plan);
        }
        let Some(shared) = shared(batch, &groups) else { return Ok(plan) };
        let parts = vec![self.shared.plan(&shared)?, self.own.plan(&own(batch, &groups))?];
        Ok(plan.with_parts(parts))
    }

    fn store_kv(&self, commands: &mut Commands, plan: &Plan, io: &StoreKv<'_>) -> Result<(), BackendError> {
        self.own.store_kv(commands, plan, io)
    }

    fn store_rotated(&self, commands: &mut Commands, plan: &Plan, io: &StoreRotated<'_>) -> Result<bool, BackendError> {
        self.own.store_rotated(commands, plan, io)
    }

    fn encode(&self, commands: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        let batch = plan.batch();
        io.validate(&self.problem, batch)?;
        let states = self.states.lock().clone();
        let lse = io.lse.filter(|_| self.problem.lse).unwrap_or_else(|| states.own_lse.whole());
        let whole = AttentionIo { lse: Some(lse), ..*io };
        let [shared, own] = plan.parts() else { return self.own.encode(commands, plan, &whole) };
        let prefix = AttentionIo { out: states.out.whole(), lse: Some(states.lse.whole()), sinks: None, ..*io };
        self.shared.encode(commands, shared, &prefix)?;
        self.own.encode(commands, own, &whole)?;

        let (into, other) = (AttentionState::new(io.out, lse), AttentionState::new(&states.out, &states.lse));
        let heads = self.problem.kind.query_heads();
        let (mut from, mut to) = (0, 0);
        // Neighbours that share are merged at once; what lies between them is whole already.
        for sequence in 0..batch.sequences() {
            let (start, queries) = batch.queries(sequence);
            if own.batch().kv_len[sequence] == batch.kv_len[sequence] {
                continue;
            }
            if start != to {
                let states = from * heads..to * heads;
                merge_states(commands, &MergeStates::new(into, other, states, self.problem.kind.output_dim()))?;
                from = start;
            }
            to = start + queries;
        }
        merge_states(commands, &MergeStates::new(into, other, from * heads..to * heads, self.problem.kind.output_dim()))
    }
}

#[cfg(test)]
mod tests {
    use super::{Group, groups, own, shared};
    use crate::BatchLayout;

    fn batch(sequences: &[(u32, u32, &[i32])]) -> BatchLayout {
        let mut batch = BatchLayout::new(4, 99);
        for (queries, length, pages) in sequences {
            batch.push(*queries, *length, pages);
        }
        batch
    }

    #[test]
    fn neighbours_share_what_spares_most() {
        let found = |sequences: &[(u32, u32, &[i32])]| {
            groups(&batch(sequences)).iter().map(|g| (g.first, g.end, g.sequences, g.pages)).collect::<Vec<_>>()
        };
        assert_eq!(found(&[]), []);
        assert_eq!(found(&[(1, 9, &[1, 2, 3])]), [], "nobody to share with");
        assert_eq!(found(&[(1, 9, &[1, 2, 3]), (1, 10, &[1, 2, 4])]), [(0, 2, 2, 2)]);
        // A page with a query row in it is nobody else's.
        assert_eq!(found(&[(1, 8, &[1, 2]), (1, 8, &[1, 2])]), [(0, 2, 2, 1)]);
        assert_eq!(found(&[(2, 5, &[1, 2]), (2, 5, &[1, 2])]), []);
        // Sequences without rows take no part and part nobody.
        assert_eq!(found(&[(1, 9, &[1, 2, 3]), (0, 4, &[7]), (1, 9, &[1, 2, 5])]), [(0, 3, 2, 2)]);
        // One page for three spares two, two pages for two spare as many; five pages for two more than one for three.
        let long: &[i32] = &[1, 2, 3, 4, 5, 6];
        assert_eq!(found(&[(1, 9, &[1, 2, 3]), (1, 9, &[1, 2, 4]), (1, 6, &[1, 9])]), [(0, 3, 3, 1)]);
        assert_eq!(found(&[(1, 22, long), (1, 22, long), (1, 6, &[1, 9])]), [(0, 2, 2, 5)]);
        assert_eq!(
            found(&[(1, 9, &[1, 2, 3]), (1, 9, &[1, 2, 4]), (3, 3, &[9]), (1, 6, &[5, 6]), (1, 6, &[5, 7])]),
            [(0, 2, 2, 2), (3, 5, 2, 1)]
        );
    }

    #[test]
    fn parts_hold_all_keys() {
        let mut whole =
            batch(&[(1, 1, &[8]), (1, 9, &[1, 2, 3]), (2, 13, &[1, 2, 4, 5]), (1, 3, &[9]), (1, 6, &[6, 7])]);
        whole.prefix_spans = vec![[2, 3, 12], [1, 0, 7], [3, 0, 2]];
        let found = groups(&whole);
        assert_eq!(found, [Group { first: 1, end: 3, sequences: 2, pages: 2 }]);
        let prefix = shared(&whole, &found).expect("few rows");
        assert_eq!((&prefix.query_start[..], &prefix.kv_len[..]), (&[0, 6][..], &[8][..]));
        assert_eq!(prefix.page_table, [1, 2]);
        let rest = own(&whole, &found);
        assert_eq!(rest.kv_len, [1, 1, 5, 3, 6]);
        assert_eq!(rest.page_table[4..12], [3, -1, -1, -1, 4, 5, -1, -1]);
        assert_eq!(rest.prefix_spans, [[2, 0, 4], [3, 0, 2]]);

        let crowded = batch(&[(3, 9, &[1, 2]), (3, 9, &[1, 3])]);
        assert_eq!(shared(&crowded, &groups(&crowded)), None, "six rows, four keys");
    }
}
