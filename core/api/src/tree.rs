//! From candidates to a tree: which continuations are worth a row of the target's pass.

use std::{cmp::Ordering, collections::BinaryHeap, fmt::Debug};

use serde::Deserialize;

use crate::{Candidate, Draft, Marginals, strategy};

/// Candidates of a slot that a drafter is asked for at the most: a list of them is read back for every node.
pub const MOST_CANDIDATES: u32 = 64;

/// Makes trees of drafted tokens out of candidates and their probabilities. Registered with
/// [`register_tree_builder!`](crate::register_tree_builder) and named in `speculative.tree`.
///
/// It serves two kinds of drafters. One that knows the candidates of every slot at once hands [`Marginals`] over, and the
/// engine calls [`build`](Self::build). One whose candidates depend on what stands before runs [`grow`](Self::grow) by
/// itself: it asks for the nodes whose followers are wanted, runs its model on them, and says what may follow.
pub trait TreeBuilder: Debug + Send + Sync {
    /// The name users select it by.
    fn name(&self) -> &'static str;

    /// Whether it makes anything but chains.
    fn branches(&self) -> bool {
        true
    }

    /// Candidates of a slot that can matter in a tree of up to `nodes` nodes: no node has more children than a tree has
    /// nodes. Of more than [`MOST_CANDIDATES`] so many are told.
    fn candidates(&self, nodes: u32) -> u32 {
        nodes
    }

    /// A tree of up to `nodes` nodes and `depth` levels under way.
    fn grow(&self, nodes: u32, depth: u32) -> Box<dyn TreeGrowth>;

    /// The tree of these marginals.
    fn build(&self, marginals: &Marginals, nodes: u32, depth: u32) -> Draft {
        let mut growth = self.grow(nodes, depth.min(marginals.slots.len() as u32));
        // Depths of the nodes so far: 1 behind the anchor, whose children are of slot 0.
        let mut depths: Vec<u32> = Vec::new();
        loop {
            let frontier = growth.frontier();
            if frontier.is_empty() {
                return growth.finish();
            }
            let so_far = growth.so_far();
            for node in depths.len() as u32..so_far.len() as u32 {
                let parent = so_far.parent(node).and_then(|parent| depths.get(parent as usize));
                depths.push(parent.map_or(1, |depth| depth + 1));
            }
            let slot = |node: &Option<u32>| node.map_or(0, |node| depths[node as usize]) as usize;
            let candidates: Vec<&[Candidate]> =
                frontier.iter().map(|node| marginals.slots.get(slot(node)).map_or(&[][..], Vec::as_slice)).collect();
            growth.expand(&candidates);
        }
    }
}

/// A tree under way.
pub trait TreeGrowth: Debug + Send {
    /// Nodes of [`so_far`](Self::so_far) whose followers are wanted next, all at one depth; `None` is the anchor. Empty
    /// where the tree is complete.
    fn frontier(&self) -> Vec<Option<u32>>;

    /// The candidates behind each node of the frontier, the most likely first. Lists may be short or empty.
    fn expand(&mut self, candidates: &[&[Candidate]]);

    /// All nodes there are so far, more of them than the tree will have.
    fn so_far(&self) -> &Draft;

    /// The tree. Its [`confidence`](Draft::confidence) is the candidates'; its tokens were chosen without chance.
    fn finish(self: Box<Self>) -> Draft;
}

/// What kind of tree the engine wants of a drafter.
#[derive(Clone, Copy, Debug)]
pub struct TreeWish<'a> {
    /// Who makes it.
    pub builder: &'a dyn TreeBuilder,
    /// Nodes of a sequence's tree at the most. Its depth is at most the sequence's width.
    pub nodes: u32,
    /// Candidates of a slot that are worth telling.
    pub candidates: u32,
}

/// Nodes with the logarithms of their joint probabilities.
#[derive(Debug, Default)]
struct Scored {
    draft: Draft,
    scores: Vec<f64>,
    depths: Vec<u32>,
}

impl Scored {
    fn score(&self, node: Option<u32>) -> f64 {
        node.map_or(0.0, |node| self.scores[node as usize])
    }

    fn depth(&self, node: Option<u32>) -> u32 {
        node.map_or(0, |node| self.depths[node as usize])
    }

