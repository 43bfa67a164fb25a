//! What of a draft stands.

use std::fmt::Debug;

use serde::Deserialize;

use crate::{Distribution, Draft, Purpose, Sampling, strategy};

/// Decides what of a draft is kept, and what the target says in its place. Registered with
/// [`register_acceptance_rule!`](crate::register_acceptance_rule) and named in `speculative.acceptance`.
pub trait AcceptanceRule: Debug + Send + Sync {
    /// The name users select it by.
    fn name(&self) -> &'static str;

    /// Whether what is emitted follows the target's distribution. A rule that is not says so in every answer.
    fn lossless(&self) -> bool {
        true
    }

    /// Whether it makes more of tokens that were drawn from the drafter's distribution than of its most likely ones:
    /// only then is a drafter asked to draw.
    fn wants_drawn_tokens(&self) -> bool {
        false
    }

    /// Why it cannot serve a request that samples like this.
    fn refuses(&self, sampling: &Sampling) -> Option<String> {
        let _ = sampling;
        None
    }

    /// Judges a draft.
    fn accept(&self, verification: &Verification<'_>) -> Accepted;
}

/// What was kept of a draft.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Nodes of the draft from behind the anchor on, each the parent of the next.
    pub nodes: Vec<u32>,
    /// The token behind them, by the target.
    pub bonus: u32,
}

/// What the target says of the rows of a verification: row 0 is the anchor's, row i + 1 that of node i. A row speaks of
/// the token behind it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum TargetRows<'a> {
    /// The most likely id of each row, where nothing else matters.
    Best(&'a [u32]),
    /// Logits, `[rows, vocab]`.
    Logits {
        /// The logits.
        logits: &'a [f32],
        /// Elements of a row.
        vocab: usize,
    },
}

/// One draft to judge.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Verification<'a> {
    /// The draft.
    pub draft: &'a Draft,
    /// The text before it; its last token is the anchor.
    pub text: &'a [u32],
    /// How tokens are chosen.
    pub sampling: &'a Sampling,
    /// The target's answer.
    pub target: TargetRows<'a>,
}

impl<'a> Verification<'a> {
    /// A verification of these parts.
    #[must_use]
    pub fn new(draft: &'a Draft, text: &'a [u32], sampling: &'a Sampling, target: TargetRows<'a>) -> Self {
        Self { draft, text, sampling, target }
    }

    /// The target's distribution of the token behind a node (`None`: the anchor), temperature, penalty and cuts applied
    /// with the drafted tokens to it as part of the text. Id 0 where the target said nothing usable.
    #[must_use]
    pub fn distribution(&self, node: Option<u32>) -> Distribution {
        let row = node.map_or(0, |node| node as usize + 1);
        match self.target {
            TargetRows::Best(ids) => Distribution::one_hot(ids.get(row).copied().unwrap_or(0)),
            TargetRows::Logits { logits, vocab } => {
                let logits = logits.get(row * vocab..(row + 1) * vocab).unwrap_or(&[]);
                if !self.sampling.looks_back() {
                    return self.sampling.distribution(logits, &[]);
                }
                let drafted: Vec<u32> = node
                    .map_or_else(Vec::new, |node| self.draft.path(node))
                    .iter()
                    .map(|node| self.token(*node))
                    .collect();
                self.sampling.distribution(logits, &[self.text, &drafted])
            }
        }
    }

    /// The token of a node.
    #[must_use]
    pub fn token(&self, node: u32) -> u32 {
        self.draft.tokens[node as usize]
    }

    /// The position in the text of the token behind `depth` drafted ones.
    #[must_use]
    pub fn position(&self, depth: usize) -> u64 {
        (self.text.len() + depth) as u64
    }

