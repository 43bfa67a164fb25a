use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use polyattn_api::{Phase, Role};
use serde::Serialize;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum StopReason {
    /// The model ended its text.
    EndOfSequence,
    /// As many tokens as asked for.
    Length,
    /// No more place in the context.
    Context,
    /// The caller said stop.
    Cancelled,
    /// No more pages in the cache, though no other request holds any.
    OutOfPages,
}

/// How well drafts fared.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Acceptance {
    /// 1 + accepted tokens ÷ steps with a draft; 1 without any.
    pub mean_length: f64,
    /// Accepted ÷ drafted tokens.
    pub rate: f64,
    /// For each position the share of steps with a draft that accepted it, whether or not they drafted as far: it does
    /// not rise.
    pub per_position: Vec<f64>,
    /// Steps that drafted each position.
    pub drafted_per_position: Vec<u64>,
    /// Steps with a draft.
    pub drafted_steps: u64,
    /// Tokens drafted and verified.
    pub drafted: u64,
    /// Tokens accepted.
    pub accepted: u64,
    /// Tokens drafted and verified in vain.
    pub wasted: u64,
    /// Steps with a draft by the number of tokens they accepted, from 0 on.
    pub histogram: Vec<u64>,
    /// Time in the drafter: all of it on the CPU; on a GPU its recording, and what the drafter itself waited for.
    pub draft_seconds: f64,
    /// The rest of the steps with a draft: the target's pass and the verdict.
    pub verify_seconds: f64,
}

/// Counts of what was drafted and accepted.
#[derive(Clone, Debug, Default)]
pub(crate) struct AcceptanceCounts {
    /// Steps whose draft, and whose accepted part, reached each depth.
    drafted_at: Vec<u64>,
    accepted_at: Vec<u64>,
    histogram: Vec<u64>,
    nodes: u64,
    draft: Duration,
    verify: Duration,
}

impl AcceptanceCounts {
    /// A draft of `nodes` tokens in `depth` levels, of which `accepted` stand.
    pub(crate) fn step(&mut self, nodes: usize, depth: usize, accepted: usize) {
        for (counts, reached) in [(&mut self.drafted_at, depth), (&mut self.accepted_at, accepted)] {
            counts.resize(counts.len().max(reached), 0);
            counts[..reached].iter_mut().for_each(|count| *count += 1);
        }
        self.nodes += nodes as u64;
        self.histogram.resize(self.histogram.len().max(accepted + 1), 0);
        self.histogram[accepted] += 1;
    }

    pub(crate) fn took(&mut self, draft: Duration, verify: Duration) {
        self.draft += draft;
        self.verify += verify;
    }

    pub(crate) fn report(&self) -> Acceptance {
        let steps = self.drafted_at.first().copied().unwrap_or(0);
        let drafted = self.nodes;
        let accepted: u64 = self.accepted_at.iter().sum();
        let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        Acceptance {
            mean_length: 1.0 + share(accepted, steps),
            rate: share(accepted, drafted),
            per_position: (0..self.drafted_at.len())
                .map(|place| share(self.accepted_at.get(place).copied().unwrap_or(0), steps))
                .collect(),
            drafted_per_position: self.drafted_at.clone(),
            drafted_steps: steps,
            drafted,
            accepted,
            wasted: drafted.saturating_sub(accepted),
            histogram: self.histogram.clone(),
            draft_seconds: self.draft.as_secs_f64(),
            verify_seconds: self.verify.as_secs_f64(),
        }
    }
}

/// The backends that really ran for the target, by phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TargetBackends(pub BTreeMap<&'static str, BTreeSet<&'static str>>);

/// The backends that really ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Backends {
    /// For the target.
    pub target: TargetBackends,
    /// For the draft.
    pub draft: TargetBackends,
}

impl Serialize for TargetBackends {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // One name as a string, several as a list.
        serializer.collect_map(self.0.iter().map(|(phase, names)| {
            let value = match names.first() {
                Some(name) if names.len() == 1 => serde_json::json!(name),
                _ => serde_json::json!(names),
            };
            (phase, value)
        }))
    }
}

impl Backends {
    /// Takes over what ran elsewhere.
    pub(crate) fn add(&mut self, other: &Self) {
        for (here, there) in [(&mut self.target, &other.target), (&mut self.draft, &other.draft)] {
            for (phase, names) in &there.0 {
                here.0.entry(phase).or_default().extend(names);
            }
        }
    }

    pub(crate) fn ran(&mut self, role: Role, phase: Phase, backend: &'static str) {
        let phase = match phase {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
            Phase::Verify => "verify",
            Phase::Draft => "draft",
        };
        let backends = match role {
            Role::Target => &mut self.target,
            Role::Draft => &mut self.draft,
        };
        backends.0.entry(phase).or_default().insert(backend);
    }
}

/// What came out of a request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Generation {
    /// Ids of the new tokens; the end-of-sequence id included where one was produced.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Why it ended.
    pub stop: StopReason,
    /// The target's passes after prefill.
    pub steps: u64,
    /// From the request to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Drafts and their fate; `None` without a proposer.
    pub acceptance: Option<Acceptance>,
    /// Whether the tokens follow the target's distribution: not under a lossy acceptance rule.
    pub lossless: bool,
    /// Whether the drafter failed on the way, and the rest was decoded plainly.
    pub drafter_lost: bool,
    /// Tokens of the prompt whose pages another request had filled.
    pub cached_tokens: usize,
    /// How often its pages were taken away, and its text run again.
    pub preemptions: u64,
    /// The backends that really ran.
    pub backends: Backends,
    /// Attention calls served, by backend.
    pub calls: BTreeMap<&'static str, u64>,
}

impl Generation {
    /// New tokens behind the first, by the time they took; 0 where there are none.
    #[must_use]
    pub fn tokens_per_second(&self) -> f64 {
        let tokens = self.tokens.len().saturating_sub(1) as f64;
        let seconds = self.decode.as_secs_f64();
        if seconds > 0.0 { tokens / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::AcceptanceCounts;

    #[test]
    fn counts_by_position() {
        let mut counts = AcceptanceCounts::default();
        counts.step(4, 4, 2);
        counts.step(2, 2, 0);
        counts.step(4, 4, 4);
        let report = counts.report();
        assert_eq!((report.wasted, report.histogram.as_slice()), (4, &[1, 0, 1, 0, 1][..]));
        assert_eq!((report.drafted_steps, report.drafted, report.accepted), (3, 10, 6));
        assert_eq!(report.mean_length, 3.0);
        assert_eq!(report.per_position, [2.0 / 3.0, 2.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]);
        assert_eq!(AcceptanceCounts::default().report().mean_length, 1.0);
        // A tree: 5 tokens in 2 levels.
        let mut tree = AcceptanceCounts::default();
        tree.step(5, 2, 2);
        assert_eq!((tree.report().per_position, tree.report().wasted), (vec![1.0, 1.0], 3));
    }
}
