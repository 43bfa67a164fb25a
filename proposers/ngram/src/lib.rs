//! Prompt lookup: drafts what followed the last time the text ended like this.
//!
//! Input are all committed tokens. The longest suffix of [`MIN_MATCH`] to [`MAX_MATCH`] tokens that also occurs earlier
//! is looked up (the occurrence may overlap the suffix); among occurrences of that length the **most recent** one is
//! taken, and the tokens behind it are the draft. No occurrence, no draft. It needs no model and no GPU, and pays
//! where a text repeats itself or its prompt: code, summaries, edits.
//!
//! Source: "Prompt Lookup Decoding" (A. Saxena, 2023); vLLM's n-gram proposer.

#![forbid(unsafe_code)]

use polyattn_api::{
    Drafter, LoadContext, Outcome, Proposal, ProposeContext, Proposer, ProposerError, ProposerRequirements, TapSpec,
    register_proposer,
};

/// Tokens of the shortest suffix that counts as a match.
pub const MIN_MATCH: usize = 2;

/// Tokens of the longest suffix that is looked up.
pub const MAX_MATCH: usize = 5;

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
        const NEEDS: ProposerRequirements = ProposerRequirements::none();
        &NEEDS
    }

    fn load(&self, _context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(Lookup::default()))
    }
}

/// The drafter; it keeps nothing between steps.
#[derive(Debug, Default)]
struct Lookup {
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

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        let drafts = context.sequences.iter().map(|sequence| draft(sequence.tokens, sequence.width as usize).to_vec());
        Ok(Proposal::Host(drafts.collect()))
    }

    fn commit(&mut self, _outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        Ok(())
    }
}

/// The up to `most` tokens behind the most recent earlier occurrence of the longest matching suffix of `tokens`.
#[must_use]
pub fn draft(tokens: &[u32], most: usize) -> &[u32] {
    let mut longest = MIN_MATCH - 1;
    let mut draft: &[u32] = &[];
    // An occurrence that ends before `end`; the suffix itself ends with the text.
    for end in (1..tokens.len()).rev() {
        let length =
            tokens[..end].iter().rev().zip(tokens.iter().rev()).take(MAX_MATCH).take_while(|(a, b)| a == b).count();
        if length > longest {
            longest = length;
            draft = &tokens[end..tokens.len().min(end + most)];
            if length == MAX_MATCH {
                break;
            }
        }
    }
    draft
}

#[cfg(test)]
mod tests {
    use polyattn_api::Registry;

    use super::draft;

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
            let expected = (super::MIN_MATCH..=super::MAX_MATCH.min(n))
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
