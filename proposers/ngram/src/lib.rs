//! Prompt lookup: drafts what followed the last time the text ended like this.
//!
//! Input are all committed tokens. The longest suffix of `min_match` to `max_match` tokens ([`Settings`], read from
//! `speculative.parameters`) that also occurs earlier is looked up (the occurrence may overlap the suffix); among occurrences of that length the **most recent** one is
//! taken, and the tokens behind it are the draft. No occurrence, no draft. It needs no model and no GPU, and pays
//! where a text repeats itself or its prompt: code, summaries, edits.
//!
//! Source: "Prompt Lookup Decoding" (A. Saxena, 2023); vLLM's n-gram proposer.

#![forbid(unsafe_code)]

use polyattn_api::{
    Draft, Drafter, LoadContext, Outcome, PrefixReuse, Proposal, ProposeContext, Proposer, ProposerError,
    ProposerRequirements, TapSpec, register_proposer,
};
use serde::Deserialize;

const MAX_TOKENS: u32 = 32;
const DEFAULT_TOKENS: u32 = 8;

/// The descriptor of prompt lookup.
#[derive(Debug, Default)]
pub struct NGram;

register_proposer!(NGram);

impl Proposer for NGram {
    fn name(&self) -> &'static str {
        "ngram"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none().drafts_trees();
        &NEEDS
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        let settings: Settings = context.settings(self.name())?;
        let Settings { min_match, max_match } = settings;
        if min_match == 0 || min_match > max_match {
            return Err(ProposerError::Unsupported(format!(
                "speculative.parameters of 'ngram': min_match is {min_match} and max_match is {max_match}, at least 1 \
                 and no smaller than that"
            )));
        }
        Ok(Box::new(Lookup { settings, taps: TapSpec::default() }))
    }
}

/// Which suffixes count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Tokens of the shortest suffix that counts as a match.
    pub min_match: usize,
    /// Tokens of the longest suffix that is looked up.
    pub max_match: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { min_match: 2, max_match: 5 }
    }
}

/// The drafter; it keeps nothing between steps.
#[derive(Debug)]
struct Lookup {
    settings: Settings,
    taps: TapSpec,
}

impl Drafter for Lookup {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        MAX_TOKENS
    }

    fn default_tokens(&self) -> u32 {
        DEFAULT_TOKENS
    }

    fn reuse(&self) -> PrefixReuse {
        PrefixReuse::Pages
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        let drafts = context.sequences.iter().map(|sequence| {
            let most = sequence.width as usize;
            match context.tree {
                None => self.settings.draft(sequence.tokens, most).to_vec().into(),
                Some(tree) => self.settings.draft_tree(sequence.tokens, most, tree.nodes as usize),
            }
        });
        Ok(Proposal::Host(drafts.collect()))
    }

    fn commit(&mut self, _outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        Ok(())
    }
}

impl Settings {
    /// The up to `most` tokens behind the most recent earlier occurrence of the longest matching suffix of `tokens`.
    #[must_use]
    pub fn draft(self, tokens: &[u32], most: usize) -> &[u32] {
        let mut longest = self.min_match.saturating_sub(1);
        let mut draft: &[u32] = &[];
        // An occurrence that ends before `end`; the suffix itself ends with the text.
        for end in (1..tokens.len()).rev() {
            let length = self.matched(tokens, end);
            if length > longest {
                longest = length;
                draft = &tokens[end..tokens.len().min(end + most)];
                if length == self.max_match {
                    break;
                }
            }
        }
        draft
    }

    /// How many of the last tokens stand before `end` too, up to the longest match.
    fn matched(self, tokens: &[u32], end: usize) -> usize {
        let before = tokens[..end].iter().rev().zip(tokens.iter().rev());
        before.take(self.max_match).take_while(|(a, b)| a == b).count()
    }

