//! How many tokens of a step are drafted and verified.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Debug,
    time::Duration,
};

use serde::Deserialize;

use crate::strategy;

/// Decides how many tokens a sequence has drafted and verified in a step. Registered with
/// [`register_length_policy!`](crate::register_length_policy) and named in `speculative.length`. An engine has one.
pub trait LengthPolicy: Debug + Send {
    /// The name users select it by.
    fn name(&self) -> &'static str;

    /// The tokens to draft for a sequence, 0 to `wish.most`; 0 decodes it plainly in this step.
    fn width(&mut self, wish: &LengthWish) -> u32;

    /// Learns what a step gave, and how long it took.
    fn observe(&mut self, step: &StepObserved<'_>) {
        let _ = step;
    }

    /// A sequence ended; its identifier may be used again.
    fn forget(&mut self, sequence: u64) {
        let _ = sequence;
    }
}

/// A sequence that may have a draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LengthWish {
    /// The sequence.
    pub sequence: u64,
    /// Sequences that decode in this step.
    pub batch: u32,
    /// Tokens that the user or the drafter asks for.
    pub usual: u32,
    /// Tokens that can be drafted at the most.
    pub most: u32,
}

impl LengthWish {
    /// A wish of these parts.
    #[must_use]
    pub fn new(sequence: u64, batch: u32, usual: u32, most: u32) -> Self {
        Self { sequence, batch, usual, most }
    }
}

/// What became of a step.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StepObserved<'a> {
    /// The sequences that decoded.
    pub sequences: &'a [SequenceObserved],
    /// From its begin to its tokens; `None` where other work stood between, such as a prompt.
    pub time: Option<Duration>,
}

impl<'a> StepObserved<'a> {
    /// A step of these parts.
    #[must_use]
    pub fn new(sequences: &'a [SequenceObserved], time: Option<Duration>) -> Self {
        Self { sequences, time }
    }
}

/// What became of a sequence's draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceObserved {
    /// The sequence.
    pub sequence: u64,
    /// Levels of its draft that were verified: tokens of a chain.
    pub drafted: u32,
    /// Tokens accepted.
    pub accepted: u32,
    /// Rows of the target's pass.
    pub rows: u32,
}

/// `fixed`: always the same.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fixed {
    /// How many; what the user or the drafter asks for where unset.
    pub tokens: Option<u32>,
}

impl LengthPolicy for Fixed {
    fn name(&self) -> &'static str {
        "fixed"
    }

    fn width(&mut self, wish: &LengthWish) -> u32 {
        self.tokens.unwrap_or(wish.usual).min(wish.most)
    }
}

/// `per-batch-size`: fewer where many sequences share the pass, from a table.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PerBatchSize {
    /// Pairs of a number of sequences and the tokens from that number on; fewer sequences draft as usual.
    pub table: Vec<(u32, u32)>,
}

impl Default for PerBatchSize {
    /// As SGLang's table for EAGLE.
    fn default() -> Self {
        Self { table: vec![(8, 3), (32, 1), (64, 0)] }
    }
}

impl LengthPolicy for PerBatchSize {
    fn name(&self) -> &'static str {
        "per-batch-size"
    }

    fn width(&mut self, wish: &LengthWish) -> u32 {
        let tokens =
            self.table.iter().rev().find(|(batch, _)| *batch <= wish.batch).map_or(wish.usual, |(_, tokens)| *tokens);
        tokens.min(wish.most)
    }
}

/// `adaptive`: the number that gives the most tokens by the second, from an estimate of each sequence's acceptance and
/// the measured cost of passes of so many rows. It draws level with plain decoding where drafts do not pay: 0 is one of
/// its answers.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adaptive {
    /// Share of a new observation in an estimate.
    pub rate: f64,
    /// How much better another number must be before it is taken.
    pub hysteresis: f64,
    #[serde(skip)]
    overall: Survival,
    #[serde(skip)]
    sequences: HashMap<u64, (Survival, u32)>,
    /// Seconds of steps with drafts, and of plain ones, by rows.
    #[serde(skip)]
    drafting: Cost,
    #[serde(skip)]
    plain: Cost,
}

impl Default for Adaptive {
    fn default() -> Self {
        Self {
            rate: 0.1,
            hysteresis: 0.05,
            overall: Survival::default(),
            sequences: HashMap::new(),
            drafting: Cost::default(),
            plain: Cost::default(),
        }
    }
}

