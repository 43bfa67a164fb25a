//! What a lossless rule emits follows the target's distribution, whatever is drafted: χ² of texts of three tokens, over
//! seeds that are fixed. The bound is the 0.1 % quantile. Rules with a planted bias must exceed it.

use polyattn_api::{
    AcceptanceRule, Accepted, Block, Candidate, Distribution, Draft, DraftSequence, Match, Purpose, Rejection,
    Sampling, TargetRows, TopK, TreeBuilder, Verification,
};

const VOCAB: usize = 4;
/// Tokens of a text.
const LENGTH: usize = 3;
const TEXTS: u64 = 16_000;

/// A model whose next token depends on the last one and on the position: weights that are no powers of each other.
fn weights(model: u32, last: u32, position: usize) -> [f64; VOCAB] {
    let mut weights = [0.0; VOCAB];
    for (id, weight) in weights.iter_mut().enumerate() {
        let x = f64::from(model * 31 + last * 7) + position as f64 * 3.0 + id as f64 * 5.0;
        *weight = 0.15 + (x * 1.7).sin().abs();
    }
    weights
}

const TARGET: u32 = 1;
const DRAFTER: u32 = 2;

fn logits(model: u32, last: u32, position: usize) -> Vec<f32> {
    weights(model, last, position).iter().map(|weight| weight.ln() as f32).collect()
}

