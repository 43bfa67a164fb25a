//! What of a draft is kept. Source: chain verification of arXiv 2211.17192.

use crate::Sampler;

/// The outcome for one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Drafted tokens that stand.
    pub accepted: usize,
    /// The target's own token behind them.
    pub bonus: u32,
}

/// Greedy match: a drafted token stands if it is the target's most likely one. `target[i]` is the most likely token
/// behind row i; row 0 is the anchor's, so there is one more of them than of `drafted`.
#[must_use]
pub fn verify_greedy(drafted: &[u32], target: &[u32]) -> Verified {
    let accepted = drafted.iter().zip(target).take_while(|(draft, target)| draft == target).count();
    Verified { accepted, bonus: target.get(accepted).copied().unwrap_or(0) }
}

/// Rejection sampling for drafts chosen without chance (a one-hot draft distribution), in its coupled form: the target's
/// token is drawn at each row, and a drafted token stands if it equals the drawn one. A draft d is so accepted with
/// probability p(d), and the token in its place follows p without d, exactly as in rejection sampling; beyond that, a
/// seed gives the same tokens with and without drafts. `logits` are rows of `vocab` elements, one more than `drafted`;
/// `position` is that of the first drafted token.
#[must_use]
pub fn verify_sampled(drafted: &[u32], logits: &[f32], vocab: usize, sampler: &Sampler, position: u64) -> Verified {
    let mut rows = logits.chunks(vocab.max(1)).zip(position..);
    let mut accepted = 0;
    loop {
        let Some((row, position)) = rows.next() else { return Verified { accepted, bonus: 0 } };
        let token = sampler.sample(row, position);
        match drafted.get(accepted) {
            Some(draft) if *draft == token => accepted += 1,
            _ => return Verified { accepted, bonus: token },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Verified, verify_greedy, verify_sampled};
    use crate::{Sampler, Sampling};

    #[test]
    fn greedy_known_answers() {
        let check = |drafted: &[u32], target: &[u32], accepted, bonus| {
            assert_eq!(verify_greedy(drafted, target), Verified { accepted, bonus });
        };
        check(&[], &[4], 0, 4);
        check(&[1, 2, 3], &[1, 2, 3, 9], 3, 9);
        check(&[1, 2, 3], &[1, 5, 3, 9], 1, 5);
        check(&[7, 2], &[1, 2, 3], 0, 1);
    }

    /// Whatever is drafted, the tokens are those of plain sampling with the same seed, so their distribution is too.
    #[test]
    fn sampling_is_unmoved_by_drafts() {
        let sampler = Sampler::new(Sampling { temperature: 0.9, seed: 3, ..Sampling::default() });
        let vocab = 5;
        let logits: Vec<f32> = (0..4 * vocab).map(|i| ((i * 37 % 11) as f32) / 3.0).collect();
        let plain: Vec<u32> =
            logits.chunks(vocab).zip(100..).map(|(row, position)| sampler.sample(row, position)).collect();
        for draft in 0..125u32 {
            let drafted = [draft % 5, draft / 5 % 5, draft / 25];
            let verified = verify_sampled(&drafted, &logits, vocab, &sampler, 100);
            let mut emitted = drafted[..verified.accepted].to_vec();
            emitted.push(verified.bonus);
            assert_eq!(emitted, plain[..emitted.len()]);
        }
    }

    /// A draft is accepted with the target's probability for it.
    #[test]
    fn acceptance_is_the_targets_probability() {
        let p = [0.6f64, 0.3, 0.1];
        let logits: Vec<f32> = [p, p].iter().flatten().map(|p| p.ln() as f32).collect();
        let draws = 20_000;
        let (mut accepted, mut other) = (0.0, [0f64; 3]);
        for seed in 0..draws {
            let sampler = Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::default() });
            let verified = verify_sampled(&[1], &logits, 3, &sampler, 0);
            if verified.accepted == 1 {
                accepted += 1.0;
            } else {
                other[verified.bonus as usize] += 1.0;
            }
        }
        let rate = accepted / draws as f64;
        assert!((rate - 0.3).abs() < 0.012, "{rate}");
        assert_eq!(other[1], 0.0, "a rejected draft is never the token in its place");
        let share = other[0] / (other[0] + other[2]);
        assert!((share - 6.0 / 7.0).abs() < 0.012, "{share}");
    }
}
