//! Trees by a network that drafts token by token, level by level.

use polyattn_api::{
    AttentionKernel, BatchLayout, Candidate, Draft, DraftSequence, Proposal, ProposeContext, ProposerError, TreeGrowth,
    TreeMask, TreeWish,
};
use polyattn_device::{Buffer, Commands, Device, DeviceError};

use super::{ChainOrder, FeatureDrafter, FeatureHead, NextFeature};
use crate::{
    NnError,
    layer::Rows,
    ops::{self, LinearCall},
};

/// Memory for trees.
#[derive(Debug)]
pub(super) struct TreeMemory {
    /// Rows of a sequence at the most: the root and nodes behind it.
    rows: u32,
    sequences: u32,
    ids: Buffer,
    positions: Buffer,
    /// The hidden states that roots start from, then what each row of the last pass feeds on.
    states: Buffer,
    sources: Buffer,
    places: Buffer,
    chosen: Buffer,
    logits: Option<Buffer>,
}

/// The tree of a sequence under way.
struct Growing<'a> {
    sequence: &'a DraftSequence<'a>,
    growth: Box<dyn TreeGrowth + 'a>,
    /// The nodes that were run, the root first; a parent comes before its children.
    run: Vec<Option<u32>>,
}

impl Growing<'_> {
    fn row(&self, node: Option<u32>) -> Option<usize> {
        self.run.iter().position(|other| *other == node)
    }
}

impl TreeMemory {
    pub(super) fn new(
        device: &Device,
        sequences: u32,
        nodes: u32,
        hidden: u32,
        own_vocab: Option<u32>,
    ) -> Result<Self, DeviceError> {
        let rows = nodes + 1;
        let all = rows * sequences;
        let words = |rows: u32, width: u32| u64::from(rows) * u64::from(width) * 4;
        Ok(Self {
            rows,
            sequences,
            ids: device.alloc(words(all, 1), "draft tree ids")?,
            positions: device.alloc(words(all, 1), "draft tree positions")?,
            states: device.alloc(words(all + sequences, hidden), "draft tree states")?,
            sources: device.alloc(words(all, 1), "draft tree sources")?,
            places: device.alloc(words(all, 1), "draft tree places")?,
            chosen: device.alloc(words(all, hidden), "draft tree head rows")?,
            logits: own_vocab.map(|vocab| device.alloc(words(all, vocab), "draft tree logits")).transpose()?,
        })
    }
}

impl FeatureDrafter {
    /// Drafts a tree for each sequence. Each pass runs all nodes that were followed so far, over a tree mask, and adds
    /// what the builder wants to follow next: the builder is asked on the host, so each level is read back.
    pub(super) fn propose_trees(
        &self,
        context: &mut ProposeContext<'_>,
        order: &ChainOrder,
        widths: &[u32],
        wish: TreeWish<'_>,
        kernel: &dyn AttentionKernel,
        memory: &TreeMemory,
    ) -> Result<Proposal, ProposerError> {
        let sequences = context.sequences;
        if order.rows().len() > memory.sequences as usize {
            return Err(ProposerError::Unsupported(format!(
                "{} sequences in one step, at most {}",
                order.rows().len(),
                memory.sequences
            )));
        }
        let commands = &mut *context.commands;
        let drafted: Vec<u64> = order.rows().iter().map(|place| sequences[*place].id).collect();
        self.kept.gather(commands, &drafted, memory.states.whole())?;
        let mut growing: Vec<Growing<'_>> = order
            .rows()
            .iter()
            .map(|place| Growing {
                sequence: &sequences[*place],
                growth: wish.builder.grow(wish.nodes, widths[*place]),
                run: Vec::new(),
            })
            .collect();
        // Where the rows of each sequence began in the pass before.
        let mut before = vec![0u32; growing.len()];
        loop {
            let frontiers: Vec<Vec<Option<u32>>> = growing.iter().map(|one| one.growth.frontier()).collect();
            if frontiers.iter().all(Vec::is_empty) {
                break;
            }
            // What finds no room is not followed.
            let followed: Vec<Vec<Option<u32>>> = frontiers
                .iter()
                .zip(&growing)
                .map(|(frontier, one)| {
                    let room = (memory.rows as usize).saturating_sub(one.run.len());
                    frontier.iter().copied().take(room).collect()
                })
                .collect();
            let candidates = match followed.iter().all(Vec::is_empty) {
                true => Vec::new(),
                false => self.level(context, &mut growing, &followed, &mut before, wish, kernel, memory)?,
            };
            let mut candidates = candidates.into_iter();
            for ((one, frontier), followed) in growing.iter_mut().zip(&frontiers).zip(&followed) {
                if frontier.is_empty() {
                    continue;
                }
                let mut lists: Vec<Vec<Candidate>> = candidates.by_ref().take(followed.len()).collect();
                lists.resize(frontier.len(), Vec::new());
                one.growth.expand(&lists.iter().map(Vec::as_slice).collect::<Vec<_>>());
            }
        }
        let mut drafts = vec![Draft::default(); sequences.len()];
        for (one, place) in growing.into_iter().zip(order.rows()) {
            drafts[*place] = one.growth.finish();
        }
        Ok(Proposal::Host(drafts))
    }

