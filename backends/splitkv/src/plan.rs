//! A batch cut into work items: the host's part of a step.

use polyattn_api::{AttentionProblem, BackendError, BatchLayout};

use crate::shader::Variant;

/// Words of the header: tiles of an item, chunks of a state, sequences. Three facts of each sequence follow (first state,
/// first chunk, chunk behind the last), then the rounds, each before its items.
pub(crate) const HEADER: usize = 3;

/// Words of a round: items, first row, rows, states.
pub(crate) const ROUND: usize = 4;

/// Words of a work item: sequence, first row, first chunk, chunk behind the last.
pub(crate) const ITEM: usize = 4;

/// Chunks of a span, which begins at a multiple of it. The chunks of a span are merged with each other before the spans
/// are: by their item, where it has them all, so that a state stands for the span.
pub(crate) const SPAN: u32 = 4;

/// Work items that a plan may have.
const MOST_ITEMS: u64 = 1 << 22;

/// Sequences that are answered together: as many as fit the buffer of states, which the next round uses again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Round {
    /// Place of the first item among the words.
    pub(crate) first_item: u32,
    pub(crate) items: u32,
    pub(crate) first_row: u32,
    pub(crate) rows: u32,
    pub(crate) states: u32,
}

/// The words of a plan for items of a variant's tiles and `run` chunks, one or whole spans, with at most `most_states`
/// states a round, in an empty list.
pub(crate) fn words(
    mut words: Vec<u32>,
    problem: &AttentionProblem,
    batch: &BatchLayout,
    variant: Variant,
    run: u32,
    most_states: u64,
) -> Result<Vec<u32>, BackendError> {
    let (rows, chunk_keys) = (variant.rows(), variant.chunk());
    let heads = problem.kind.query_heads();
    let group = heads / problem.kind.kv_heads();
    let sequences = batch.sequences();
    // Chunks of a state.
    let per = if run < SPAN { 1 } else { SPAN };
    words.extend([variant.tiles, per, sequences as u32]);
    words.resize(HEADER + sequences * 3, 0);
    let mut items = 0;
    // Where the round stands that is being filled.
    let mut round = None;
    for sequence in 0..sequences {
        let (start, queries) = batch.queries(sequence);
        if queries == 0 {
            continue;
        }
        let chunks = chunks(problem, batch, sequence, chunk_keys);
        // Runs begin where spans do, but for the first one of a sequence with a window.
        let begin = chunks.0 / per * per;
        let rows_of = u64::from(queries) * u64::from(group);
        items += rows_of.div_ceil(u64::from(rows)) * u64::from((chunks.1 - begin).div_ceil(run));
        if items > MOST_ITEMS {
            return Err(BackendError::Batch(format!(
                "the batch has more than {MOST_ITEMS} work items of {rows} rows and {} keys: split it",
                run * chunk_keys
            )));
        }
        // A single chunk's state is the answer already, and goes nowhere else.
        let kept = if variant.direct && chunks.1 - chunks.0 == 1 { 0 } else { chunks.1.div_ceil(per) - chunks.0 / per };
        let states = u64::from(kept) * u64::from(queries) * u64::from(heads);
        if states > most_states {
            return Err(BackendError::Batch(format!(
                "sequence {sequence} with {queries} query rows over {} keys has {states} partial states, one buffer \
                 holds {most_states}",
                batch.kv_len[sequence]
            )));
        }
        let at = match round {
            Some(at) if u64::from(words[at + 3]) + states <= most_states => at,
            _ => {
                let at = words.len();
                words.extend([0, start, 0, 0]);
                round = Some(at);
                at
            }
        };
        let fact = HEADER + sequence * 3;
        (words[fact], words[fact + 1], words[fact + 2]) = (words[at + 3], chunks.0, chunks.1);
        words[at + 2] = start + queries - words[at + 1];
        words[at + 3] += states as u32;
        for first in (0..queries * group).step_by(rows as usize) {
            // A chunk that none of the item's rows sees is written too: merging reads all of a sequence's.
            for start in (begin..chunks.1).step_by(run as usize) {
                words.extend([sequence as u32, first, start.max(chunks.0), chunks.1.min(start + run)]);
                words[at] += 1;
            }
        }
    }
    Ok(words)
}

/// The tiles of an item, the chunks of a state and the rounds of a plan's words.
pub(crate) fn rounds(words: &[u32]) -> Option<(u32, u32, impl Iterator<Item = Round>)> {
    let [tiles, per, sequences, ..] = words else { return None };
    let mut at = HEADER + *sequences as usize * 3;
    let rounds = std::iter::from_fn(move || {
        let [items, first_row, rows, states] = *words.get(at..)?.first_chunk::<ROUND>()?;
        let first_item = (at + ROUND) as u32;
        at += ROUND + items as usize * ITEM;
        Some(Round { first_item, items, first_row, rows, states })
    });
    Some((*tiles, *per, rounds))
}

/// First chunk that a sequence's rows see, and the chunk behind the last one.
pub(crate) fn chunks(problem: &AttentionProblem, batch: &BatchLayout, sequence: usize, chunk: u32) -> (u32, u32) {
    let (length, queries) = (batch.kv_len[sequence], batch.queries(sequence).1);
    if queries == 0 {
        return (0, 0);
    }
    // The first row sees least to the right and most to the left; the last one sees the last key at least.
    let left = problem.window.and_then(|window| window.left);
    let lo = left.map_or(0, |left| (length - queries).saturating_sub(left));
    (lo / chunk, length.div_ceil(chunk))
}
