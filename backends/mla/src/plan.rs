//! A batch cut into work items: the host's part of a step.

use polyattn_api::{AttentionProblem, BackendError, BatchLayout, Mask};

/// Words of the header: rows of an item, query rows. Three facts of each query row follow (first state, first
/// chunk, chunk behind the last), then the rounds, each before its items.
pub(crate) const HEADER: usize = 2;

/// Words of a round: items, first query row, query rows, states.
pub(crate) const ROUND: usize = 4;

/// Words of a work item: sequence, first row, chunk.
pub(crate) const ITEM: usize = 3;

/// Work items that a plan may have.
const MOST_ITEMS: u64 = 1 << 22;

/// Query rows that are answered together: as many as fit the buffer of states, which the next round uses again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Round {
    /// Place of the first item among the words.
    pub(crate) first_item: u32,
    pub(crate) items: u32,
    pub(crate) first_row: u32,
    pub(crate) rows: u32,
    pub(crate) states: u32,
}

/// How a batch is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// Rows of an item: query rows times heads.
    pub(crate) rows: u32,
    /// Positions of a chunk.
    pub(crate) chunk: u32,
    /// States of a round, unless one query row has more.
    pub(crate) states: u64,
    /// States that one buffer holds.
    pub(crate) most_states: u64,
}

/// The words of a plan, in an empty list.
pub(crate) fn words(
    mut words: Vec<u32>,
    problem: &AttentionProblem,
    batch: &BatchLayout,
    cut: Cut,
) -> Result<Vec<u32>, BackendError> {
    let heads = problem.kind.query_heads();
    let too_many = || {
        let Cut { rows, chunk, .. } = cut;
        BackendError::Batch(format!(
            "the batch has more than {MOST_ITEMS} work items of {rows} rows and {chunk} keys: split it"
        ))
    };
    if u64::from(batch.rows()) * u64::from(heads) / u64::from(cut.rows) > MOST_ITEMS {
        return Err(too_many());
    }
    words.extend([cut.rows, batch.rows()]);
    words.resize(HEADER + batch.rows() as usize * 3, 0);
    // Where the round stands that is being filled.
    let mut round = None;
    for sequence in 0..batch.sequences() {
        let (start, queries) = batch.queries(sequence);
        let mut first = 0;
        while first < queries {
            // As many of the sequence's queries as the round has room for.
            let mut room = round.map_or(0, |at: usize| cut.states.saturating_sub(words[at + 3].into()));
            let mut last = first;
            while last < queries {
                let chunks = chunks(problem, batch, sequence, last, cut.chunk);
                let states = u64::from(chunks.1 - chunks.0) * u64::from(heads);
                if states > cut.most_states {
                    return Err(BackendError::Batch(format!(
                        "a query row of sequence {sequence} over {} keys in {heads} heads has {states} partial states, \
                         one buffer holds {}",
                        batch.kv_len[sequence], cut.most_states
                    )));
                }
                if states > room {
                    if last > first {
                        break;
                    }
                    room = cut.states.max(states);
                    round = Some(words.len());
                    words.extend([0, start + first, 0, 0]);
                }
                let Some(at) = round else { break };
                room -= states;
                let fact = HEADER + (start + last) as usize * 3;
                (words[fact], words[fact + 1], words[fact + 2]) = (words[at + 3], chunks.0, chunks.1);
                words[at + 3] += states as u32;
                words[at + 2] = start + last + 1 - words[at + 1];
                last += 1;
            }
            let Some(at) = round else { break };
            words[at] += push(&mut words, problem, batch, (sequence, first, last), cut).ok_or_else(too_many)?;
            first = last;
        }
    }
    Ok(words)
}

/// Adds the items of a sequence's queries `first` to `last - 1` and tells how many; `None` where a plan has no room for
/// them. Those of one chunk follow each other: they read the same part of the cache.
fn push(
    words: &mut Vec<u32>,
    problem: &AttentionProblem,
    batch: &BatchLayout,
    (sequence, first, last): (usize, u32, u32),
    cut: Cut,
) -> Option<u32> {
    let heads = problem.kind.query_heads();
    let before = words.len();
    let (lo, hi) =
        (chunks(problem, batch, sequence, first, cut.chunk).0, chunks(problem, batch, sequence, last - 1, cut.chunk).1);
    for chunk in lo..hi {
        for row in (first * heads..last * heads).step_by(cut.rows as usize) {
            let end = (row + cut.rows).min(last * heads) - 1;
            let seen = (
                chunks(problem, batch, sequence, row / heads, cut.chunk).0,
                chunks(problem, batch, sequence, end / heads, cut.chunk).1,
            );
            if (seen.0..seen.1).contains(&chunk) {
                words.extend([sequence as u32, row, chunk]);
            }
        }
        if (words.len() / ITEM) as u64 > MOST_ITEMS {
            return None;
        }
    }
    Some(((words.len() - before) / ITEM) as u32)
}

/// The rows of an item and the rounds of a plan's words.
pub(crate) fn rounds(words: &[u32]) -> Option<(u32, impl Iterator<Item = Round>)> {
    let [rows, query_rows, ..] = words else { return None };
    let mut at = HEADER + *query_rows as usize * 3;
    let rounds = std::iter::from_fn(move || {
        let [items, first_row, rows, states] = *words.get(at..)?.first_chunk::<ROUND>()?;
        let first_item = (at + ROUND) as u32;
        at += ROUND + items as usize * ITEM;
        Some(Round { first_item, items, first_row, rows, states })
    });
    Some((*rows, rounds))
}

/// First chunk that a query row sees, and the chunk behind the last one. Both never fall from row to row.
pub(crate) fn chunks(
    problem: &AttentionProblem,
    batch: &BatchLayout,
    sequence: usize,
    query: u32,
    chunk: u32,
) -> (u32, u32) {
    let length = batch.kv_len[sequence];
    let position = length - batch.queries(sequence).1 + query;
    let causal = problem.mask != Mask::Tree && batch.is_causal(sequence, problem.mask);
    let (left, right) = problem.window.map_or((None, None), |window| (window.left, window.right));
    let lo = left.map_or(0, |left| position.saturating_sub(left));
    let hi = if causal { position + 1 } else { length };
    let hi = right.map_or(hi, |right| hi.min(position.saturating_add(right).saturating_add(1)));
    (lo / chunk, hi.div_ceil(chunk))
}