    /// Runs all nodes so far and the followed ones; answers the candidates behind each of these, sequence by sequence.
    #[expect(clippy::too_many_arguments, reason = "one pass: what, where, with whom")]
    fn level(
        &self,
        context: &mut ProposeContext<'_>,
        growing: &mut [Growing<'_>],
        followed: &[Vec<Option<u32>>],
        before: &mut [u32],
        wish: TreeWish<'_>,
        kernel: &dyn AttentionKernel,
        memory: &TreeMemory,
    ) -> Result<Vec<Vec<Candidate>>, ProposerError> {
        let roots = growing.len() as u32;
        let (mut ids, mut positions, mut sources, mut places) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut batch = BatchLayout::new(self.page_size, self.pool_pages);
        let mut masks: Vec<Vec<usize>> = Vec::new();
        let mut longest = 0;
        for (number, (one, followed)) in growing.iter_mut().zip(followed).enumerate() {
            let first = ids.len() as u32;
            let ran = one.run.len();
            one.run.extend(followed);
            let anchor = one.sequence.tokens.len() as u32 - 1;
            let tree = one.growth.so_far();
            for (row, node) in one.run.iter().enumerate() {
                let path = node.map_or_else(Vec::new, |node| tree.path(node));
                let parent = match node {
                    None => number as u32,
                    Some(node) => roots + before[number] + one.row(tree.parent(*node)).unwrap_or(0) as u32,
                };
                ids.push(node.map_or(one.sequence.tokens[anchor as usize], |node| tree.tokens[node as usize]));
                positions.push(anchor - 1 + path.len() as u32);
                sources.push(parent);
                // A row sees the root, the nodes before it on its path, and itself.
                let seen = path.iter().filter_map(|node| one.row(Some(*node)));
                masks.push(std::iter::once(0).chain(seen).collect());
                if row >= ran {
                    places.push(first + row as u32);
                }
            }
            let rows = one.run.len() as u32;
            longest = longest.max(rows);
            let length = anchor - 1 + rows;
            batch.push(rows, length, self.pages(one.sequence.pages, length)?);
            before[number] = first;
        }
        let words = longest.div_ceil(32) as usize;
        let mut bits = vec![0u32; masks.len() * words];
        for (row, seen) in masks.iter().enumerate() {
            for place in seen {
                bits[row * words + place / 32] |= 1 << (place % 32);
            }
        }
        batch.tree = Some(TreeMask { words, bits });

        let rows = ids.len() as u32;
        let width = self.network.shape.hidden_size;
        for (buffer, numbers) in [
            (&memory.ids, &ids),
            (&memory.positions, &positions),
            (&memory.sources, &sources),
            (&memory.places, &places),
        ] {
            self.device.write(buffer, 0, numbers)?;
        }
        let commands = &mut *context.commands;
        let step = &self.memory;
        let (states, features) = (memory.states.whole(), step.features.whole());
        ops::gather_rows(commands, states, width, memory.sources.whole(), rows, features)?;
        let plan = kernel.plan(&batch)?;
        self.embed(commands, context.target, memory.ids.whole(), &positions)?;
        let input = self.enter(commands, &step.features, rows)?;
        let at = Rows { count: rows, positions: memory.positions.whole(), rope: &self.network.rope };
        let attention = self.attention(kernel, &plan);
        self.network.layer.forward_from(commands, input, &step.hidden, at, &attention, &step.layer)?;
        let normed = self.normed(commands, rows)?;
        let fed_on = match self.network.next {
            NextFeature::Output => &step.hidden,
            NextFeature::Normed => normed,
        };
        // All rows as one long row, behind the roots.
        let all = (memory.rows * memory.sequences + memory.sequences) * width;
        ops::copy_columns(commands, fed_on.whole(), rows * width, 1, memory.states.whole(), all, roots * width)?;
        let count = places.len() as u32;
        ops::gather_rows(commands, normed.whole(), width, memory.places.whole(), count, memory.chosen.whole())?;
        self.candidates(context, count, wish, memory)
    }

    /// The likeliest ids behind the chosen rows.
    fn candidates(
        &self,
        context: &mut ProposeContext<'_>,
        rows: u32,
        wish: TreeWish<'_>,
        memory: &TreeMemory,
    ) -> Result<Vec<Vec<Candidate>>, ProposerError> {
        let commands = &mut *context.commands;
        let hidden = memory.chosen.whole();
        let (FeatureHead::Own { weight, target_ids }, Some(logits)) = (&self.network.head, &memory.logits) else {
            let found = Candidates::new(&self.device, rows, wish.candidates.clamp(1, self.target_vocab))?;
            let (ids, logs) = (found.ids.whole(), found.logs.whole());
            context.target.head_top_k(commands, hidden, rows, found.k, ids, logs)?;
            return Ok(found.read(commands, |id| (id < self.target_vocab).then_some(id))?);
        };
        let out = logits.whole();
        let found = Candidates::new(&self.device, rows, wish.candidates.clamp(1, weight.rows))?;
        ops::linear(commands, &LinearCall { x: hidden, rows, weight, norm: None, bias: None, out, accumulate: false })?;
        ops::top_k(commands, out, rows, weight.rows, found.k, found.ids.whole(), found.logs.whole())?;
        Ok(found.read(commands, |id| match target_ids {
            None => (id < weight.rows).then_some(id),
            Some(target_ids) => target_ids.get(id as usize).copied(),
        })?)
    }
}

/// The likeliest ids of rows, on their way to the host.
#[derive(Debug)]
pub struct Candidates {
    /// Of each row.
    pub k: u32,
    /// `[rows, k]`, u32.
    pub ids: Buffer,
    /// Natural logarithms of their probabilities, `[rows, k]`, f32.
    pub logs: Buffer,
}

impl Candidates {
    /// Room for `k` ids of each of `rows` rows; at most 1,024.
    ///
    /// # Errors
    /// No memory.
    pub fn new(device: &Device, rows: u32, k: u32) -> Result<Self, DeviceError> {
        let k = k.min(1024);
        let bytes = u64::from(rows) * u64::from(k) * 4;
        Ok(Self { k, ids: device.alloc(bytes, "candidates")?, logs: device.alloc(bytes, "log-probabilities")? })
    }

    /// Submits what was recorded, and waits for the candidates of each row. `target_id` says which of the target's ids
    /// an id is; those that are none are left out.
    ///
    /// # Errors
    /// The device.
    pub fn read(
        self,
        commands: &mut Commands,
        target_id: impl Fn(u32) -> Option<u32>,
    ) -> Result<Vec<Vec<Candidate>>, NnError> {
        let (ids, logs) = (commands.read_back(self.ids.whole())?, commands.read_back(self.logs.whole())?);
        commands.flush()?;
        let (ids, logs) = (ids.wait_as::<u32>()?, logs.wait_as::<f32>()?);
        let k = self.k as usize;
        let row = |(ids, logs): (&[u32], &[f32])| {
            let of = |(id, log): (&u32, &f32)| {
                let id = target_id(*id)?;
                Some(Candidate { id, log_probability: f64::from(*log) })
            };
            ids.iter().zip(logs).filter_map(of).collect()
        };
        Ok(ids.chunks(k).zip(logs.chunks(k)).map(row).collect())
    }
}
