use crate::{AttentionProblem, BackendError, Mask};

/// Which query rows see which, for mask [`Mask::Tree`]: bit j of row i says that query row i sees its sequence's j-th
/// query row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TreeMask {
    /// Words of a row.
    pub words: usize,
    /// `[tokens, words]`, least significant bit first.
    pub bits: Vec<u32>,
}

/// The shapes of one step's batch: host data, checked by [`validate`](Self::validate) before any kernel sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BatchLayout {
    /// `[batch + 1]`: first query row of each sequence, then the number of rows.
    pub query_start: Vec<u32>,
    /// `[batch]`: cached tokens of each sequence, its queries included.
    pub kv_len: Vec<u32>,
    /// `[batch, max_pages]`: physical page of each logical page; −1 where unused.
    pub page_table: Vec<i32>,
    /// Width of `page_table`.
    pub max_pages: usize,
    /// Tokens of a page.
    pub page_size: u32,
    /// Pages of the pool that `page_table` points into.
    pub pool_pages: u32,
    /// `[batch]`: causality of each sequence, over the problem's mask.
    pub causal: Option<Vec<bool>>,
    /// Tree mask, where the problem's mask is a tree.
    pub tree: Option<TreeMask>,
    /// Sequence, first and last key position of spans whose tokens see each other both ways, over a causal mask.
    pub prefix_spans: Vec<[u32; 3]>,
}

impl BatchLayout {
    /// An empty batch over a pool of `pool_pages` pages of `page_size` tokens.
    #[must_use]
    pub fn new(page_size: u32, pool_pages: u32) -> Self {
        Self { query_start: vec![0], page_size, pool_pages, ..Self::default() }
    }

    /// Adds a sequence with `queries` new rows, `kv_len` cached tokens (the queries included) and these pages.
    pub fn push(&mut self, queries: u32, kv_len: u32, pages: &[i32]) {
        if pages.len() > self.max_pages {
            let (old, new) = (self.max_pages, pages.len());
            let mut wider = Vec::with_capacity(new * (self.kv_len.len() + 1));
            for row in 0..self.kv_len.len() {
                wider.extend_from_slice(&self.page_table[row * old..(row + 1) * old]);
                wider.resize((row + 1) * new, -1);
            }
            self.page_table = wider;
            self.max_pages = new;
        }
        self.query_start.push(self.rows() + queries);
        self.kv_len.push(kv_len);
        self.page_table.extend_from_slice(pages);
        self.page_table.resize(self.kv_len.len() * self.max_pages, -1);
    }