    fn add(&mut self, parent: Option<u32>, candidate: Candidate) -> u32 {
        self.scores.push(self.score(parent) + candidate.log_probability);
        self.depths.push(self.depth(parent) + 1);
        self.draft.tokens.push(candidate.id);
        self.draft.parents.push(parent);
        self.draft.confidence.push(candidate.log_probability.exp().min(1.0));
        self.draft.tokens.len() as u32 - 1
    }

    /// The `most` best of `nodes`, in the order of the nodes; of equal ones the earlier.
    fn best(&self, mut nodes: Vec<u32>, most: usize) -> Vec<u32> {
        nodes.sort_by(|a, b| self.scores[*b as usize].total_cmp(&self.scores[*a as usize]).then(a.cmp(b)));
        nodes.truncate(most);
        nodes.sort_unstable();
        nodes
    }
}

/// Candidates that can be ranked.
fn usable(candidates: &[Candidate]) -> impl Iterator<Item = Candidate> + '_ {
    candidates.iter().copied().filter(|candidate| candidate.log_probability > f64::NEG_INFINITY)
}

/// `chain`: always the most likely.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chain;

impl TreeBuilder for Chain {
    fn name(&self) -> &'static str {
        "chain"
    }

    fn branches(&self) -> bool {
        false
    }

    fn candidates(&self, _: u32) -> u32 {
        1
    }

    fn grow(&self, nodes: u32, depth: u32) -> Box<dyn TreeGrowth> {
        let level = Level { width: 1, nodes: nodes.min(depth) as usize, depth, ..Level::default() };
        Box::new(Level { frontier: level.first_frontier(), ..level })
    }
}

/// `top-k`: level by level, the k likeliest children of each of k nodes, of which the k likeliest by joint probability
/// are followed; of all that were met, the likeliest stay. Source: EAGLE-2, arXiv 2406.16858.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TopK {
    /// Children of a node, and nodes that are followed; 1 to [`MOST_CANDIDATES`].
    pub k: u32,
}

impl Default for TopK {
    fn default() -> Self {
        Self { k: 4 }
    }
}

impl TreeBuilder for TopK {
    fn name(&self) -> &'static str {
        "top-k"
    }

    fn candidates(&self, _: u32) -> u32 {
        self.k
    }

    fn grow(&self, nodes: u32, depth: u32) -> Box<dyn TreeGrowth> {
        let level = Level { width: self.k.max(1) as usize, nodes: nodes as usize, depth, ..Level::default() };
        Box::new(Level { frontier: level.first_frontier(), ..level })
    }
}

/// Growth by levels.
#[derive(Debug, Default)]
struct Level {
    width: usize,
    nodes: usize,
    depth: u32,
    all: Scored,
    frontier: Vec<Option<u32>>,
}

impl Level {
    fn first_frontier(&self) -> Vec<Option<u32>> {
        if self.nodes > 0 && self.depth > 0 { vec![None] } else { Vec::new() }
    }
}

impl TreeGrowth for Level {
    fn frontier(&self) -> Vec<Option<u32>> {
        self.frontier.clone()
    }

    fn expand(&mut self, candidates: &[&[Candidate]]) {
        let frontier = std::mem::take(&mut self.frontier);
        let mut level = Vec::new();
        for (parent, candidates) in frontier.into_iter().zip(candidates) {
            level.extend(usable(candidates).take(self.width).map(|candidate| self.all.add(parent, candidate)));
        }
        let deep_enough = level.first().is_some_and(|node| self.all.depths[*node as usize] >= self.depth);
        if !deep_enough {
            self.frontier = self.all.best(level, self.width).into_iter().map(Some).collect();
        }
    }

    fn so_far(&self) -> &Draft {
        &self.all.draft
    }

    fn finish(self: Box<Self>) -> Draft {
        // Probabilities fall along a path and ancestors come first, so a node that stays has its parent.
        let stay = self.all.best((0..self.all.draft.len() as u32).collect(), self.nodes);
        let mut stay = stay.into_iter().peekable();
        self.all.draft.filtered(|node| stay.next_if_eq(&node).is_some())
    }
}

/// `best-first`: the likeliest prefixes of all, one by one from a heap. With marginals these are exactly the `nodes`
/// most probable ones, up to [`MOST_CANDIDATES`] nodes (beyond them among the candidates of that many ranks), the tree of highest expected acceptance if the marginals were the target's. Source: DDTree, arXiv
/// 2604.12989.
#[derive(Clone, Copy, Debug, Default)]
pub struct BestFirst;

