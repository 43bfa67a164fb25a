//! What a drafter hands over: tokens in a chain or a tree, and the distributions they come from.

use std::fmt;

/// A distribution over ids, sparse: what is not listed has probability 0. Ids rise, probabilities are positive, finite,
/// and sum to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    ids: Vec<u32>,
    probabilities: Vec<f64>,
}

impl Distribution {
    /// All of it on one id.
    #[must_use]
    pub fn one_hot(id: u32) -> Self {
        Self { ids: vec![id], probabilities: vec![1.0] }
    }

    /// Of ids with weights, in any order: what is not positive and finite is left out, the rest normalised. `None` where
    /// nothing is left.
    #[must_use]
    pub fn from_weights(weights: impl IntoIterator<Item = (u32, f64)>) -> Option<Self> {
        let mut kept: Vec<(u32, f64)> =
            weights.into_iter().filter(|(_, weight)| weight.is_finite() && *weight > 0.0).collect();
        if !kept.is_sorted_by(|a, b| a.0 < b.0) {
            kept.sort_by_key(|(id, _)| *id);
            kept.dedup_by(|later, earlier| {
                let same = later.0 == earlier.0;
                earlier.1 += if same { later.1 } else { 0.0 };
                same
            });
        }
        // Divided by the largest first, so that the sum is finite.
        let largest = kept.iter().fold(0.0, |most: f64, (_, weight)| most.max(*weight));
        let total: f64 = kept.iter().map(|(_, weight)| weight / largest).sum();
        let (ids, probabilities) = kept.into_iter().map(|(id, weight)| (id, weight / largest / total)).unzip();
        Some(Self { ids, probabilities }).filter(|all: &Self| !all.ids.is_empty())
    }

    /// The ids, rising.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Their probabilities.
    #[must_use]
    pub fn probabilities(&self) -> &[f64] {
        &self.probabilities
    }

    /// Ids and probabilities, ids rising.
    pub fn iter(&self) -> impl Iterator<Item = (u32, f64)> + Clone {
        self.ids.iter().copied().zip(self.probabilities.iter().copied())
    }

    /// The probability of an id.
    #[must_use]
    pub fn probability(&self, id: u32) -> f64 {
        self.ids.binary_search(&id).map_or(0.0, |place| self.probabilities[place])
    }

    /// The most likely id, the smallest of equals.
    #[must_use]
    pub fn best(&self) -> u32 {
        let better = |best: (u32, f64), one: (u32, f64)| if one.1 > best.1 { one } else { best };
        self.iter().reduce(better).map_or(0, |(id, _)| id)
    }

    /// The id in which `noise`, from 0 to below 1, falls.
    #[must_use]
    pub fn draw(&self, noise: f64) -> u32 {
        let mut left = noise;
        for (id, probability) in self.iter() {
            left -= probability;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding may leave a rest.
        self.ids.last().copied().unwrap_or(0)
    }

    /// Entropy in nats.
    #[must_use]
    pub fn entropy(&self) -> f64 {
        -self.probabilities.iter().map(|p| p * p.ln()).sum::<f64>()
    }
}

/// Drafted tokens of one sequence: a chain, or a tree whose root is the anchor. Nodes are counted from 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Draft {
    /// The token of each node.
    pub tokens: Vec<u32>,
    /// The parent of each node; `None` is the anchor. A parent comes before its children. Empty for a chain, in which
    /// each node is the parent of the next.
    pub parents: Vec<Option<u32>>,
    /// The distribution that each node's token was **really** drawn from, for drafters that sample; empty where tokens
    /// were chosen without chance (the most likely, a look-up), whose distribution is one-hot. Siblings are drawn from
    /// one distribution, in the order of the nodes and without replacement.
    pub drawn_from: Vec<Distribution>,
    /// How likely the drafter takes each node to be accepted where its parent was, from 0 to 1; empty where it does not
    /// know. It decides how much of the draft is verified, never what is emitted.
    pub confidence: Vec<f64>,
}

impl From<Vec<u32>> for Draft {
    /// A chain of tokens chosen without chance.
    fn from(tokens: Vec<u32>) -> Self {
        Self { tokens, ..Self::default() }
    }
}

impl Draft {
    /// A tree of tokens chosen without chance.
    #[must_use]
    pub fn tree(tokens: Vec<u32>, parents: Vec<Option<u32>>) -> Self {
        Self { tokens, parents, ..Self::default() }
    }

    /// Nodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was drafted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The parent of a node.
    #[must_use]
    pub fn parent(&self, node: u32) -> Option<u32> {
        match self.parents.get(node as usize) {
            Some(parent) => *parent,
            None => node.checked_sub(1),
        }
    }

    /// Whether each node is the parent of the next.
    #[must_use]
    pub fn is_chain(&self) -> bool {
        (0..).zip(&self.parents).all(|(node, parent): (u32, _)| *parent == node.checked_sub(1))
    }

    /// The depth of each node: 1 behind the anchor.
    #[must_use]
    pub fn depths(&self) -> Vec<u32> {
        let mut depths: Vec<u32> = Vec::with_capacity(self.len());
        for node in 0..self.len() as u32 {
            let parent = self.parent(node).and_then(|parent| depths.get(parent as usize));
            depths.push(parent.map_or(1, |depth| depth + 1));
        }
        depths
    }