    /// The tree of what stood behind every earlier occurrence of the longest matching suffix, `most` tokens each: the most
    /// recent occurrence first, until the tree has `nodes` nodes. Its first path is the [`draft`](Self::draft).
    #[must_use]
    pub fn draft_tree(self, tokens: &[u32], most: usize, nodes: usize) -> Draft {
        let mut tree = Draft::default();
        let mut longest = 0;
        // Ends of the occurrences, the most recent first.
        let mut ends: Vec<usize> = Vec::new();
        for end in (1..tokens.len()).rev() {
            let length = self.matched(tokens, end);
            if length < self.min_match.max(longest) {
                continue;
            }
            if length > longest {
                ends.clear();
            }
            longest = length;
            ends.push(end);
        }
        for end in ends {
            let mut at = None;
            for token in &tokens[end..tokens.len().min(end + most)] {
                let known = tree.children(at).find(|child| tree.tokens[*child as usize] == *token);
                at = match known {
                    Some(child) => Some(child),
                    None if tree.len() < nodes => {
                        tree.tokens.push(*token);
                        tree.parents.push(at);
                        Some(tree.len() as u32 - 1)
                    }
                    None => break,
                };
            }
        }
        tree
    }
}

#[cfg(test)]
mod tests {
    use polyattn_api::Registry;

    use super::Settings;

    fn draft(tokens: &[u32], most: usize) -> &[u32] {
        Settings::default().draft(tokens, most)
    }

    #[test]
    fn a_tree_joins_the_occurrences() {
        // [1, 2] was followed by [3, 4], then by [3, 5], then by [6, 1].
        let text = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 6, 1, 2];
        let tree = Settings::default().draft_tree(&text, 2, 8);
        assert_eq!(tree.tokens, [6, 1, 3, 5, 4]);
        assert_eq!(tree.parents, [None, Some(0), None, Some(2), Some(2)]);
        assert_eq!(Settings::default().draft_tree(&text, 2, 3).tokens, [6, 1, 3]);
        assert_eq!(Settings::default().draft_tree(&text, 2, 2).tokens, draft(&text, 2));
        assert!(Settings::default().draft_tree(&[1, 2, 3], 4, 8).is_empty());
        assert!(
            Settings::default().draft_tree(&[], 4, 8).is_empty()
                && Settings::default().draft_tree(&text, 0, 8).is_empty()
        );
    }

    #[test]
    fn known_answers() {
        // The longest match wins over a more recent shorter one.
        assert_eq!(draft(&[1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3], 2), [9, 8]);
        // Among equally long ones the most recent.
        assert_eq!(draft(&[5, 6, 1, 5, 6, 2, 5, 6], 3), [2, 5, 6]);
        // One token is no match; nothing to match against is none either.
        assert_eq!(draft(&[4, 1, 4], 3), [0_u32; 0]);
        assert_eq!(draft(&[1, 2], 3), [0_u32; 0]);
        assert_eq!(draft(&[], 3), [0_u32; 0]);
        // An occurrence may overlap the suffix.
        assert_eq!(draft(&[7, 7, 7, 7], 3), [7]);
        // The draft ends with the text.
        assert_eq!(draft(&[1, 2, 3, 1, 2], 8), [3, 1, 2]);
        assert_eq!(draft(&[1, 2, 3, 1, 2], 0), [0_u32; 0]);
    }

    #[test]
    fn settings_bound_the_match() {
        let text = [4, 8, 4, 9, 5, 4, 9, 4];
        // One token is enough, or two, or nothing but three.
        let with = |min_match, max_match| Settings { min_match, max_match }.draft(&text, 1);
        assert_eq!((with(1, 1), with(1, 5), with(3, 3)), (&[9][..], &[9][..], &[][..]));
        assert_eq!(Settings { min_match: 1, max_match: 2 }.draft(&[9, 4, 8, 2, 4, 7, 9, 4], 1), [8]);
    }

    #[test]
    fn agrees_with_a_search_by_definition() {
        let mut state = 1u32;
        for round in 0..300 {
            let text: Vec<u32> = (0..round % 40)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    state >> 30
                })
                .collect();
            let n = text.len();
            let expected = (2..=5.min(n))
                .rev()
                .find_map(|m| (m..n).rev().find(|end| text[end - m..*end] == text[n - m..]))
                .map_or(&[][..], |end| &text[end..n.min(end + 4)]);
            assert_eq!(draft(&text, 4), expected, "{text:?}");
        }
    }

    #[test]
    fn registers_itself() {
        let registry = Registry::builder().proposer(polyattn_api::proposer_entry!(super::NGram)).build().unwrap();
        let entry = registry.proposer("NGRAM").unwrap();
        assert!(!entry.proposer.requirements().non_causal && !entry.proposer.requirements().draft_attention);
    }
}
