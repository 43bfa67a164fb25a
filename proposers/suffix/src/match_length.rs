//! Which match to draft from, and how far.

use polyattn_api::{Candidate, Draft, TreeWish};

use crate::index::{Index, Occurrence};

/// How long drafts become.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of pattern and draft together.
    pub depth: usize,
    /// Drafted tokens for each token of the pattern.
    pub factor: f64,
    /// Drafted tokens beyond that.
    pub offset: f64,
    /// A draft ends where it is less likely than this.
    pub least: f64,
    /// Drafted tokens at the most.
    pub most: usize,
}

impl Limits {
    /// Drafted tokens behind a match of `length` tokens at the most.
    fn tokens(&self, length: usize) -> usize {
        let wanted = (length as f64 * self.factor + self.offset + 1e-6).floor().max(0.0);
        // A float beyond the range of an integer is cut to it.
        (wanted as usize).min(self.most).min(self.depth.saturating_sub(length))
    }
}

/// A chain and how likely it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Each token's share of the continuations where the one before stands.
    pub shares: Vec<f64>,
    /// The sum of the probabilities of its prefixes: tokens that stand, to be expected.
    pub score: f64,
    /// Tokens of the match it follows.
    pub length: usize,
}

impl From<Scored> for Draft {
    fn from(chain: Scored) -> Self {
        let mut draft = Self::from(chain.tokens);
        draft.confidence = chain.shares;
        draft
    }
}

/// The best chain behind the end of `text`: the one of the highest score, of equal ones that of the longest match. Its
/// pattern stays shorter than `text`, which is at least one token.
#[must_use]
pub fn best_path(index: &Index, text: &[u32], limits: &Limits) -> Scored {
    let mut best = Scored::default();
    for matched in index.matches(text).take_while(|matched| matched.length < text.len().max(2)) {
        if matched.occurrences.len() == 1 && index.behind(matched.occurrences[0], 0).is_none() {
            // The end of the text itself; longer matches are too.
            break;
        }
        let chain = path(index, &matched.occurrences, matched.length, limits);
        if chain.score >= best.score {
            best = chain;
        }
    }
    best
}

fn path(index: &Index, occurrences: &[Occurrence], length: usize, limits: &Limits) -> Scored {
    let mut chain = Scored { length, ..Scored::default() };
    let mut probability = 1.0;
    let mut here = occurrences.to_vec();
    while chain.tokens.len() < limits.tokens(length) {
        let continued = continuations(index, &here, chain.tokens.len());
        let Some(Continuation { token, share, .. }) = continued.into_iter().next() else { break };
        probability *= share;
        if probability < limits.least {
            break;
        }
        here.retain(|one| index.behind(*one, chain.tokens.len()) == Some(token));
        chain.tokens.push(token);
        chain.shares.push(share);
        chain.score += probability;
    }
    chain
}

struct Continuation {
    token: u32,
    /// Its share of the occurrences.
    share: f64,
    /// The last of them.
    latest: Occurrence,
}

/// The tokens at `distance` behind the occurrences, the most frequent first, of equal ones the one seen last.
fn continuations(index: &Index, occurrences: &[Occurrence], distance: usize) -> Vec<Continuation> {
    let mut found: Vec<(u32, Occurrence)> =
        occurrences.iter().filter_map(|one| Some((index.behind(*one, distance)?, *one))).collect();
    found.sort_unstable();
    let mut all: Vec<Continuation> = found
        .chunk_by(|a, b| a.0 == b.0)
        .map(|same| Continuation {
            token: same[0].0,
            share: same.len() as f64 / occurrences.len() as f64,
            latest: same[same.len() - 1].1,
        })
        .collect();
    all.sort_by(|a, b| b.share.total_cmp(&a.share).then(b.latest.cmp(&a.latest)));
    all
}

