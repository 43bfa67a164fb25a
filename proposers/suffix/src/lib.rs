//! Suffix decoding: drafts what followed the end of the text before, in this text and in outputs of earlier requests, as
//! far as it is likely to follow again.
//!
//! The last m tokens of the text are looked up for m = 1, 2, …, as long as they occurred before. From each m a draft
//! follows the most frequent continuation; its probability falls by (occurrences of the continuation) ÷ (occurrences of
//! what stands before it), and it ends below `min_token_prob` or at `m · max_spec_factor + max_spec_offset` tokens. The
//! draft whose probabilities have the highest sum is taken, of equal ones that of the longer m. A request's own text is
//! asked first; outputs of finished requests win with a strictly higher sum. So drafts are long where the text repeats
//! itself, and there is none where it does not. Where trees are wanted, the tree builder is given the continuations with
//! their shares of the occurrences.
//!
//! The running suffix is an occurrence of itself, of which nothing follows: one earlier occurrence gives probability ½.
//!
//! Source: "SuffixDecoding" (arXiv 2411.04975). In place of suffix trees an index of positions gives the same counts:
//! its memory is that of the texts.

#![forbid(unsafe_code)]

mod index;
mod match_length;

use std::collections::HashMap;

use polyattn_api::{
    Draft, Drafter, LoadContext, Outcome, PrefixReuse, Proposal, ProposeContext, Proposer, ProposerError,
    ProposerRequirements, TapSpec, register_proposer,
};
use serde::Deserialize;

pub use index::{Index, Pattern};
pub use match_length::{Limits, Scored, best_path};

const MAX_TOKENS: u32 = 32;
const DEFAULT_TOKENS: u32 = 16;

/// The descriptor of suffix decoding.
#[derive(Debug, Default)]
pub struct Suffix;

register_proposer!(Suffix);

impl Proposer for Suffix {
    fn name(&self) -> &'static str {
        "suffix"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none().drafts_trees().remembers_requests();
        &NEEDS
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        let settings: Settings = context.settings(self.name())?;
        settings.check()?;
        Ok(Box::new(SuffixDrafter::new(settings)))
    }
}

/// The parameters of suffix decoding, read from `speculative.parameters`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Tokens that a pattern and its continuation have together, at the most.
    pub max_depth: usize,
    /// Drafted tokens for each token of the pattern.
    pub max_spec_factor: f64,
    /// Drafted tokens beyond that.
    pub max_spec_offset: f64,
    /// A draft ends where it is less likely than this.
    pub min_token_prob: f64,
    /// Outputs of finished requests that are kept, the oldest forgotten first.
    pub max_cached_requests: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_depth: 24,
            max_spec_factor: 1.0,
            max_spec_offset: 0.0,
            min_token_prob: 0.1,
            max_cached_requests: 10_000,
        }
    }
}

impl Settings {
    fn check(&self) -> Result<(), ProposerError> {
        let fail = |field: &str, value: &dyn std::fmt::Display, wanted: &str| {
            Err(ProposerError::Unsupported(format!("speculative.parameters.{field} is {value}, {wanted}")))
        };
        if !(2..=1024).contains(&self.max_depth) {
            return fail("max_depth", &self.max_depth, "2 to 1024");
        }
        if !(self.max_spec_factor.is_finite() && self.max_spec_factor >= 0.0) {
            return fail("max_spec_factor", &self.max_spec_factor, "a number from 0");
        }
        if !self.max_spec_offset.is_finite() {
            return fail("max_spec_offset", &self.max_spec_offset, "a finite number");
        }
        if !(0.0..=1.0).contains(&self.min_token_prob) {
            return fail("min_token_prob", &self.min_token_prob, "0 to 1");
        }
        Ok(())
    }

    fn limits(&self, width: u32) -> Limits {
        Limits {
            depth: self.max_depth,
            factor: self.max_spec_factor,
            offset: self.max_spec_offset,
            least: self.min_token_prob,
            most: width as usize,
        }
    }
}

/// The drafter: an index of each request's text, and one of what finished requests answered.
#[derive(Debug)]
pub struct SuffixDrafter {
    settings: Settings,
    taps: TapSpec,
    running: HashMap<u64, Running>,
    finished: Index,
}

#[derive(Debug)]
struct Running {
    text: Index,
    /// Tokens of the prompt, once the first draft was asked for.
    prompt: Option<usize>,
}

impl SuffixDrafter {
    /// A drafter that has seen nothing.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, taps: TapSpec::default(), running: HashMap::new(), finished: Index::default() }
    }

    /// Learns a request's text as far as it is known.
    fn see(&mut self, id: u64, tokens: &[u32]) -> &mut Running {
        let running = self.running.entry(id).or_insert_with(|| Running { text: Index::single(), prompt: None });
        running.text.extend_last(tokens);
        running
    }

    fn draft(&self, running: &Running, tokens: &[u32], width: u32, tree: Option<&polyattn_api::TreeWish<'_>>) -> Draft {
        let limits = self.settings.limits(width);
        let pattern = &tokens[tokens.len() - tokens.len().min(limits.depth)..];
        let own = best_path(&running.text, pattern, &limits);
        let others = best_path(&self.finished, pattern, &limits);
        let (index, best) = if others.score > own.score { (&self.finished, others) } else { (&running.text, own) };
        match tree {
            Some(wish) if !best.tokens.is_empty() => match_length::tree(index, pattern, &best, &limits, wish),
            _ => best.into(),
        }
    }
}