/// Steps of a sequence after which its own acceptance weighs as much as everybody's.
const SHRINK: f64 = 8.0;

/// Plain steps that are measured before drafts are judged: the first may hold work that is done once.
const PLAIN_PROBES: u32 = 2;

/// How likely the next position is accepted where the ones before were.
#[derive(Clone, Debug, Default)]
struct Survival {
    /// For each position: observations, discounted, and those accepted.
    seen: Vec<(f64, f64)>,
}

impl Survival {
    fn observe(&mut self, drafted: u32, accepted: u32, rate: f64) {
        // Position i is tried where all before it stood.
        let tried = drafted.min(accepted + 1) as usize;
        self.seen.resize(self.seen.len().max(tried), (0.0, 0.0));
        for (position, (tries, hits)) in self.seen[..tried].iter_mut().enumerate() {
            let hit = f64::from(u32::from(position < accepted as usize));
            (*tries, *hits) = (*tries * (1.0 - rate) + 1.0, *hits * (1.0 - rate) + hit);
        }
    }

    /// The chance of a position (from 0), drawn towards `prior` by few observations; beyond those seen, as at the last.
    fn conditional(&self, position: usize, prior: f64) -> f64 {
        let known = position.min(self.seen.len().saturating_sub(1));
        let (tries, hits) = self.seen.get(known).copied().unwrap_or_default();
        (hits + SHRINK * prior) / (tries + SHRINK)
    }
}

/// Seconds by rows, as measured.
#[derive(Clone, Debug, Default)]
struct Cost {
    measured: BTreeMap<u32, (f64, u32)>,
}

impl Cost {
    fn observe(&mut self, rows: u32, seconds: f64, rate: f64) {
        let (held, count) = self.measured.entry(rows).or_insert((seconds, 0));
        *count += 1;
        // A faster step is the truth, a slower one may have been disturbed.
        *held = if seconds < *held { seconds } else { *held * (1.0 - rate) + seconds * rate };
    }

    fn count(&self, rows: u32) -> u32 {
        self.measured.get(&rows).map_or(0, |(_, count)| *count)
    }

    /// Between measured numbers of rows a straight line, beyond them the nearest, growing by the rows that are more.
    fn seconds(&self, rows: u32) -> Option<f64> {
        let below = self.measured.range(..=rows).next_back().map(|(rows, (seconds, _))| (*rows, *seconds));
        let above = self.measured.range(rows..).next().map(|(rows, (seconds, _))| (*rows, *seconds));
        match (below, above) {
            (Some((a, at_a)), Some((b, at_b))) if b > a => {
                Some(at_a + (at_b - at_a) * f64::from(rows - a) / f64::from(b - a))
            }
            (Some((_, seconds)), Some(_)) => Some(seconds),
            // A row costs something: 1 % of a pass until it is measured.
            (Some((a, at_a)), None) => Some(at_a * (1.0 + 0.01 * f64::from(rows - a))),
            (None, Some((_, seconds))) => Some(seconds),
            (None, None) => None,
        }
    }
}

impl LengthPolicy for Adaptive {
    fn name(&self) -> &'static str {
        "adaptive"
    }

    fn width(&mut self, wish: &LengthWish) -> u32 {
        let batch = wish.batch.max(1);
        let (own, last) = self.sequences.entry(wish.sequence).or_insert_with(|| (Survival::default(), wish.usual));
        *last = (*last).min(wish.most);
        if self.plain.count(batch) < PLAIN_PROBES {
            return 0;
        }
        let Some(plain) = self.plain.seconds(batch) else { return *last };
        let (mut survival, mut tokens) = (1.0, 1.0);
        let mut speeds = vec![1.0 / plain];
        for position in 0..wish.most as usize {
            let prior = self.overall.conditional(position, 0.5);
            survival *= own.conditional(position, prior);
            tokens += survival;
            let rows = batch.saturating_mul(position as u32 + 2);
            // Unmeasured, a draft is taken to cost a half more than a plain step of its rows.
            let seconds = self.drafting.seconds(rows).or_else(|| Some(self.plain.seconds(rows)? * 1.5));
            speeds.push(seconds.map_or(0.0, |seconds| tokens / seconds));
        }
        let best = (0..speeds.len()).max_by(|a, b| speeds[*a].total_cmp(&speeds[*b]).then(b.cmp(a))).unwrap_or(0);
        let held = speeds.get(*last as usize).copied().unwrap_or(0.0);
        if speeds[best] > held * (1.0 + self.hysteresis) {
            *last = best as u32;
        }
        *last
    }

    fn observe(&mut self, step: &StepObserved<'_>) {
        let mut drafted = false;
        for one in step.sequences {
            if one.drafted > 0 {
                drafted = true;
                self.overall.observe(one.drafted, one.accepted, self.rate / 4.0);
                if let Some((own, _)) = self.sequences.get_mut(&one.sequence) {
                    own.observe(one.drafted, one.accepted, self.rate);
                }
            }
        }
        let rows = step.sequences.iter().map(|one| one.rows).sum();
        if let Some(time) = step.time
            && rows > 0
        {
            let cost = if drafted { &mut self.drafting } else { &mut self.plain };
            cost.observe(rows, time.as_secs_f64(), self.rate);
        }
    }

    fn forget(&mut self, sequence: u64) {
        self.sequences.remove(&sequence);
    }
}