/// The tree behind the match that `best` follows, by the builder that is wished for.
pub(crate) fn tree(index: &Index, text: &[u32], best: &Scored, limits: &Limits, wish: &TreeWish<'_>) -> Draft {
    let Some(matched) = index.matches(text).nth(best.length.saturating_sub(1)) else { return Draft::default() };
    let mut growth = wish.builder.grow(wish.nodes, limits.tokens(best.length) as u32);
    loop {
        let frontier = growth.frontier();
        if frontier.is_empty() {
            return growth.finish();
        }
        let so_far = growth.so_far();
        let candidates: Vec<Vec<Candidate>> = frontier
            .iter()
            .map(|node| {
                let path: Vec<u32> = node.map_or_else(Vec::new, |node| {
                    so_far.path(node).into_iter().map(|node| so_far.tokens[node as usize]).collect()
                });
                let follows = |one: &&Occurrence| (0..).zip(&path).all(|(at, id)| index.behind(**one, at) == Some(*id));
                let here: Vec<Occurrence> = matched.occurrences.iter().filter(follows).copied().collect();
                let probability = here.len() as f64 / matched.occurrences.len() as f64;
                continuations(index, &here, path.len())
                    .into_iter()
                    .take(wish.candidates as usize)
                    .filter(|one| probability * one.share >= limits.least)
                    .map(|one| Candidate { id: one.token, log_probability: one.share.ln() })
                    .collect()
            })
            .collect();
        growth.expand(&candidates.iter().map(Vec::as_slice).collect::<Vec<_>>());
    }
}

#[cfg(test)]
mod tests {
    use polyattn_api::{BestFirst, TreeWish};

    use super::{Limits, best_path, tree};
    use crate::index::Index;

    const LIMITS: Limits = Limits { depth: 24, factor: 1.0, offset: 0.0, least: 0.1, most: 8 };

    fn index(text: &[u32]) -> Index {
        let mut index = Index::single();
        index.extend_last(text);
        index
    }

    #[test]
    fn probabilities_are_shares_of_occurrences() {
        // "1 2" stands three times: before 9, before 8, and at the end.
        let text = [1, 2, 9, 1, 2, 8, 8, 1, 2];
        let chain = best_path(&index(&text), &text, &LIMITS);
        // One token behind "2", 1/3 likely; two behind "1 2": 8 (seen last), then 8, each 1/3 likely.
        assert_eq!((chain.length, chain.tokens, chain.shares), (2, vec![8, 8], vec![1.0 / 3.0, 1.0]));
        assert!((chain.score - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn a_pattern_is_shorter_than_the_text() {
        let text = [4, 4, 4];
        let chain = best_path(&index(&text), &text, &LIMITS);
        // "4" three times, 2/3 of them before another; "4 4" twice, once before another.
        assert_eq!((chain.length, chain.tokens.len()), (1, 1));
        assert!((chain.score - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn drafts_end_where_they_become_unlikely() {
        // Behind "7": ten different tokens and the end, 1/11 each.
        let text: Vec<u32> = (100..110).flat_map(|id| [7, id]).chain([7]).collect();
        assert!(best_path(&index(&text), &text, &LIMITS).tokens.is_empty());
        let chain = best_path(&index(&text), &text, &Limits { least: 0.05, ..LIMITS });
        assert_eq!(chain.tokens, [109]);
    }

    #[test]
    fn a_tree_holds_what_may_follow() {
        let text = [1, 2, 9, 5, 1, 2, 8, 6, 1, 2, 8, 6, 1, 2];
        let found = index(&text);
        let best = best_path(&found, &text, &LIMITS);
        assert_eq!(best.tokens[..2], [8, 6]);
        let wish = TreeWish { builder: &BestFirst, nodes: 3, candidates: 4 };
        let draft = tree(&found, &text, &best, &Limits { factor: 2.0, ..LIMITS }, &wish);
        // Three occurrences go on and one is the end: 8 and 6 behind it are 1/2 likely, 9 is 1/4.
        assert!(draft.fault().is_none());
        assert_eq!(draft.len(), 3);
        assert_eq!(draft.tokens[..2], [8, 6]);
        assert_eq!(draft.parents[1], Some(0));
    }
}