impl TreeBuilder for BestFirst {
    fn name(&self) -> &'static str {
        "best-first"
    }

    fn grow(&self, nodes: u32, depth: u32) -> Box<dyn TreeGrowth> {
        let frontier = if nodes > 0 && depth > 0 { Some(None) } else { None };
        Box::new(Heap { nodes: nodes as usize, depth, frontier, ..Heap::default() })
    }
}

#[derive(Debug, Default)]
struct Heap {
    nodes: usize,
    depth: u32,
    all: Scored,
    /// The rank of each node among its siblings, and those of its ancestors before it.
    ranks: Vec<Vec<u32>>,
    lists: Vec<Vec<Candidate>>,
    waiting: BinaryHeap<Waiting>,
    frontier: Option<Option<u32>>,
}

/// A node that may be added.
#[derive(Debug, PartialEq)]
struct Waiting {
    score: f64,
    ranks: Vec<u32>,
    parent: Option<u32>,
    /// The candidates it is one of.
    list: usize,
}

impl Eq for Waiting {}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        // Of equally likely prefixes the one of lower ranks is first.
        self.score.total_cmp(&other.score).then_with(|| other.ranks.cmp(&self.ranks))
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Heap {
    fn wait(&mut self, parent: Option<u32>, list: usize, rank: u32) {
        if let Some(candidate) = self.lists[list].get(rank as usize) {
            let mut ranks = parent.map_or_else(Vec::new, |parent| self.ranks[parent as usize].clone());
            ranks.push(rank);
            let score = self.all.score(parent) + candidate.log_probability;
            self.waiting.push(Waiting { score, ranks, parent, list });
        }
    }
}

impl TreeGrowth for Heap {
    fn frontier(&self) -> Vec<Option<u32>> {
        self.frontier.into_iter().collect()
    }

    fn expand(&mut self, candidates: &[&[Candidate]]) {
        let (Some(parent), Some(candidates)) = (self.frontier.take(), candidates.first()) else { return };
        self.lists.push(usable(candidates).collect());
        self.wait(parent, self.lists.len() - 1, 0);
        while self.all.draft.len() < self.nodes {
            let Some(next) = self.waiting.pop() else { return };
            let rank = next.ranks.last().copied().unwrap_or(0);
            let node = self.all.add(next.parent, self.lists[next.list][rank as usize]);
            self.ranks.push(next.ranks);
            self.wait(next.parent, next.list, rank + 1);
            if self.all.depth(Some(node)) < self.depth && self.all.draft.len() < self.nodes {
                self.frontier = Some(Some(node));
                return;
            }
        }
    }

    fn so_far(&self) -> &Draft {
        &self.all.draft
    }

    fn finish(self: Box<Self>) -> Draft {
        self.all.draft
    }
}

/// `static`: always the same paths of ranks, whatever the probabilities, as Medusa's (arXiv 2401.10774).
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Static {
    /// Each path is the rank of a candidate in every slot, 0 the most likely, below [`MOST_CANDIDATES`]. The beginnings
    /// of a path are paths too.
    pub paths: Vec<Vec<u32>>,
}

impl Default for Static {
    /// The paths whose ranks, counted from 1, have a product of up to 8: a rank r is about as likely as 1 ÷ r.
    fn default() -> Self {
        let mut paths: Vec<Vec<u32>> = Vec::new();
        let mut open: Vec<(Vec<u32>, u32)> = vec![(Vec::new(), 1)];
        while let Some((path, product)) = open.pop() {
            if path.len() < 6 {
                open.extend((0..8 / product).map(|rank| ([&path[..], &[rank]].concat(), product * (rank + 1))));
            }
            paths.push(path);
        }
        Self { paths }
    }
}