/// By definition, with nothing of the code under test.
fn softmax(model: u32, last: u32, position: usize, temperature: f64) -> [f64; VOCAB] {
    let powers = weights(model, last, position).map(|weight| f64::from(weight.ln() as f32) / temperature).map(f64::exp);
    let total: f64 = powers.iter().sum();
    powers.map(|power| power / total)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Drafts {
    /// Always the most likely.
    OneHot,
    /// Drawn from the drafter's distribution.
    Drawn,
    /// The likeliest of each level.
    Tree,
    /// Siblings drawn without replacement.
    DrawnTree,
}

fn draft(kind: Drafts, text: &[u32], sampling: &Sampling) -> Draft {
    let of = |last: u32, depth: usize| {
        let logits = logits(DRAFTER, last, text.len() + depth);
        sampling.distribution(&logits, &[])
    };
    let anchor = text[text.len() - 1];
    let sequence = DraftSequence::new(0, text, 2, &[]).drawn(Some(sampling));
    match kind {
        Drafts::OneHot | Drafts::Drawn => {
            let (mut chain, mut last) = (Draft::default(), anchor);
            for depth in 0..2 {
                let q = of(last, depth);
                last = match kind {
                    Drafts::OneHot => q.best(),
                    _ => q.draw(sequence.noise(depth as u32)),
                };
                chain.tokens.push(last);
                if kind == Drafts::Drawn {
                    chain.drawn_from.push(q);
                }
            }
            chain
        }
        Drafts::Tree => {
            let mut growth = TopK { k: 2 }.grow(5, 2);
            loop {
                let frontier = growth.frontier();
                if frontier.is_empty() {
                    return growth.finish();
                }
                let lists: Vec<Vec<Candidate>> = frontier
                    .iter()
                    .map(|node| {
                        let depth = node.map_or(0, |node| growth.so_far().path(node).len());
                        let last = node.map_or(anchor, |node| growth.so_far().tokens[node as usize]);
                        let mut list: Vec<Candidate> =
                            of(last, depth).iter().map(|(id, p)| Candidate { id, log_probability: p.ln() }).collect();
                        list.sort_by(|a, b| b.log_probability.total_cmp(&a.log_probability));
                        list
                    })
                    .collect();
                growth.expand(&lists.iter().map(Vec::as_slice).collect::<Vec<_>>());
            }
        }
        Drafts::DrawnTree => {
            let mut tree = Draft::default();
            let mut open = vec![(None, anchor, 0)];
            while let Some((parent, last, depth)) = open.pop() {
                let q = of(last, depth);
                let mut left = q.clone();
                for _ in 0..2 {
                    let token = left.draw(sequence.noise(tree.len() as u32));
                    tree.tokens.push(token);
                    tree.parents.push(parent);
                    tree.drawn_from.push(q.clone());
                    if depth == 0 {
                        open.push((Some(tree.len() as u32 - 1), token, 1));
                    }
                    left = Distribution::from_weights(left.iter().filter(|(id, _)| *id != token)).unwrap();
                }
            }
            tree
        }
    }
}

/// χ² of the texts that a rule emits, and its degrees of freedom.
fn chi_square(rule: &dyn AcceptanceRule, kind: Drafts, temperature: f64) -> (f64, f64) {
    let cells = VOCAB.pow(LENGTH as u32);
    let mut counts = vec![0f64; cells];
    for seed in 0..TEXTS {
        let sampling = Sampling { temperature, seed, ..Sampling::default() };
        let mut text = vec![0];
        while text.len() <= LENGTH {
            let draft = draft(kind, &text, &sampling);
            assert_eq!(draft.fault(), None);
            let depths = draft.depths();
            let mut rows = logits(TARGET, text[text.len() - 1], text.len());
            for (node, depth) in depths.iter().enumerate() {
                rows.extend(logits(TARGET, draft.tokens[node], text.len() + *depth as usize));
            }
            let target = TargetRows::Logits { logits: &rows, vocab: VOCAB };
            let accepted = rule.accept(&Verification::new(&draft, &text, &sampling, target));
            text.extend(accepted.nodes.iter().map(|node| draft.tokens[*node as usize]));
            text.push(accepted.bonus);
        }
        let cell = text[1..=LENGTH].iter().fold(0, |cell, id| cell * VOCAB + *id as usize);
        counts[cell] += 1.0;
    }
    let (mut chi, mut used) = (0.0, 0.0);
    // What is expected too seldom is counted together.
    let mut rare = (0.0, 0.0);
    let part = |expected: f64, count: f64| (count - expected).powi(2) / expected;
    for (cell, count) in counts.iter().enumerate() {
        let (mut expected, mut last) = (TEXTS as f64, 0);
        for place in 0..LENGTH {
            let id = cell / VOCAB.pow((LENGTH - 1 - place) as u32) % VOCAB;
            expected *= softmax(TARGET, last, 1 + place, temperature)[id];
            last = id as u32;
        }
        if expected < 10.0 {
            rare = (rare.0 + expected, rare.1 + count);
            continue;
        }
        chi += part(expected, *count);
        used += 1.0;
    }
    if rare.0 > 0.0 {
        chi += part(rare.0, rare.1);
        used += 1.0;
    }
    assert!(used > cells as f64 / 2.0, "too few texts: {used} of {cells} cells are of use");
    (chi, used - 1.0)
}

/// The 0.1 % quantile, by Wilson and Hilferty.
fn bound(freedom: f64) -> f64 {
    let spread = 2.0 / (9.0 * freedom);
    freedom * (1.0 - spread + 3.0902 * spread.sqrt()).powi(3)
}

#[test]
fn lossless_rules_follow_the_target() {
    let rules = [&Match as &dyn AcceptanceRule, &Rejection, &Block];
    for temperature in [0.5, 1.0, 1.7] {
        for kind in [Drafts::OneHot, Drafts::Drawn, Drafts::Tree, Drafts::DrawnTree] {
            for rule in rules {
                let (chi, freedom) = chi_square(rule, kind, temperature);
                let bound = bound(freedom);
                eprintln!("{} {kind:?} at {temperature}: χ² {chi:.1}, bound {bound:.1}", rule.name());
                assert!(chi < bound, "{} {kind:?} at {temperature}: χ² {chi} beyond {bound}", rule.name());
            }
        }
    }
}

/// Rejection sampling with a mistake.
#[derive(Clone, Copy, Debug)]
enum Biased {
    /// In the place of a rejected token stands one of p, not of what p has beyond q.
    NoResidual,
    /// The residual is drawn from as it is, though it does not sum to 1.
    ResidualNotNormalised,
    /// A drawn token is accepted as if it had been chosen without chance, and replaced as if it had not.
    QForgottenInTheRatio,
    /// A drawn token is accepted by p ÷ q, and replaced as if it had been chosen without chance.
    QForgottenInTheResidual,
    /// The noise that rejected a token chooses the one in its place.
    NoiseReused,
    /// The noise that drew a token judges it.
    DraftNoiseReused,
    /// The softmax as q of a token that was chosen as its largest.
    SoftmaxOfArgmax,
}

impl AcceptanceRule for Biased {
    fn name(&self) -> &'static str {
        "biased"
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        let sampling = verification.sampling;
        let mut nodes: Vec<u32> = Vec::new();
        loop {
            let depth = nodes.len();
            let position = verification.position(depth);
            let p = verification.distribution(nodes.last().copied());
            if depth == verification.draft.len() {
                return Accepted { nodes, bonus: p.draw(sampling.noise(position, Purpose::Token)) };
            }
            let token = verification.token(depth as u32);
            let softmax = || {
                let last = if depth == 0 {
                    verification.text[verification.text.len() - 1]
                } else {
                    verification.token(depth as u32 - 1)
                };
                sampling.distribution(&logits(DRAFTER, last, verification.text.len() + depth), &[])
            };
            let q = match self {
                Self::SoftmaxOfArgmax => softmax(),
                _ => verification.drawn_from(depth as u32).unwrap().clone(),
            };
            let noise = match self {
                Self::DraftNoiseReused => sampling.noise_of(verification.position(0), depth as u32, Purpose::Draft),
                _ => sampling.noise(position, Purpose::Accept),
            };
            let of_draft = if matches!(self, Self::QForgottenInTheRatio) { 1.0 } else { q.probability(token) };
            if noise * of_draft < p.probability(token) {
                nodes.push(depth as u32);
                continue;
            }
            let q = if matches!(self, Self::QForgottenInTheResidual) { Distribution::one_hot(token) } else { q };
            let rest = p.iter().map(|(id, of)| (id, (of - q.probability(id)).max(0.0)));
            let chosen = match self {
                Self::NoiseReused => noise,
                _ => sampling.noise(position, Purpose::Residual),
            };
            let bonus = match self {
                Self::NoResidual => p.draw(chosen),
                Self::ResidualNotNormalised => {
                    let mut left = chosen;
                    rest.clone()
                        .find(|(_, weight)| {
                            left -= weight;
                            left < 0.0
                        })
                        .map_or(VOCAB as u32 - 1, |(id, _)| id)
                }
                _ => Distribution::from_weights(rest).unwrap_or(p).draw(chosen),
            };
            return Accepted { nodes, bonus };
        }
    }
}

