//! From logits to tokens: processed distributions, and noise that belongs to a place.

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::Distribution;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Only the k most likely tokens; `None` is all of them.
    pub top_k: Option<usize>,
    /// Only the most likely tokens whose probabilities reach this sum; 1 is all of them.
    pub top_p: f64,
    /// Logits of tokens that the text has are divided by it where positive, multiplied where negative (arXiv
    /// 1909.05858); 1 changes nothing.
    pub repetition_penalty: f64,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// What noise is for: each purpose has its own, so that drafting says nothing of accepting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// The target's own token at a position.
    Token,
    /// A drafted token.
    Draft,
    /// Whether a drafted token is accepted.
    Accept,
    /// The token in the place of a rejected one.
    Residual,
}

impl Sampling {
    /// Whether the most likely token is taken.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether a token depends on more of the text than the target has seen to it: on a penalty.
    #[must_use]
    pub fn looks_back(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// What is wrong with it, as a sentence.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Some(format!("temperature {} is not a number from 0", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Some(format!("top-p {} is not above 0 and at most 1", self.top_p));
        }
        if self.top_k == Some(0) {
            return Some("top-k 0 leaves no token".into());
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return Some(format!("repetition penalty {} is not a number above 0", self.repetition_penalty));
        }
        None
    }

    /// The distribution that a row of logits stands for behind a text, whose parts `history` gives in any order: the
    /// penalty, then the temperature, top-k, top-p, in f64. A row without one finite logit gives id 0; an infinite one
    /// takes all.
    #[must_use]
    pub fn distribution(&self, logits: &[f32], history: &[&[u32]]) -> Distribution {
        let usable = |x: &f32| !x.is_nan() && *x > f32::NEG_INFINITY;
        let mut kept: Vec<(u32, f64)> =
            (0..).zip(logits).filter(|(_, x)| usable(x)).map(|(id, x)| (id, f64::from(*x))).collect();
        if self.looks_back() {
            let mut seen: Vec<u32> = history.iter().flat_map(|part| part.iter().copied()).collect();
            seen.sort_unstable();
            seen.dedup();
            let mut seen = seen.into_iter().peekable();
            for (id, x) in &mut kept {
                while seen.next_if(|one| one < id).is_some() {}
                if seen.peek() == Some(id) {
                    *x = if *x > 0.0 { *x / self.repetition_penalty } else { *x * self.repetition_penalty };
                }
            }
        }
        // The first of equals, as everywhere.
        let better = |best: (u32, f64), one: (u32, f64)| if one.1 > best.1 { one } else { best };
        let Some((best, top)) = kept.iter().copied().reduce(better) else { return Distribution::one_hot(0) };
        if self.is_greedy() || top == f64::INFINITY {
            return Distribution::one_hot(best);
        }
        let by_rank = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if let Some(k) = self.top_k
            && k < kept.len()
        {
            kept.select_nth_unstable_by(k.max(1) - 1, by_rank);
            kept.truncate(k.max(1));
        }
        for (_, x) in &mut kept {
            *x = ((*x - top) / self.temperature).exp();
        }
        if self.top_p < 1.0 {
            kept.sort_unstable_by(by_rank);
            let total: f64 = kept.iter().map(|(_, p)| p).sum();
            let mut sum = 0.0;
            let last = kept.iter().position(|(_, p)| {
                sum += p / total;
                sum >= self.top_p
            });
            kept.truncate(last.map_or(kept.len(), |place| place + 1));
        }
        kept.sort_unstable_by_key(|(id, _)| *id);
        Distribution::from_weights(kept).unwrap_or_else(|| Distribution::one_hot(best))
    }

    /// A number from 0 to below 1 that depends on the seed, the position in the text and the purpose alone: a run in a
    /// batch and one alone see the same.
    #[must_use]
    pub fn noise(&self, position: u64, purpose: Purpose) -> f64 {
        self.noise_of(position, 0, purpose)
    }

    /// The same for one of several alternatives at a position.
    #[must_use]
    pub fn noise_of(&self, position: u64, alternative: u32, purpose: Purpose) -> f64 {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&position.to_le_bytes());
        key[16] = match purpose {
            Purpose::Token => 0,
            Purpose::Draft => 1,
            Purpose::Accept => 2,
            Purpose::Residual => 3,
        };
        key[17..21].copy_from_slice(&alternative.to_le_bytes());
        StdRng::from_seed(key).random()
    }

    /// The target's token at `position` of a text, drawn from a row of logits.
    #[must_use]
    pub fn sample(&self, logits: &[f32], history: &[&[u32]], position: u64) -> u32 {
        self.distribution(logits, history).draw(self.noise(position, Purpose::Token))
    }
}

#[cfg(test)]
mod tests {
    use super::{Purpose, Sampling};

