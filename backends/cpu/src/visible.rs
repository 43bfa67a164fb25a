//! Which keys a query row sees, as bits of a tile.

use std::ops::Range;

use polyattn_api::{AttentionProblem, BatchLayout, Mask};

use crate::kernel::TILE;

/// What one query row sees: an interval of positions, and with a tree only some of those from `first` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Visible<'a> {
    /// The row's position.
    pub(crate) position: i64,
    /// Positions it may see.
    pub(crate) keys: (i64, i64),
    /// First position of the queries, and the row's bits over them.
    tree: Option<(i64, &'a [u32])>,
}

impl<'a> Visible<'a> {
    /// What query row `query` of a sequence sees.
    pub(crate) fn new(problem: &AttentionProblem, batch: &'a BatchLayout, sequence: usize, query: u32) -> Self {
        let (start, queries) = batch.queries(sequence);
        let length = i64::from(batch.kv_len[sequence]);
        let first = length - i64::from(queries);
        let position = first + i64::from(query);
        let mut keys = (0, length);
        // A sequence's own causality stands over the problem's mask, a tree's included.
        let tree = match (&batch.causal, problem.mask, &batch.tree) {
            (None, Mask::Tree, Some(tree)) => {
                Some((first, &tree.bits[(start + query) as usize * tree.words..][..tree.words]))
            }
            _ => None,
        };
        if batch.is_causal(sequence, problem.mask) {
            // A span that holds the row opens the keys up to the span's end.
            let open = batch.prefix_spans.iter().filter(|[of, from, to]| {
                *of as usize == sequence && (i64::from(*from)..=i64::from(*to)).contains(&position)
            });
            keys.1 = open.map(|[_, _, to]| i64::from(*to)).fold(position, i64::max) + 1;
        }
        if let Some(window) = problem.window {
            if let Some(left) = window.left {
                keys.0 = keys.0.max(position - i64::from(left));
            }
            if let Some(right) = window.right {
                keys.1 = keys.1.min(position + i64::from(right) + 1);
            }
        }
        Self { position, keys, tree }
    }

    /// The keys it sees among the tile of positions from `base` on, bit by bit.
    pub(crate) fn in_tile(&self, base: i64) -> u64 {
        let mut bits = below(self.keys.1 - base) & !below(self.keys.0 - base);
        if let Some((first, tree)) = self.tree
            && base + TILE as i64 > first
        {
            for at in (first - base).max(0)..TILE as i64 {
                let node = (base + at - first) as usize;
                if tree.get(node / 32).is_none_or(|word| word >> (node % 32) & 1 == 0) {
                    bits &= !(1 << at);
                }
            }
        }
        bits
    }
}

/// The lowest `count` bits.
pub(crate) fn below(count: i64) -> u64 {
    match count {
        ..=0 => 0,
        1..=63 => (1 << count) - 1,
        _ => u64::MAX,
    }
}

/// The first run of set bits; empty if there is none.
pub(crate) fn first_run(bits: u64) -> Range<usize> {
    if bits == 0 {
        return 0..0;
    }
    let start = bits.trailing_zeros();
    let length = (bits >> start).trailing_ones();
    start as usize..(start + length) as usize
}

/// All runs of set bits, in order.
pub(crate) fn runs(mut bits: u64) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        let run = first_run(bits);
        bits &= !below(run.end as i64);
        (!run.is_empty()).then_some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        assert_eq!(runs(0).count(), 0);
        assert_eq!((first_run(u64::MAX), runs(u64::MAX).count()), (0..64, 1));
        assert_eq!(runs(0b1011_0001).collect::<Vec<_>>(), [0..1, 4..6, 7..8]);
        assert_eq!(runs(1 << 63 | 1).collect::<Vec<_>>(), [0..1, 63..64]);
        assert_eq!((below(-3), below(0), below(3), below(64), below(900)), (0, 0, 7, u64::MAX, u64::MAX));
    }
}
