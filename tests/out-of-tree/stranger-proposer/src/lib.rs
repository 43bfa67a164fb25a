//! Drafts by counts of token pairs: behind a token comes what came behind it most often so far, the latest of equals.
//!
//! It keeps nothing between steps and needs no model.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use polyattn_api::{
    Drafter, LoadContext, Outcome, Proposal, ProposeContext, Proposer, ProposerError, ProposerRequirements, TapSpec,
    register_proposer,
};

const MAX_TOKENS: u32 = 8;

/// The descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bigram;

register_proposer!(Bigram);

impl Proposer for Bigram {
    fn name(&self) -> &'static str {
        "bigram"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none();
        &NEEDS
    }

    fn load(&self, _context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(Counting::default()))
    }
}

#[derive(Debug, Default)]
struct Counting {
    taps: TapSpec,
}

impl Drafter for Counting {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        MAX_TOKENS
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        let drafts = context
            .sequences
            .iter()
            .map(|sequence| draft(sequence.tokens, sequence.width.min(MAX_TOKENS) as usize).into());
        Ok(Proposal::Host(drafts.collect()))
    }

    fn commit(&mut self, _outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        Ok(())
    }
}

/// Up to `most` tokens behind `tokens`; fewer where a token has been followed by none.
#[must_use]
pub fn draft(tokens: &[u32], most: usize) -> Vec<u32> {
    // How often a pair occurred, and where last.
    let mut pairs: HashMap<(u32, u32), (usize, usize)> = HashMap::new();
    // For each token the pair that counts most.
    let mut best: HashMap<u32, (usize, usize, u32)> = HashMap::new();
    for (place, pair) in tokens.windows(2).enumerate() {
        let seen = pairs.entry((pair[0], pair[1])).or_default();
        *seen = (seen.0 + 1, place);
        let candidate = (seen.0, seen.1, pair[1]);
        let most_frequent = best.entry(pair[0]).or_insert(candidate);
        *most_frequent = candidate.max(*most_frequent);
    }
    let next = |token: &u32| best.get(token).map(|(_, _, next)| *next);
    std::iter::successors(tokens.last().and_then(next), next).take(most).collect()
}

#[cfg(test)]
mod tests {
    use super::draft;

    #[test]
    fn known_answers() {
        assert_eq!(draft(&[1, 2, 1, 2, 1, 3, 1], 3), [2, 1, 2]);
        assert_eq!(draft(&[1, 2, 1, 3, 1], 1), [3]);
        assert!(draft(&[1, 2, 3], 4).is_empty());
        assert!(draft(&[], 4).is_empty());
        assert_eq!(draft(&[5, 5], 2), [5, 5]);
    }
}
