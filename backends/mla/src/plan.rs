//! A batch cut into work items: the host's part of a step.

use polyattn_api::{AttentionProblem, BackendError, BatchLayout, Mask};

/// Begins the words of a plan, so that a plan of another backend is not taken for one of these.
pub(crate) const TAG: u32 = 0x6d6c_6174;

/// Words of the header: tag, rows of an item, heads, number of rounds.
pub(crate) const HEADER: usize = 4;

/// Words of a round: first item, items, first query row, query rows, states.
pub(crate) const ROUND: usize = 5;

/// Work items that a plan may have.
const MOST_ITEMS: u64 = 1 << 22;

/// Query rows that are answered together: as many as fit the buffer of states, which the next round uses again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// The words of a plan: header, rounds, three facts of each query row (first state, first chunk, chunk behind the
/// last), and items (sequence, first row, chunk).
pub(crate) fn words(problem: &AttentionProblem, batch: &BatchLayout, cut: Cut) -> Result<Vec<u32>, BackendError> {
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
    let mut rounds: Vec<Round> = Vec::new();
    let mut facts: Vec<u32> = Vec::with_capacity(batch.rows() as usize * 3);
    let mut items: Vec<u32> = Vec::new();
    for sequence in 0..batch.sequences() {
        let (start, queries) = batch.queries(sequence);
        let mut first = 0;
        while first < queries {
            // As many of the sequence's queries as the round has room for.
            let mut room = rounds.last().map_or(0, |round| cut.states.saturating_sub(round.states.into()));
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
                    let first_row = start + first;
                    rounds.push(Round { first_item: items.len() as u32, first_row, ..Round::default() });
                }
                let Some(round) = rounds.last_mut() else { break };
                room -= states;
                facts.extend([round.states, chunks.0, chunks.1]);
                round.states += states as u32;
                round.rows = start + last + 1 - round.first_row;
                last += 1;
            }
            let Some(round) = rounds.last_mut() else { break };
            round.items += push(&mut items, problem, batch, (sequence, first, last), cut).ok_or_else(too_many)?;
            first = last;
        }
    }
    let behind = HEADER + rounds.len() * ROUND + facts.len();
    let mut words = Vec::with_capacity(behind + items.len());
    words.extend([TAG, cut.rows, heads, rounds.len() as u32]);
    for round in &rounds {
        words.extend([round.first_item + behind as u32, round.items, round.first_row, round.rows, round.states]);
    }
    words.extend(facts);
    words.extend(items);
    Ok(words)
}

/// Adds the items of a sequence's queries `first` to `last - 1` and tells how many; `None` where a plan has no room for
/// them. Those of one chunk follow each other: they read the same part of the cache.
fn push(
    items: &mut Vec<u32>,
    problem: &AttentionProblem,
    batch: &BatchLayout,
    (sequence, first, last): (usize, u32, u32),
    cut: Cut,
) -> Option<u32> {
    let heads = problem.kind.query_heads();
    let before = items.len();
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
                items.extend([sequence as u32, row, chunk]);
            }
        }
        if items.len() as u64 / 3 > MOST_ITEMS {
            return None;
        }
    }
    Some(((items.len() - before) / 3) as u32)
}

/// The rounds of a plan, with the rows of its items and the place of the facts among its words; `None` for the plan of
/// another kernel.
pub(crate) fn rounds(words: &[u32], heads: u32) -> Option<(u32, u32, impl Iterator<Item = Round>)> {
    let [TAG, rows, of, count, rest @ ..] = words else { return None };
    let rounds = rest.get(..*count as usize * ROUND)?;
    let facts = (HEADER + rounds.len()) as u32;
    let rounds = rounds.chunks_exact(ROUND).map(|round| Round {
        first_item: round[0],
        items: round[1],
        first_row: round[2],
        rows: round[3],
        states: round[4],
    });
    (*of == heads).then_some((*rows, facts, rounds))
}

/// First chunk that a query row sees, and the chunk behind the last one. Both never fall from row to row.
fn chunks(problem: &AttentionProblem, batch: &BatchLayout, sequence: usize, query: u32, chunk: u32) -> (u32, u32) {
    let length = batch.kv_len[sequence];
    let position = length - batch.queries(sequence).1 + query;
    let causal = problem.mask != Mask::Tree && batch.is_causal(sequence, problem.mask);
    let (left, right) = problem.window.map_or((None, None), |window| (window.left, window.right));
    let lo = left.map_or(0, |left| position.saturating_sub(left));
    let hi = if causal { position + 1 } else { length };
    let hi = right.map_or(hi, |right| hi.min(position.saturating_add(right).saturating_add(1)));
    (lo / chunk, hi.div_ceil(chunk))
}
