//! Where tokens stand: an index that gives the counts of a suffix tree.

use std::collections::{HashMap, VecDeque};

/// An occurrence: a text, and the place behind its last token there.
pub(crate) type Occurrence = (u64, u32);

/// Texts, and where each token stands in them.
#[derive(Debug, Default)]
pub struct Index {
    texts: VecDeque<Vec<u32>>,
    /// The number of the first text; they are numbered in the order they came.
    first: u64,
    /// Behind which places of which texts a token ends, in order.
    places: HashMap<u32, Vec<Occurrence>>,
}

/// The occurrences of the last tokens of a pattern.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// Tokens.
    pub length: usize,
    /// Where they end.
    pub occurrences: Vec<Occurrence>,
}

impl Index {
    /// An index of one text, empty so far.
    #[must_use]
    pub fn single() -> Self {
        Self { texts: VecDeque::from([Vec::new()]), ..Self::default() }
    }

    /// Adds a text.
    pub fn push(&mut self, text: &[u32]) {
        self.texts.push_back(Vec::new());
        self.extend_last(text);
    }

    /// Continues the last text: it is `text` from now on, whose beginning it was.
    pub fn extend_last(&mut self, text: &[u32]) {
        let number = self.first + self.texts.len() as u64 - 1;
        let Some(last) = self.texts.back_mut() else { return };
        for token in text.get(last.len()..).unwrap_or(&[]) {
            last.push(*token);
            self.places.entry(*token).or_default().push((number, last.len() as u32));
        }
    }

    /// The text added last.
    #[must_use]
    pub fn last_text(&self) -> &[u32] {
        self.texts.back().map_or(&[], Vec::as_slice)
    }

    /// Forgets all texts but the last `count`.
    pub fn keep_last(&mut self, count: usize) {
        while self.texts.len() > count {
            let Some(text) = self.texts.pop_front() else { return };
            self.first += 1;
            for token in text {
                if let Some(places) = self.places.get_mut(&token) {
                    let gone = places.partition_point(|(number, _)| *number < self.first);
                    places.drain(..gone);
                    if places.is_empty() {
                        self.places.remove(&token);
                    }
                }
            }
        }
    }

    /// The token of an occurrence at this distance behind its end: 0 is the next one.
    #[must_use]
    pub fn behind(&self, (text, end): Occurrence, distance: usize) -> Option<u32> {
        self.text(text)?.get(end as usize + distance).copied()
    }

    fn text(&self, number: u64) -> Option<&[u32]> {
        self.texts.get(usize::try_from(number.checked_sub(self.first)?).ok()?).map(Vec::as_slice)
    }

    /// The occurrences of the last 1, 2, … tokens of `text`, as long as there are some.
    pub fn matches<'a>(&'a self, text: &'a [u32]) -> impl Iterator<Item = Pattern> + 'a {
        let last = text.last().and_then(|token| self.places.get(token));
        let first = last.map(|places| Pattern { length: 1, occurrences: places.clone() });
        std::iter::successors(first, move |shorter| {
            let length = shorter.length + 1;
            let wanted = *text.get(text.len().checked_sub(length)?)?;
            let stands = |(number, end): &&Occurrence| {
                let place = (*end as usize).checked_sub(length);
                place.and_then(|place| self.text(*number)?.get(place).copied()) == Some(wanted)
            };
            let occurrences: Vec<_> = shorter.occurrences.iter().filter(stands).copied().collect();
            (!occurrences.is_empty()).then_some(Pattern { length, occurrences })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Index;

    /// Counts are those of a search by definition.
    #[test]
    fn agrees_with_a_search_by_definition() {
        let mut state = 7u32;
        let mut next = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % below
        };
        for _ in 0..100 {
            let texts: Vec<Vec<u32>> = (0..4).map(|_| (0..next(30)).map(|_| next(3)).collect::<Vec<_>>()).collect();
            let mut index = Index::default();
            for text in &texts {
                index.push(&text[..text.len() / 2]);
                index.extend_last(text);
            }
            index.keep_last(3);
            let pattern: Vec<u32> = (0..8).map(|_| next(3)).collect();
            let mut found = index.matches(&pattern);
            for length in 1..=pattern.len() {
                let wanted = &pattern[pattern.len() - length..];
                let count: usize =
                    texts[1..].iter().map(|text| text.windows(length).filter(|window| *window == wanted).count()).sum();
                let got = found.next().map_or(0, |matched| {
                    assert_eq!(matched.length, length);
                    matched.occurrences.len()
                });
                assert_eq!(got, count, "{texts:?} {wanted:?}");
                if count == 0 {
                    break;
                }
            }
        }
    }
}