strategy::built_in! {
    dyn LengthPolicy, LENGTH_POLICIES: [
        "adaptive" => |parameters| {
            let one: Adaptive = strategy::read(parameters)?;
            match one {
                Adaptive { rate, .. } if !(rate > 0.0 && rate <= 1.0) => Err(format!("rate: {rate} is not above 0 and at most 1")),
                Adaptive { hysteresis, .. } if !(0.0..10.0).contains(&hysteresis) => {
                    Err(format!("hysteresis: {hysteresis} is not between 0 and 10"))
                }
                one => Ok(Box::new(one) as _),
            }
        },
        "fixed" => |parameters| strategy::read::<Fixed>(parameters).map(|one| Box::new(one) as _),
        "per-batch-size" => |parameters| {
            let one: PerBatchSize = strategy::read(parameters)?;
            match one.table.is_sorted_by(|a, b| a.0 < b.0) {
                true => Ok(Box::new(one) as _),
                false => Err(format!("table: the numbers of sequences in {:?} do not rise", one.table)),
            }
        },
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Adaptive, Fixed, LengthPolicy, LengthWish, PerBatchSize, SequenceObserved, StepObserved};

    fn wish(batch: u32) -> LengthWish {
        LengthWish::new(0, batch, 4, 7)
    }

    #[test]
    fn fixed_and_by_batch() {
        assert_eq!(Fixed::default().width(&wish(1)), 4);
        assert_eq!(Fixed { tokens: Some(9) }.width(&wish(1)), 7);
        let mut table = PerBatchSize { table: vec![(2, 3), (5, 1), (9, 0)] };
        let widths: Vec<u32> = [1, 2, 4, 5, 8, 9, 100].map(|batch| table.width(&wish(batch))).to_vec();
        assert_eq!(widths, [4, 3, 3, 1, 1, 0, 0]);
    }

    /// Runs a policy against a target that accepts each position with a chance, and whose pass costs so much by row.
    fn settle(accepts: f64, seconds: impl Fn(u32) -> f64) -> Vec<u32> {
        let mut policy = Adaptive::default();
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        (0..400)
            .map(|_| {
                let drafted = policy.width(&wish(1));
                let accepted = (0..drafted).take_while(|_| random() < accepts).count() as u32;
                let sequences = [SequenceObserved { sequence: 0, drafted, accepted, rows: drafted + 1 }];
                let draft = if drafted > 0 { 0.2 } else { 0.0 };
                let time = Some(Duration::from_secs_f64(0.01 * (seconds(drafted + 1) + draft)));
                policy.observe(&StepObserved::new(&sequences, time));
                drafted
            })
            .collect()
    }

    #[test]
    fn adapts_to_acceptance_and_cost() {
        let mean = |widths: &[u32]| widths[200..].iter().sum::<u32>() as f64 / 200.0;
        // Rows are free and nearly all is accepted: as many as there are.
        assert!(mean(&settle(0.95, |_| 1.0)) > 6.0);
        // Nothing is accepted: none at all.
        assert!(mean(&settle(0.0, |_| 1.0)) < 0.2);
        // A row costs as much as a pass: none either, however good the draft.
        assert!(mean(&settle(0.8, f64::from)) < 0.5);
        // In between, fewer than there are.
        let some = mean(&settle(0.6, |rows| 1.0 + 0.15 * f64::from(rows)));
        assert!((0.5..5.0).contains(&some), "{some}");
        // It does not flicker.
        let widths = settle(0.7, |rows| 1.0 + 0.1 * f64::from(rows));
        let changes = widths[100..].windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(changes < 30, "{changes} changes");
    }
}