    #[test]
    fn cuts_by_rank_and_by_mass() {
        let logits: Vec<f32> = [0.3f32, 0.5, 0.05, 0.15].iter().map(|p| p.ln()).collect();
        let base = Sampling { temperature: 1.0, ..Sampling::default() };
        let ids = |sampling: Sampling| sampling.distribution(&logits, &[]).ids().to_vec();
        assert_eq!(ids(base), [0, 1, 2, 3]);
        assert_eq!(ids(Sampling { top_k: Some(2), ..base }), [0, 1]);
        assert_eq!(ids(Sampling { top_k: Some(9), ..base }), [0, 1, 2, 3]);
        assert_eq!(ids(Sampling { top_p: 0.79, ..base }), [0, 1]);
        assert_eq!(ids(Sampling { top_p: 0.81, ..base }), [0, 1, 3]);
        assert_eq!(ids(Sampling { temperature: 0.0, ..base }), [1]);
        let sum: f64 = Sampling { top_p: 0.81, ..base }.distribution(&logits, &[]).probabilities().iter().sum();
        assert!((sum - 1.0).abs() < 1e-12);
        // Of equal logits the first stays.
        assert_eq!(Sampling { top_k: Some(2), ..base }.distribution(&[1.0; 4], &[]).ids(), [0, 1]);
    }

    #[test]
    fn penalises_what_was_said() {
        let sampling = Sampling { temperature: 1.0, repetition_penalty: 2.0, ..Sampling::default() };
        let logits = [2.0, 1.0, -1.0, 0.0];
        let got = sampling.distribution(&logits, &[&[2, 0], &[0, 9]]);
        let want = [1.0f64, 1.0, -2.0, 0.0].map(f64::exp);
        let total: f64 = want.iter().sum();
        for (id, p) in got.iter() {
            assert!((p - want[id as usize] / total).abs() < 1e-15);
        }
        let greedy = Sampling { temperature: 0.0, ..sampling };
        assert_eq!(greedy.distribution(&[2.0, 1.5], &[&[0]]).best(), 1);
        assert_eq!(greedy.distribution(&[2.0, 1.5], &[&[1]]).best(), 0);
    }

    #[test]
    fn hostile_logits_still_give_an_id() {
        let any = Sampling { temperature: 0.7, ..Sampling::default() };
        assert_eq!(any.sample(&[f32::NAN; 4], &[], 0), 0);
        assert_eq!(any.sample(&[], &[], 0), 0);
        assert_eq!(any.sample(&[f32::NEG_INFINITY, 1.0, f32::NAN], &[], 3), 1);
        assert_eq!(any.sample(&[0.0, f32::INFINITY], &[], 5), 1);
        let cold = Sampling { temperature: 1e-300, ..any };
        assert_eq!(cold.sample(&[1.0, 3.0, 2.0], &[], 5), 1);
    }

    #[test]
    fn noise_belongs_to_place_and_purpose() {
        let sampling = Sampling { seed: 9, ..Sampling::default() };
        let of = |position, purpose| sampling.noise(position, purpose);
        assert_eq!(of(4, Purpose::Token), of(4, Purpose::Token));
        let all = [of(4, Purpose::Token), of(5, Purpose::Token), of(4, Purpose::Draft), of(4, Purpose::Accept)];
        assert!(all.iter().enumerate().all(|(place, one)| !all[..place].contains(one)));
        assert_ne!(sampling.noise_of(4, 1, Purpose::Accept), of(4, Purpose::Accept));
    }

    #[test]
    fn follows_the_distribution() {
        let p = [0.5f64, 0.3, 0.15, 0.05];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        let any = Sampling { temperature: 1.0, seed: 7, ..Sampling::default() };
        let draws = 20_000;
        let mut counts = [0f64; 4];
        for position in 0..draws {
            counts[any.sample(&logits, &[], position) as usize] += 1.0;
        }
        let chi: f64 = p.iter().zip(counts).map(|(p, c)| (c - p * draws as f64).powi(2) / (p * draws as f64)).sum();
        assert!(chi < 16.27, "χ² {chi} with 3 degrees of freedom, 0.1 % bound 16.27");
    }

    #[test]
    fn says_what_is_wrong() {
        let with = |temperature, top_p, top_k, repetition_penalty| {
            Sampling { temperature, top_p, top_k, repetition_penalty, seed: 0 }.fault()
        };
        assert!(with(-1.0, 1.0, None, 1.0).is_some_and(|fault| fault.contains("-1")));
        assert!(with(f64::NAN, 1.0, None, 1.0).is_some());
        assert!(with(1.0, 0.0, None, 1.0).is_some());
        assert!(with(1.0, 1.5, None, 1.0).is_some());
        assert!(with(1.0, 1.0, Some(0), 1.0).is_some());
        assert!(with(1.0, 1.0, None, 0.0).is_some());
        assert_eq!(with(1.0, 1.0, Some(1), 1.3), None);
    }
}
