use rand::{Rng, SeedableRng, rngs::StdRng};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Only the k most likely tokens; `None` is all of them.
    pub top_k: Option<usize>,
    /// Only the most likely tokens whose probabilities reach this sum; 1 is all of them.
    pub top_p: f64,
    /// The same seed gives the same tokens, whatever drafts them.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Whether the most likely token is taken.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
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
        None
    }
}

/// Turns logits into tokens.
///
/// The noise of a token depends on the seed and its position alone, so that a run with drafts and one without see the
/// same noise.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    sampling: Sampling,
}

impl Sampler {
    /// A sampler.
    #[must_use]
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling }
    }

    /// The distribution that a row of logits stands for: ids with probabilities that sum to 1, most likely first.
    /// Never empty; a row without one finite logit gives id 0.
    #[must_use]
    pub fn distribution(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut ranked: Vec<(u32, f64)> = logits
            .iter()
            .zip(0..)
            .filter(|(x, _)| !x.is_nan() && **x > f32::NEG_INFINITY)
            .map(|(x, id)| (id, f64::from(*x)))
            .collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let Some(&(best, top)) = ranked.first() else { return vec![(0, 1.0)] };
        if self.sampling.is_greedy() || top == f64::INFINITY {
            return vec![(best, 1.0)];
        }
        if let Some(k) = self.sampling.top_k {
            ranked.truncate(k.max(1));
        }
        let mut total = 0.0;
        for (_, x) in &mut ranked {
            *x = ((*x - top) / self.sampling.temperature).exp();
            total += *x;
        }
        if self.sampling.top_p < 1.0 {
            let mut sum = 0.0;
            let kept = ranked.iter().position(|(_, p)| {
                sum += p / total;
                sum >= self.sampling.top_p
            });
            ranked.truncate(kept.map_or(ranked.len(), |place| place + 1));
            total = ranked.iter().map(|(_, p)| p).sum();
        }
        for (_, p) in &mut ranked {
            *p /= total;
        }
        ranked
    }

    /// The token at `position` of the sequence, drawn from a row of logits.
    #[must_use]
    pub fn sample(&self, logits: &[f32], position: u64) -> u32 {
        let distribution = self.distribution(logits);
        let mut left = noise(self.sampling.seed, position);
        for (id, p) in &distribution {
            left -= p;
            if left < 0.0 {
                return *id;
            }
        }
        distribution.last().map_or(0, |(id, _)| *id)
    }
}

/// A number from 0 to below 1 that depends on its arguments alone.
fn noise(seed: u64, position: u64) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&position.to_le_bytes());
    StdRng::from_seed(key).random()
}

#[cfg(test)]
mod tests {
    use super::{Sampler, Sampling};

    fn sampler(sampling: Sampling) -> Sampler {
        assert_eq!(sampling.fault(), None);
        Sampler::new(sampling)
    }

    #[test]
    fn cuts_by_rank_and_by_mass() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let base = Sampling { temperature: 1.0, ..Sampling::default() };
        let ids = |sampling| sampler(sampling).distribution(&logits).iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(base), [0, 1, 2, 3]);
        assert_eq!(ids(Sampling { top_k: Some(2), ..base }), [0, 1]);
        assert_eq!(ids(Sampling { top_p: 0.79, ..base }), [0, 1]);
        assert_eq!(ids(Sampling { top_p: 0.81, ..base }), [0, 1, 2]);
        assert_eq!(ids(Sampling { temperature: 0.0, ..base }), [0]);
        let sum: f64 = sampler(Sampling { top_p: 0.81, ..base }).distribution(&logits).iter().map(|(_, p)| p).sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }

    #[test]
    fn hostile_logits_still_give_an_id() {
        let any = sampler(Sampling { temperature: 0.7, ..Sampling::default() });
        assert_eq!(any.sample(&[f32::NAN; 4], 0), 0);
        assert_eq!(any.sample(&[f32::NEG_INFINITY, 1.0, f32::NAN], 3), 1);
        assert_eq!(any.sample(&[0.0, f32::INFINITY], 5), 1);
    }

    #[test]
    fn follows_the_distribution() {
        let p = [0.5f64, 0.3, 0.15, 0.05];
        let logits: Vec<f32> = p.iter().map(|p| p.ln() as f32).collect();
        let any = sampler(Sampling { temperature: 1.0, seed: 7, ..Sampling::default() });
        let draws = 20_000;
        let mut counts = [0f64; 4];
        for position in 0..draws {
            counts[any.sample(&logits, position) as usize] += 1.0;
        }
        let chi: f64 = p.iter().zip(counts).map(|(p, c)| (c - p * draws as f64).powi(2) / (p * draws as f64)).sum();
        assert!(chi < 16.27, "χ² {chi} with 3 degrees of freedom, 0.1 % bound 16.27");
    }

    #[test]
    fn says_what_is_wrong() {
        let with = |temperature, top_p, top_k| Sampling { temperature, top_p, top_k, seed: 0 }.fault();
        assert!(with(-1.0, 1.0, None).is_some_and(|fault| fault.contains("-1")));
        assert!(with(f64::NAN, 1.0, None).is_some());
        assert!(with(1.0, 0.0, None).is_some());
        assert!(with(1.0, 1.5, None).is_some());
        assert!(with(1.0, 1.0, Some(0)).is_some());
    }
}