    /// Sequences.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.kv_len.len()
    }

    /// Query rows of all sequences.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.query_start.last().copied().unwrap_or(0)
    }

    /// First query row and number of query rows of a sequence.
    #[must_use]
    pub fn queries(&self, sequence: usize) -> (u32, u32) {
        let start = self.query_start[sequence];
        (start, self.query_start[sequence + 1] - start)
    }

    /// The slot (token place in the pool) of a sequence's position. Both must be within a validated layout.
    #[must_use]
    pub fn slot(&self, sequence: usize, position: u32) -> usize {
        let page = self.page_table[sequence * self.max_pages + (position / self.page_size) as usize];
        page as usize * self.page_size as usize + (position % self.page_size) as usize
    }

    /// Whether a sequence is causal under `mask`.
    #[must_use]
    pub fn is_causal(&self, sequence: usize, mask: Mask) -> bool {
        match &self.causal {
            Some(causal) => causal[sequence],
            None => mask == Mask::Causal,
        }
    }

    /// Becomes equal to `other`, in the memory that it has.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        let Self { query_start, kv_len, page_table, max_pages, page_size, pool_pages, causal, tree, prefix_spans } =
            other;
        self.query_start.clone_from(query_start);
        self.kv_len.clone_from(kv_len);
        self.page_table.clone_from(page_table);
        (self.max_pages, self.page_size, self.pool_pages) = (*max_pages, *page_size, *pool_pages);
        self.causal.clone_from(causal);
        match (&mut self.tree, tree) {
            (Some(to), Some(from)) => {
                to.words = from.words;
                to.bits.clone_from(&from.bits);
            }
            (to, from) => to.clone_from(from),
        }
        self.prefix_spans.clone_from(prefix_spans);
    }

    /// Checks everything that a kernel relies on: shapes, lengths, and that every page needed exists.
    ///
    /// # Errors
    /// [`BackendError::Batch`] with the first thing that is wrong.
    pub fn validate(&self, problem: &AttentionProblem) -> Result<(), BackendError> {
        let fail = |message: String| Err(BackendError::Batch(message));
        let batch = self.kv_len.len();
        if self.query_start.len() != batch + 1 {
            return fail(format!(
                "query_start has {} entries, {batch} sequences need {}",
                self.query_start.len(),
                batch + 1
            ));
        }
        if self.query_start[0] != 0 {
            return fail(format!("query_start begins with {}, not 0", self.query_start[0]));
        }
        if self.page_size == 0 || problem.page_size.is_some_and(|size| size != self.page_size) {
            return fail(format!("page size {} where the problem has {:?}", self.page_size, problem.page_size));
        }
        if Some(self.page_table.len()) != batch.checked_mul(self.max_pages) {
            return fail(format!(
                "page_table has {} entries, {batch} sequences of {} pages need {}",
                self.page_table.len(),
                self.max_pages,
                batch.saturating_mul(self.max_pages)
            ));
        }
        for sequence in 0..batch {
            let (start, end) = (self.query_start[sequence], self.query_start[sequence + 1]);
            let length = self.kv_len[sequence];
            if end < start {
                return fail(format!("query_start falls from {start} to {end} at sequence {sequence}"));
            }
            if end - start > length {
                return fail(format!("sequence {sequence} has {} query rows but kv_len {length}", end - start));
            }
            let needed = length.div_ceil(self.page_size) as usize;
            if needed > self.max_pages {
                return fail(format!(
                    "sequence {sequence} has kv_len {length} in pages of {}, that is {needed} pages, page_table has {}",
                    self.page_size, self.max_pages
                ));
            }
            let row = &self.page_table[sequence * self.max_pages..][..needed];
            if let Some(place) =
                row.iter().position(|page| !(0..i64::from(self.pool_pages)).contains(&i64::from(*page)))
            {
                return fail(format!(
                    "page_table[{sequence}][{place}] is {}, the cache has {} pages",
                    row[place], self.pool_pages
                ));
            }
        }
        if u64::from(self.pool_pages) * u64::from(self.page_size) > u64::from(u32::MAX) {
            return fail(format!("{} pages of {} tokens exceed 32 bits", self.pool_pages, self.page_size));
        }
        // Kernels count elements in 32 bits.
        let row =
            u64::from(problem.kind.kv_heads()) * u64::from(problem.kind.query_dim().max(problem.kind.output_dim()));
        let slots = u64::from(self.pool_pages) * u64::from(self.page_size);
        if slots.saturating_mul(row) > 1 << 32 {
            return fail(format!("{slots} tokens of {row} elements in one cache exceed 32 bits"));
        }
        match &self.causal {
            Some(causal) if causal.len() != batch => {
                return fail(format!("causal has {} entries for {batch} sequences", causal.len()));
            }
            Some(_) if !problem.per_sequence_causal => {
                return fail("causal given, but the problem has no per-sequence causality".into());
            }
            None if problem.per_sequence_causal => return fail("per-sequence causality without causal".into()),
            _ => {}
        }
        match &self.tree {
            None if problem.mask == Mask::Tree => return fail("mask tree without a tree mask".into()),
            Some(tree) => {
                let rows = self.rows() as usize;
                if Some(tree.bits.len()) != rows.checked_mul(tree.words) {
                    return fail(format!(
                        "tree_mask has {} words, {rows} rows of {} need {}",
                        tree.bits.len(),
                        tree.words,
                        rows.saturating_mul(tree.words)
                    ));
                }
                let most = (0..batch).map(|sequence| self.queries(sequence).1).max().unwrap_or(0);
                if (tree.words as u64).saturating_mul(32) < u64::from(most) {
                    return fail(format!("tree_mask rows of {} words cannot hold {most} query rows", tree.words));
                }
            }
            None => {}
        }
        if !self.prefix_spans.is_empty() && !problem.prefix_spans {
            return fail("prefix spans given, but the problem has none".into());
        }
        for [sequence, first, last] in &self.prefix_spans {
            let length = self.kv_len.get(*sequence as usize).copied().unwrap_or(0);
            if first > last || *last >= length {
                return fail(format!("prefix span {first}..={last} of sequence {sequence} with kv_len {length}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{BatchLayout, TreeMask};
    use crate::{AttentionKind, AttentionProblem, DType, Mask};

    fn problem() -> AttentionProblem {
        let kind = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 8, value_dim: 8 };
        AttentionProblem::new(kind, DType::F32).page_size(4)
    }

    fn layout() -> BatchLayout {
        let mut layout = BatchLayout::new(4, 8);
        layout.push(2, 5, &[3, 1]);
        layout.push(0, 0, &[]);
        layout.push(1, 9, &[0, 2, 7]);
        layout
    }

    #[test]
    fn widens_the_page_table() {
        let layout = layout();
        assert_eq!(layout.page_table, [3, 1, -1, -1, -1, -1, 0, 2, 7]);
        assert_eq!(layout.slot(2, 8), 28);
        layout.validate(&problem()).expect("valid");
    }

    #[test]
    fn names_what_is_wrong() {
        type Break = fn(&mut BatchLayout);
        let cases: [(Break, &str); 9] = [
            (|l| l.page_table[0] = 8, "page_table[0][0] is 8, the cache has 8 pages"),
            (|l| l.page_table[1] = -1, "page_table[0][1] is -1"),
            (|l| l.kv_len[0] = 1, "sequence 0 has 2 query rows but kv_len 1"),
            (|l| l.kv_len[2] = 13, "that is 4 pages, page_table has 3"),
            (|l| l.query_start[1] = 4, "query_start falls"),
            (|l| l.page_size = 16, "page size 16"),
            (|l| l.max_pages = usize::MAX, "page_table has 9 entries, 3 sequences of"),
            (|l| l.causal = Some(vec![true; 3]), "no per-sequence causality"),
            (|l| l.query_start.push(9), "query_start has 5 entries"),
        ];
        for (change, expected) in cases {
            let mut layout = layout();
            change(&mut layout);
            let error = layout.validate(&problem()).expect_err("refused").to_string();
            assert!(error.contains(expected), "{error}");
        }
        let tree = problem().mask(Mask::Tree);
        assert!(layout().validate(&tree).is_err());
        let short = BatchLayout { tree: Some(TreeMask { words: 1, bits: vec![0; 2] }), ..layout() };
        assert!(short.validate(&tree).expect_err("refused").to_string().contains("tree_mask has 2 words"));
    }
}