    /// The distribution that a node was drawn from; `None` where it was chosen without chance.
    #[must_use]
    pub fn drawn_from(&self, node: u32) -> Option<&'a Distribution> {
        self.draft.drawn_from.get(node as usize)
    }

    /// The target's own token behind `depth` drafted ones.
    fn draw(&self, distribution: &Distribution, depth: usize) -> u32 {
        distribution.draw(self.sampling.noise(self.position(depth), Purpose::Token))
    }
}

/// `match`: the target's token is drawn at each row, and a drafted token stands if it equals the drawn one. Lossless for
/// every draft, and beyond that a seed gives the same tokens with and without drafts. A draft d is accepted with
/// probability p(d): for tokens chosen without chance that is as much as rejection sampling accepts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Match;

impl AcceptanceRule for Match {
    fn name(&self) -> &'static str {
        "match"
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        let mut nodes: Vec<u32> = Vec::new();
        loop {
            let at = nodes.last().copied();
            let token = verification.draw(&verification.distribution(at), nodes.len());
            let next = verification.draft.children(at).find(|child| verification.token(*child) == token);
            match next {
                Some(node) => nodes.push(node),
                None => return Accepted { nodes, bonus: token },
            }
        }
    }
}

/// `greedy`: a drafted token stands if it is the target's most likely one. For requests of temperature 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Greedy;

impl AcceptanceRule for Greedy {
    fn name(&self) -> &'static str {
        "greedy"
    }

    fn refuses(&self, sampling: &Sampling) -> Option<String> {
        let Sampling { temperature, .. } = sampling;
        (!sampling.is_greedy())
            .then(|| format!("acceptance 'greedy' is for temperature 0, the request's is {temperature}"))
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        Match.accept(verification)
    }
}

/// `rejection`: speculative sampling (arXiv 2211.17192). A token drawn from q is accepted with probability min(1, p ÷ q),
/// one chosen without chance with probability p; in the place of a rejected one stands a token of what p has and q has
/// not. Siblings of a tree are tried one after the other, each against what the ones before left (arXiv 2305.09781).
#[derive(Clone, Copy, Debug, Default)]
pub struct Rejection;

impl AcceptanceRule for Rejection {
    fn name(&self) -> &'static str {
        "rejection"
    }

    fn wants_drawn_tokens(&self) -> bool {
        true
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        let sampling = verification.sampling;
        let mut nodes: Vec<u32> = Vec::new();
        'path: loop {
            let (at, depth) = (nodes.last().copied(), nodes.len());
            let position = verification.position(depth);
            let mut p = verification.distribution(at);
            let mut siblings: Vec<u32> = Vec::new();
            for (place, child) in (0..).zip(verification.draft.children(at)) {
                let token = verification.token(child);
                let q = verification.drawn_from(child).map(|q| without(q, &siblings));
                let noise = sampling.noise_of(position, place, Purpose::Accept);
                // Strictly: what the target never says is never accepted.
                let of_draft = q.as_ref().map_or(1.0, |q| q.probability(token));
                if of_draft > 0.0 && noise * of_draft < p.probability(token) {
                    nodes.push(child);
                    continue 'path;
                }
                p = residual(&p, 1.0, q.as_ref(), token);
                siblings.push(token);
            }
            let bonus = if siblings.is_empty() {
                verification.draw(&p, depth)
            } else {
                p.draw(sampling.noise(position, Purpose::Residual))
            };
            return Accepted { nodes, bonus };
        }
    }
}

/// A distribution without what was drawn from it before.
fn without(q: &Distribution, drawn: &[u32]) -> Distribution {
    let rest = || Distribution::from_weights(q.iter().filter(|(id, _)| !drawn.contains(id)));
    if drawn.is_empty() { q.clone() } else { rest().unwrap_or_else(|| q.clone()) }
}