impl Drafter for SuffixDrafter {
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
        let mut drafts = Vec::with_capacity(context.sequences.len());
        for sequence in context.sequences {
            let running = self.see(sequence.id, sequence.tokens);
            running.prompt.get_or_insert(sequence.tokens.len().saturating_sub(1));
            let running = &self.running[&sequence.id];
            drafts.push(self.draft(running, sequence.tokens, sequence.width, context.tree.as_ref()));
        }
        Ok(Proposal::Host(drafts))
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        for sequence in outcome.sequences {
            // A prompt that another pass goes on with is known beyond the token behind the last row; all of it is text.
            self.see(sequence.id, sequence.tokens);
        }
        Ok(())
    }

    fn forget(&mut self, sequence: u64) {
        let Some(Running { text, prompt: Some(prompt) }) = self.running.remove(&sequence) else { return };
        let answer = text.last_text().get(prompt..).unwrap_or(&[]);
        if !answer.is_empty() && self.settings.max_cached_requests > 0 {
            self.finished.push(answer);
            self.finished.keep_last(self.settings.max_cached_requests);
        }
    }
}

#[cfg(test)]
mod tests {
    use polyattn_api::{Registry, proposer_entry};

    use super::{Settings, Suffix, SuffixDrafter};

    fn draft(drafter: &mut SuffixDrafter, id: u64, tokens: &[u32], width: u32) -> Vec<u32> {
        drafter.see(id, tokens).prompt.get_or_insert(tokens.len().saturating_sub(1));
        let running = &drafter.running[&id];
        drafter.draft(running, tokens, width, None).tokens
    }

    #[test]
    fn known_answers() {
        let mut drafter = SuffixDrafter::new(Settings::default());
        // Three tokens match, so three may follow: probability 1/2 throughout, which is not split any further.
        assert_eq!(draft(&mut drafter, 0, &[1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 8), [4, 5, 6]);
        // Fewer where fewer are wanted.
        assert_eq!(draft(&mut drafter, 1, &[1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 2), [4, 5]);
        // Of two continuations the more frequent.
        assert_eq!(draft(&mut drafter, 2, &[1, 2, 9, 1, 2, 8, 1, 2, 8, 1, 2], 1), [8]);
        // Nothing repeats, nothing is drafted.
        assert_eq!(draft(&mut drafter, 3, &[1, 2, 3, 4], 8), [0_u32; 0]);
        assert_eq!(draft(&mut drafter, 4, &[1], 8), [0_u32; 0]);
    }

    #[test]
    fn finished_answers_are_remembered_and_forgotten() {
        let settings = Settings { max_cached_requests: 1, ..Settings::default() };
        let mut drafter = SuffixDrafter::new(settings);
        let _ = draft(&mut drafter, 0, &[50, 51], 4);
        drafter.see(0, &[50, 51, 10, 11, 12, 13]);
        polyattn_api::Drafter::forget(&mut drafter, 0);
        // The answer begins with the first token behind the prompt.
        assert_eq!(draft(&mut drafter, 1, &[7, 10, 11], 8), [12, 13]);
        assert_eq!(draft(&mut drafter, 2, &[7, 50], 8), [0_u32; 0]);
        // Another one takes its place.
        drafter.see(1, &[7, 10, 11, 90, 91]);
        polyattn_api::Drafter::forget(&mut drafter, 1);
        assert_eq!(draft(&mut drafter, 3, &[10, 11, 90], 8), [91]);
        assert_eq!(draft(&mut drafter, 6, &[9, 10, 11], 8), [90]);
        // A request that was never drafted for leaves nothing behind.
        drafter.see(4, &[3, 3, 3]);
        polyattn_api::Drafter::forget(&mut drafter, 4);
        assert_eq!(draft(&mut drafter, 5, &[1, 3], 8), [0_u32; 0]);
    }

    #[test]
    fn settings_say_what_is_wrong() {
        let fault = |settings: Settings| settings.check().unwrap_err().to_string();
        assert!(fault(Settings { max_depth: 1, ..Settings::default() }).contains("max_depth is 1, 2 to 1024"));
        assert!(fault(Settings { min_token_prob: 1.5, ..Settings::default() }).contains("min_token_prob is 1.5"));
        assert!(fault(Settings { max_spec_factor: f64::NAN, ..Settings::default() }).contains("NaN"));
    }

    #[test]
    fn registers_itself() {
        let registry = Registry::builder().proposer(proposer_entry!(super::Suffix)).build().unwrap();
        assert!(registry.proposer("suffix").unwrap().proposer.requirements().drafts_trees);
        let _ = Suffix;
    }
}