impl TreeBuilder for Static {
    fn name(&self) -> &'static str {
        "static"
    }

    fn candidates(&self, _: u32) -> u32 {
        self.paths.iter().flatten().max().map_or(1, |rank| rank.saturating_add(1))
    }

    fn grow(&self, nodes: u32, depth: u32) -> Box<dyn TreeGrowth> {
        let mut paths: Vec<Vec<u32>> = self
            .paths
            .iter()
            .flat_map(|path| (1..=path.len().min(depth as usize)).map(|end| path[..end].to_vec()))
            .collect();
        // The likeliest, as far as ranks tell, are those that stay; a path's beginnings come before it.
        let unlikely = |path: &[u32]| path.iter().map(|rank| f64::from(*rank) + 1.0).product::<f64>();
        paths.sort_by(|a, b| {
            unlikely(a).total_cmp(&unlikely(b)).then_with(|| a.len().cmp(&b.len())).then_with(|| a.cmp(b))
        });
        paths.dedup();
        paths.truncate(nodes as usize);
        paths.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
        let frontier = if paths.is_empty() { Vec::new() } else { vec![None] };
        Box::new(Fixed { paths, frontier, ..Fixed::default() })
    }
}

#[derive(Debug, Default)]
struct Fixed {
    /// Those to come, the shortest first.
    paths: Vec<Vec<u32>>,
    all: Scored,
    /// The path of each node.
    ranks: Vec<Vec<u32>>,
    frontier: Vec<Option<u32>>,
}

impl TreeGrowth for Fixed {
    fn frontier(&self) -> Vec<Option<u32>> {
        self.frontier.clone()
    }

    fn expand(&mut self, candidates: &[&[Candidate]]) {
        let frontier = std::mem::take(&mut self.frontier);
        for (parent, candidates) in frontier.into_iter().zip(candidates) {
            let candidates: Vec<_> = usable(candidates).collect();
            let before = parent.map_or_else(Vec::new, |parent| self.ranks[parent as usize].clone());
            for path in &self.paths {
                let Some((rank, rest)) = path.split_last() else { continue };
                if *rest == before[..]
                    && let Some(candidate) = candidates.get(*rank as usize)
                {
                    let node = self.all.add(parent, *candidate);
                    self.ranks.push(path.clone());
                    // A path that goes on: its nodes come in the next round.
                    if self.paths.iter().any(|other| other.len() > path.len() && other[..path.len()] == path[..]) {
                        self.frontier.push(Some(node));
                    }
                }
            }
        }
    }

    fn so_far(&self) -> &Draft {
        &self.all.draft
    }

    fn finish(self: Box<Self>) -> Draft {
        self.all.draft
    }
}