/// What `scale · p` has beyond q, normalised; without q all of p but `token`. p itself where nothing is left, which is
/// so only by rounding.
fn residual(p: &Distribution, scale: f64, q: Option<&Distribution>, token: u32) -> Distribution {
    let rest = match q {
        Some(q) => Distribution::from_weights(p.iter().map(|(id, of)| (id, scale * of - q.probability(id)))),
        None => Distribution::from_weights(p.iter().filter(|(id, _)| *id != token)),
    };
    rest.unwrap_or_else(|| p.clone())
}

/// `block`: block verification (arXiv 2403.10444), which judges a chain as a whole and accepts no less than rejection
/// sampling. A tree is judged token by token.
#[derive(Clone, Copy, Debug, Default)]
pub struct Block;

impl AcceptanceRule for Block {
    fn name(&self) -> &'static str {
        "block"
    }

    fn wants_drawn_tokens(&self) -> bool {
        true
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        let draft = verification.draft;
        if !draft.is_chain() || draft.is_empty() {
            return Rejection.accept(verification);
        }
        let count = draft.len() as u32;
        let target = |depth: u32| verification.distribution(depth.checked_sub(1));
        let mut p = target(0);
        let mut ratio = 1.0f64;
        let mut kept = (0, ratio, p.clone());
        for node in 0..count {
            let token = verification.token(node);
            let of_draft = verification.drawn_from(node).map_or(1.0, |q| q.probability(token));
            let of_target = p.probability(token);
            ratio = if of_draft > 0.0 { (ratio * of_target / of_draft).min(1.0) } else { 0.0 };
            p = target(node + 1);
            let accepting = if node + 1 == count {
                ratio
            } else {
                let rest: f64 = match verification.drawn_from(node + 1) {
                    Some(q) => p.iter().map(|(id, of)| (ratio * of - q.probability(id)).max(0.0)).sum(),
                    None => ratio * (1.0 - p.probability(verification.token(node + 1))),
                };
                let all = rest + 1.0 - ratio;
                if all > 0.0 { rest / all } else { 1.0 }
            };
            // Noise of this step, not of the position: it is drawn for positions too that the next step judges again.
            let noise = verification.sampling.noise_of(verification.position(0), node, Purpose::Accept);
            // The last that would be accepted counts, whatever was before it.
            if noise < accepting {
                kept = (node + 1, ratio, p.clone());
            }
        }
        let (accepted, ratio, p) = kept;
        let nodes = (0..accepted).collect();
        if accepted == count {
            return Accepted { nodes, bonus: verification.draw(&p, accepted as usize) };
        }
        let rest = residual(&p, ratio, verification.drawn_from(accepted), verification.token(accepted));
        let noise = verification.sampling.noise(verification.position(accepted as usize), Purpose::Residual);
        Accepted { nodes, bonus: rest.draw(noise) }
    }
}

/// `typical`: keeps what the target finds likely enough, p > min(ε, δ · exp(−entropy)); of a tree the longest such path.
/// **Lossy**. Source: Medusa, arXiv 2401.10774.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Typical {
    /// ε: probability that is always enough.
    pub epsilon: f64,
    /// δ: factor of exp(−entropy).
    pub delta: f64,
}

impl Default for Typical {
    fn default() -> Self {
        Self { epsilon: 0.09, delta: 0.3 }
    }
}

impl AcceptanceRule for Typical {
    fn name(&self) -> &'static str {
        "typical"
    }

    fn lossless(&self) -> bool {
        false
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        let draft = verification.draft;
        let enough = |p: &Distribution| self.epsilon.min(self.delta * (-p.entropy()).exp());
        // A parent comes before its children, so what is known of it is known already.
        let rows: Vec<Distribution> =
            (0..=draft.len() as u32).map(|row| verification.distribution(row.checked_sub(1))).collect();
        let mut kept: Vec<u32> = vec![0; draft.len()];
        let mut longest: Option<u32> = None;
        for node in 0..draft.len() as u32 {
            let parent = draft.parent(node);
            // 0 where the parent is not kept: the node is not reached.
            let before = match parent.map(|parent| kept[parent as usize]) {
                None => 1,
                Some(0) => 0,
                Some(depth) => depth + 1,
            };
            let p = &rows[parent.map_or(0, |parent| parent as usize + 1)];
            if before > 0 && p.probability(verification.token(node)) > enough(p) {
                kept[node as usize] = before;
                if longest.is_none_or(|longest| before > kept[longest as usize]) {
                    longest = Some(node);
                }
            }
        }
        let nodes = longest.map_or_else(Vec::new, |node| draft.path(node));
        let p = &rows[longest.map_or(0, |node| node as usize + 1)];
        Accepted { bonus: verification.draw(p, nodes.len()), nodes }
    }
}

