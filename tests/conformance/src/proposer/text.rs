//! Texts that a drafter is driven along, with hidden states that are made up.

use super::subject::CONTEXT;

/// Tokens of a page.
pub(super) const PAGE: u32 = 16;

/// Texts that have pages of their own.
pub(super) const TEXTS: u32 = 3;

/// Pages of a text.
pub(super) const TEXT_PAGES: u32 = CONTEXT / PAGE;

/// A text under way: committed tokens, the last of them the anchor.
#[derive(Clone, Debug)]
pub(super) struct Text {
    pub(super) id: u64,
    pub(super) tokens: Vec<u32>,
    pub(super) pages: Vec<i32>,
    /// Of its hidden states.
    seed: u64,
}

impl Text {
    /// A text of `tokens` tokens on the pages of place 0 to 2. Few ids, so that the text repeats itself.
    pub(super) fn new(place: u32, tokens: usize, seed: u64, vocab: u32) -> Self {
        let ids = (0..tokens as u64).map(|place| (10 + mix(seed, place, 1) % 5) as u32 % vocab.max(1)).collect();
        Self { id: u64::from(place), tokens: ids, pages: Vec::new(), seed }.on_pages(place, false)
    }

    /// The same text on other pages; they are never in order.
    pub(super) fn on_pages(mut self, place: u32, reversed: bool) -> Self {
        let first = place % TEXTS * TEXT_PAGES;
        // 7 divides no number of pages of a text.
        let mut pages: Vec<_> = (0..TEXT_PAGES).map(|page| (first + page * 7 % TEXT_PAGES) as i32).collect();
        if reversed {
            pages.reverse();
        }
        self.pages = pages;
        self
    }

    pub(super) fn with_id(mut self, id: u64) -> Self {
        self.id = id;
        self
    }

    /// Leaves it without pages.
    pub(super) fn take_pages(&mut self) {
        self.pages.clear();
    }

    /// The same tokens with other hidden states.
    pub(super) fn with_other_states(mut self) -> Self {
        self.seed = self.seed.wrapping_add(77);
        self
    }

    /// Rows whose hidden states exist: all but the anchor's.
    pub(super) fn rows(&self) -> u32 {
        self.tokens.len() as u32 - 1
    }

    /// A token to go on with that is not `drafted`.
    pub(super) fn other_than(&self, drafted: Option<u32>, vocab: u32) -> u32 {
        let id = (10 + mix(self.seed, self.tokens.len() as u64, 3) % 5) as u32 % vocab.max(1);
        if drafted == Some(id) { (id + 1) % vocab.max(1) } else { id }
    }

    /// The hidden states of the token at `position`: of this text, this place and this token.
    pub(super) fn states(&self, position: u32, token: u32, width: usize) -> impl Iterator<Item = f32> {
        let key = mix(self.seed, u64::from(position), u64::from(token));
        (0..width as u64).map(move |column| unit(mix(key, column, 2)))
    }
}

fn mix(a: u64, b: u64, c: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ c.rotate_left(40);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Committed rows of a text, and rows around them that are nobody's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    pub(super) text: &'a Text,
    /// The first row's position.
    pub(super) from: u32,
    pub(super) rows: u32,
    /// Rows before them in the buffer.
    pub(super) before: u32,
    /// Rejected tokens, whose rows follow.
    pub(super) rejected: &'a [u32],
}

impl<'a> Part<'a> {
    /// All rows of a text.
    pub(super) fn all(text: &'a Text) -> Self {
        Self::of(text, 0, text.rows())
    }

    /// Some rows of a text.
    pub(super) fn of(text: &'a Text, from: u32, rows: u32) -> Self {
        Self { text, from, rows, before: 0, rejected: &[] }
    }
}