    /// The nodes behind a node, in order; behind the anchor for `None`.
    pub fn children(&self, of: Option<u32>) -> impl Iterator<Item = u32> + '_ {
        // A parent comes before its children.
        (of.map_or(0, |node| node + 1)..self.len() as u32).filter(move |node| self.parent(*node) == of)
    }

    /// The nodes from behind the anchor to `node`, that included.
    #[must_use]
    pub fn path(&self, node: u32) -> Vec<u32> {
        let mut path: Vec<u32> = std::iter::successors(Some(node), |node| self.parent(*node)).collect();
        path.reverse();
        path
    }

    /// Keeps the nodes that `keep` wants and whose parents are kept.
    #[must_use]
    pub fn filtered(&self, mut keep: impl FnMut(u32) -> bool) -> Self {
        let mut places: Vec<Option<u32>> = Vec::with_capacity(self.len());
        let mut kept = Self::default();
        let chain = self.parents.is_empty();
        for node in 0..self.len() as u32 {
            let parent = self.parent(node).map(|parent| places.get(parent as usize).copied().flatten());
            let stays = parent != Some(None) && keep(node);
            places.push(stays.then_some(kept.tokens.len() as u32));
            if !stays {
                continue;
            }
            let place = node as usize;
            kept.tokens.push(self.tokens[place]);
            if !chain {
                kept.parents.push(parent.flatten());
            }
            kept.drawn_from.extend(self.drawn_from.get(place).cloned());
            kept.confidence.extend(self.confidence.get(place).copied());
        }
        kept
    }

    /// The nodes up to a depth.
    #[must_use]
    pub fn up_to_depth(&self, depth: u32) -> Self {
        let depths = self.depths();
        self.filtered(|node| depths[node as usize] <= depth)
    }

    /// What is wrong with its shape, as a sentence.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let lists = [
            ("parents", self.parents.len()),
            ("drawn_from", self.drawn_from.len()),
            ("confidence", self.confidence.len()),
        ];
        if let Some((name, length)) = lists.iter().find(|(_, length)| *length > 0 && *length != self.len()) {
            return Some(format!("{length} {name} for {} tokens", self.len()));
        }
        for (node, parent) in (0..).zip(&self.parents) {
            if let Some(parent) = parent
                && *parent >= node
            {
                return Some(format!("node {node} has node {parent} for a parent, which does not come before it"));
            }
        }
        None
    }
}

/// An id that may follow, and the natural logarithm of its probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The id.
    pub id: u32,
    /// ln of its probability; what is left out of a list has the rest.
    pub log_probability: f64,
}

/// For each slot behind the anchor the ids that may stand there, the most likely first, whatever stands in the slots
/// before: what a block drafter or independent heads know. A [`TreeBuilder`](crate::TreeBuilder) makes the tree.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Marginals {
    /// One list for each slot.
    pub slots: Vec<Vec<Candidate>>,
}

impl fmt::Display for Draft {
    /// Tokens, with their parents where it is a tree.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut list = f.debug_list();
        for (node, token) in (0..).zip(&self.tokens) {
            match self.parents.is_empty() {
                true => list.entry(token),
                false => list.entry(&(token, self.parent(node))),
            };
        }
        list.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{Distribution, Draft};

    #[test]
    fn a_distribution_takes_what_is_finite() {
        let some = Distribution::from_weights([(7, 1.0), (3, 2.0), (9, f64::NAN), (1, -1.0), (3, 1.0)]).unwrap();
        assert_eq!((some.ids(), some.probabilities()), (&[3, 7][..], &[0.75, 0.25][..]));
        assert_eq!((some.probability(7), some.probability(8), some.best()), (0.25, 0.0, 3));
        assert_eq!((some.draw(0.0), some.draw(0.74), some.draw(0.76), some.draw(1.0)), (3, 3, 7, 7));
        assert_eq!(Distribution::from_weights([(1, f64::INFINITY), (2, 0.0)]), None);
        let huge = Distribution::from_weights([(0, f64::MAX), (1, f64::MAX)]).unwrap();
        assert_eq!(huge.probabilities(), [0.5, 0.5]);
    }

    #[test]
    fn a_tree_knows_its_paths() {
        let tree = Draft::tree(vec![10, 11, 12, 13, 14], vec![None, None, Some(0), Some(2), Some(1)]);
        assert_eq!(tree.fault(), None);
        assert!(!tree.is_chain());
        assert_eq!(tree.depths(), [1, 1, 2, 3, 2]);
        assert_eq!(tree.path(3), [0, 2, 3]);
        assert_eq!(tree.children(None).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(tree.children(Some(0)).collect::<Vec<_>>(), [2]);
        let cut = tree.up_to_depth(2);
        assert_eq!((cut.tokens, cut.parents), (vec![10, 11, 12, 14], vec![None, None, Some(0), Some(1)]));
        let without = tree.filtered(|node| node != 0);
        assert_eq!((without.tokens, without.parents), (vec![11, 14], vec![None, Some(0)]));
        assert!(Draft::tree(vec![1, 2], vec![Some(0), None]).fault().is_some());
        assert!(Draft::tree(vec![1, 2], vec![None]).fault().is_some());
        let chain = Draft::from(vec![1, 2, 3]);
        assert!(chain.is_chain() && Draft::tree(vec![1, 2], vec![None, Some(0)]).is_chain());
        assert_eq!((chain.depths(), chain.path(2)), (vec![1, 2, 3], vec![0, 1, 2]));
    }
}