/// `synthetic`: accepts at a fixed rate or to a fixed mean length, whatever the target says. **What is emitted is not
/// the target's**: for measuring speed without a trained drafter.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Synthetic {
    /// The share of steps that accept position 1, 2, …; falling, from 1 to 0.
    pub rates: Vec<f64>,
    /// The mean acceptance length, bonus included, in place of rates: with the least variance.
    pub length: Option<f64>,
}

impl Synthetic {
    fn read(parameters: &serde_json::Value) -> Result<Self, String> {
        let found: Self = strategy::read(parameters)?;
        match found.length {
            None if found.rates.is_empty() => return Err("neither length nor rates: one of them is needed".into()),
            Some(length) if !found.rates.is_empty() => {
                return Err(format!("length {length} and rates {:?}: one of them is needed", found.rates));
            }
            Some(length) if !(1.0..1e6).contains(&length) => {
                return Err(format!("length: {length} is not a number from 1"));
            }
            _ => {}
        }
        let mut most = 1.0;
        for rate in &found.rates {
            if !(0.0..=most).contains(rate) {
                return Err(format!(
                    "rates: {rate} in {:?} is not between 0 and the one before, at most 1",
                    found.rates
                ));
            }
            most = *rate;
        }
        Ok(found)
    }

    /// The share of steps that accept this position, counted from 1.
    fn rate(&self, position: usize) -> f64 {
        match self.length {
            _ if position == 0 => 1.0,
            Some(length) => (length - position as f64).clamp(0.0, 1.0),
            None => self.rates.get(position - 1).copied().unwrap_or(0.0),
        }
    }
}

impl AcceptanceRule for Synthetic {
    fn name(&self) -> &'static str {
        "synthetic"
    }

    fn lossless(&self) -> bool {
        false
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        let mut nodes: Vec<u32> = Vec::new();
        while let Some(next) = verification.draft.children(nodes.last().copied()).next() {
            let (before, with) = (self.rate(nodes.len()), self.rate(nodes.len() + 1));
            let noise = verification.sampling.noise(verification.position(nodes.len()), Purpose::Accept);
            if with <= 0.0 || noise * before >= with {
                break;
            }
            nodes.push(next);
        }
        let p = verification.distribution(nodes.last().copied());
        Accepted { bonus: verification.draw(&p, nodes.len()), nodes }
    }
}

strategy::built_in! {
    dyn AcceptanceRule, ACCEPTANCE_RULES: [
        "block" => |parameters| strategy::none(parameters).map(|()| Box::new(Block) as _),
        "greedy" => |parameters| strategy::none(parameters).map(|()| Box::new(Greedy) as _),
        "match" => |parameters| strategy::none(parameters).map(|()| Box::new(Match) as _),
        "rejection" => |parameters| strategy::none(parameters).map(|()| Box::new(Rejection) as _),
        "synthetic" => |parameters| Synthetic::read(parameters).map(|one| Box::new(one) as _),
        "typical" => |parameters| match strategy::read::<Typical>(parameters)? {
            Typical { epsilon, delta } if !(epsilon > 0.0 && delta > 0.0) => {
                Err(format!("epsilon {epsilon} and delta {delta} must be above 0"))
            }
            one => Ok(Box::new(one) as _),
        },
    ]
}