/// Block verification is not lossless where a step's noise is that of the position: what rejected a token decides again.
#[derive(Clone, Copy, Debug)]
struct BlockByPosition;

impl AcceptanceRule for BlockByPosition {
    fn name(&self) -> &'static str {
        "block by position"
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        // By definition for chains of two tokens chosen without chance.
        let noise = [0, 1].map(|depth| verification.sampling.noise(verification.position(depth), Purpose::Accept));
        let p = [None, Some(0), Some(1)].map(|node| verification.distribution(node));
        let [first, second] = [0, 1].map(|node| p[node as usize].probability(verification.token(node)));
        let accepting = [first * (1.0 - second) / (first * (1.0 - second) + 1.0 - first), first * second];
        let accepted = (0..2).rev().find(|depth| noise[*depth] < accepting[*depth]).map_or(0, |depth| depth + 1);
        let nodes = (0..accepted as u32).collect();
        let position = verification.position(accepted);
        if accepted == 2 {
            return Accepted { nodes, bonus: p[2].draw(verification.sampling.noise(position, Purpose::Token)) };
        }
        let token = verification.token(accepted as u32);
        let rest = Distribution::from_weights(p[accepted].iter().filter(|(id, _)| *id != token)).unwrap();
        Accepted { nodes, bonus: rest.draw(verification.sampling.noise(position, Purpose::Residual)) }
    }
}

#[test]
fn noise_of_the_position_is_found_in_block_verification() {
    let (chi, freedom) = chi_square(&BlockByPosition, Drafts::OneHot, 1.0);
    assert!(chi > bound(freedom), "χ² {chi} within {}", bound(freedom));
}

#[test]
fn planted_biases_are_found() {
    let all = [
        Biased::NoResidual,
        Biased::ResidualNotNormalised,
        Biased::QForgottenInTheRatio,
        Biased::QForgottenInTheResidual,
        Biased::NoiseReused,
        Biased::DraftNoiseReused,
        Biased::SoftmaxOfArgmax,
    ];
    for bias in all {
        let kind = if matches!(bias, Biased::SoftmaxOfArgmax) { Drafts::OneHot } else { Drafts::Drawn };
        let (chi, freedom) = chi_square(&bias, kind, 1.0);
        let bound = bound(freedom);
        eprintln!("{bias:?}: χ² {chi:.1}, bound {bound:.1}");
        assert!(chi > bound, "{bias:?} passes: χ² {chi} within {bound}");
    }
}