strategy::built_in! {
    dyn TreeBuilder, TREE_BUILDERS: [
        "best-first" => |parameters| strategy::none(parameters).map(|()| Box::new(BestFirst) as _),
        "chain" => |parameters| strategy::none(parameters).map(|()| Box::new(Chain) as _),
        "static" => |parameters| {
            let one = strategy::read::<Static>(parameters)?;
            match one.paths.iter().flatten().find(|rank| **rank >= MOST_CANDIDATES) {
                Some(rank) => Err(format!("paths: rank {rank}, 0 to {} are there", MOST_CANDIDATES - 1)),
                None => Ok(Box::new(one) as _),
            }
        },
        "top-k" => |parameters| match strategy::read::<TopK>(parameters)? {
            TopK { k: 0 } => Err("k: 0 candidates make no tree, at least 1".into()),
            TopK { k } if k > MOST_CANDIDATES => Err(format!("k: {k} candidates, at most {MOST_CANDIDATES}")),
            one => Ok(Box::new(one) as _),
        },
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{BestFirst, Chain, Static, TopK, TreeBuilder};
    use crate::{Candidate, Draft, Marginals};

    fn marginals(slots: &[&[f64]]) -> Marginals {
        let slot = |(slot, probabilities): (usize, &&[f64])| {
            let of = |(rank, p): (usize, &f64)| Candidate { id: (10 * slot + rank) as u32, log_probability: p.ln() };
            probabilities.iter().enumerate().map(of).collect()
        };
        Marginals { slots: slots.iter().enumerate().map(slot).collect() }
    }

    fn paths(tree: &Draft) -> BTreeSet<Vec<u32>> {
        assert_eq!(tree.fault(), None);
        let tokens = |node| tree.path(node).iter().map(|node| tree.tokens[*node as usize]).collect();
        let all: BTreeSet<_> = (0..tree.len() as u32).map(tokens).collect();
        assert_eq!(all.len(), tree.len(), "a path stands twice: {tree}");
        all
    }

    #[test]
    fn a_chain_takes_the_most_likely() {
        let chain = Chain.build(&marginals(&[&[0.6, 0.4], &[0.5, 0.3], &[0.9]]), 8, 2);
        assert!(chain.is_chain());
        assert_eq!(chain.tokens, [0, 10]);
        assert_eq!(chain.confidence, [0.6, 0.5]);
        assert!(Chain.build(&marginals(&[&[0.6]]), 0, 4).is_empty());
        assert!(Chain.build(&marginals(&[]), 4, 4).is_empty());
    }

    #[test]
    fn best_first_known_answer() {
        // 0.6 · 0.5 = 0.3 and 0.4; then 0.6 · 0.3 = 0.18, 0.4 · 0.5 = 0.2.
        let tree = BestFirst.build(&marginals(&[&[0.6, 0.4], &[0.5, 0.3]]), 5, 2);
        assert_eq!(tree.tokens, [0, 1, 10, 10, 11]);
        assert_eq!(tree.parents, [None, None, Some(0), Some(1), Some(0)]);
    }

    /// All prefixes with their probabilities, by definition.
    fn every_prefix(marginals: &Marginals) -> Vec<(f64, Vec<u32>)> {
        let mut all: Vec<(f64, Vec<u32>)> = Vec::new();
        let mut level = vec![(0.0, Vec::new())];
        for slot in &marginals.slots {
            let mut next = Vec::new();
            for (score, path) in &level {
                for candidate in slot {
                    next.push((score + candidate.log_probability, [&path[..], &[candidate.id]].concat()));
                }
            }
            all.extend(next.iter().cloned());
            level = next;
        }
        all
    }

    #[test]
    fn best_first_is_the_most_probable_prefix_set() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        for _ in 0..60 {
            let slots: Vec<Vec<f64>> = (0..3)
                .map(|_| {
                    let mut p: Vec<f64> = (0..4).map(|_| random() + 0.01).collect();
                    let total: f64 = p.iter().sum();
                    p.iter_mut().for_each(|p| *p /= total);
                    p.sort_by(|a, b| b.total_cmp(a));
                    p
                })
                .collect();
            let marginals = marginals(&slots.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let mut all = every_prefix(&marginals);
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            for nodes in [1, 2, 7, 20, 84, 200] {
                let tree = BestFirst.build(&marginals, nodes, 3);
                let want: BTreeSet<_> = all.iter().take(nodes as usize).map(|(_, path)| path.clone()).collect();
                assert_eq!(paths(&tree), want);
                // With every candidate followed, the n best of all levels are the same.
                assert_eq!(paths(&TopK { k: 64 }.build(&marginals, nodes, 3)), want);
            }
        }
    }

    #[test]
    fn top_k_known_answer() {
        let marginals = marginals(&[&[0.5, 0.3, 0.2], &[0.7, 0.2, 0.1], &[0.6, 0.4]]);
        let tree = TopK { k: 2 }.build(&marginals, 6, 3);
        // Level 1: 0 and 1. Level 2: 0.35, 0.1, 0.21, 0.06, of which 0.35 and 0.21 are followed: 0.21, 0.14, 0.126, 0.084.
        let want: [&[u32]; 6] = [&[0], &[1], &[0, 10], &[1, 10], &[0, 10, 20], &[0, 10, 21]];
        assert_eq!(paths(&tree), want.iter().map(|path| path.to_vec()).collect());
    }

    #[test]
    fn static_paths_are_taken_whatever_is_likely() {
        let marginals = marginals(&[&[0.9, 0.1], &[0.5, 0.5]]);
        let tree = Static { paths: vec![vec![1, 1], vec![0]] }.build(&marginals, 9, 4);
        let want: [&[u32]; 3] = [&[0], &[1], &[1, 11]];
        assert_eq!(paths(&tree), want.iter().map(|path| path.to_vec()).collect());
        let default = Static::default().build(&marginals, 64, 4);
        assert_eq!(default.len(), 2 + 4);
        let few: [&[u32]; 3] = [&[0], &[0, 10], &[1]];
        let default = Static::default().build(&marginals, 4, 2);
        assert_eq!(paths(&default), few.iter().map(|path| path.to_vec()).chain([vec![0, 11]]).collect());
    }

    #[test]
    fn what_is_not_a_number_is_no_candidate() {
        let broken = Marginals { slots: vec![vec![Candidate { id: 1, log_probability: f64::NAN }]] };
        for builder in [&BestFirst as &dyn TreeBuilder, &Chain, &TopK::default(), &Static::default()] {
            assert!(builder.build(&broken, 4, 4).is_empty());
        }
    }
}
