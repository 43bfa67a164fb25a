//! A drafter driven by hand: hidden states made up, drafts accepted and rejected at will. No engine stands in between,
//! because an engine's verification would hide what a wrong drafter does.

use std::{cell::RefCell, sync::Arc};

use polyattn_api::{
    BufferSlice, Commands, CommittedRows, Device, DraftAttention, DraftSequence, Drafter, EngineConfig, LoadContext,
    Outcome, Proposal, ProposeContext, ProposerError, ResolvedMoe, Role, TargetServices, resolve,
};
use polyattn_device::Readback;
use polyattn_nn::{decoder::Decoder, ops};

use super::{
    failed,
    subject::{Bench, CONTEXT, Ground},
    text::{PAGE, Part, TEXT_PAGES, TEXTS, Text},
};
use crate::Failure;

/// Drafted tokens from which on a drafter is taken for wide: it is asked for no more, to keep the trials short.
const WIDE: u32 = 8;

/// What was drafted.
#[derive(Clone, Debug, Default)]
pub(super) struct Drafts {
    /// For each sequence.
    pub(super) ids: Vec<Vec<u32>>,
    /// Rows of logits that the target's head was asked for, where it was.
    logits: Vec<Vec<f32>>,
}

impl Drafts {
    /// Of the only sequence.
    pub(super) fn only(&self) -> &[u32] {
        self.ids.first().map_or(&[], Vec::as_slice)
    }

    /// That this draft is that one, up to ties: the same logits within `tolerance`, and the same ids but where two
    /// logits lie as near to each other.
    pub(super) fn agree(&self, want: &Self, tolerance: f32, what: &str) -> Result<(), Failure> {
        if self.logits.len() == want.logits.len() {
            // Behind a tie a chain goes on from another token, so its logits are others.
            let tie = self.only().iter().zip(want.only()).position(|(a, b)| a != b);
            let rows = tie.map_or(want.logits.len(), |place| place + 1);
            for (row, (got, want)) in self.logits.iter().zip(&want.logits).enumerate().take(rows) {
                let most = largest(want);
                let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, |a: f32, b| match b.is_nan() {
                    true => f32::INFINITY,
                    false => a.max(b),
                });
                if apart > tolerance * most {
                    return Err(Failure::new(format!(
                        "{what}: row {row} of the draft's logits is up to {apart} off, the largest being {most}"
                    )));
                }
            }
        }
        self.agree_in_ids(want, tolerance, what)
    }

    /// The same without a look at the order of rows, which differs between batches.
    pub(super) fn agree_in_ids(&self, want: &Self, tolerance: f32, what: &str) -> Result<(), Failure> {
        for (sequence, (got, wanted)) in self.ids.iter().zip(&want.ids).enumerate() {
            let tied = |a: usize, b: usize| {
                want.logits.iter().any(|row| match (row.get(a), row.get(b)) {
                    (Some(x), Some(y)) => {
                        (x - y).abs() <= 2.0 * tolerance * largest(row) && row.iter().all(|other| other <= &x.max(*y))
                    }
                    _ => false,
                })
            };
            let differs = got.iter().zip(wanted).find(|(a, b)| a != b);
            match differs {
                Some((a, b)) if tied(*a as usize, *b as usize) => continue,
                None if got.len() == wanted.len() => continue,
                _ => {
                    let message = format!("{what}: sequence {sequence} is given {got:?} instead of {wanted:?}");
                    return Err(Failure::new(message));
                }
            }
        }
        Ok(())
    }
}

/// The largest magnitude of a row, at least 1.
fn largest(row: &[f32]) -> f32 {
    row.iter().fold(1.0, |most, x| most.max(x.abs()))
}

/// What every drafter of a trial is loaded with.
pub(super) struct Stage<'a> {
    pub(super) bench: &'a Bench,
    pub(super) ground: &'a Ground,
    decoder: Arc<Decoder>,
    config: EngineConfig,
    attention: Vec<DraftAttention>,
    moe: Option<ResolvedMoe>,
}

impl<'a> Stage<'a> {
    pub(super) fn open(bench: &'a Bench) -> Result<Self, Failure> {
        let ground = bench.ground()?;
        let config = ground.config()?;
        let resolution = resolve(&config, bench.device.facts(), &ground.registry)
            .map_err(|error| Failure::new(format!("'{}' cannot be resolved: {error}", ground.name())))?;
        let mut attention = Vec::new();
        for layer in &resolution.draft {
            let problem = layer.problem.clone().page_size(PAGE);
            let kernel = layer.backend.prepare(&bench.device, &problem).map_err(failed)?;
            attention.push(DraftAttention::new(Arc::clone(&problem.layer), kernel));
        }
        let moe = resolution.moe_of(Role::Draft).next().cloned();
        let config = resolution.draft_config.unwrap_or(config);
        Ok(Self { bench, ground, decoder: ground.decoder()?, config, attention, moe })
    }

    pub(super) fn vocab(&self) -> u32 {
        self.ground.facts.vocab_size
    }

    pub(super) fn tolerance(&self) -> f32 {
        self.bench.subject.relative_tolerance()
    }

    /// A text as [`Text::new`] makes it.
    pub(super) fn text(&self, place: u32, tokens: usize, seed: u64) -> Text {
        Text::new(place, tokens, seed, self.vocab())
    }

    /// What a drafter is loaded with; `change` may ask for something else.
    pub(super) fn load<'s>(&'s self, change: impl FnOnce(&mut LoadContext<'s>)) -> Result<Drive<'s>, ProposerError> {
        let mut context = LoadContext::new(&self.bench.device, &self.ground.facts, &self.config);
        context.checkpoint = self.ground.checkpoint.as_deref();
        context.attention = &self.attention;
        context.moe = self.moe.as_ref();
        context.pool_pages = TEXTS * TEXT_PAGES;
        context.page_size = PAGE;
        context.kv_dtype = self.config.kv_cache.dtype.unwrap_or(self.config.model.dtype.into());
        context.max_rows = CONTEXT;
        change(&mut context);
        let drafter = self.bench.proposer.load(&context)?;
        Ok(Drive { stage: self, drafter })
    }

    /// A drafter that has seen nothing.
    pub(super) fn drafter(&self) -> Result<Drive<'_>, Failure> {
        self.load(|_| {}).map_err(|error| Failure::new(format!("load: {error}")))
    }

    /// What a drafter that was given all of a text at once drafts for it.
    pub(super) fn fresh(&self, text: &Text, width: u32) -> Result<Drafts, Failure> {
        let mut drive = self.drafter()?;
        drive.commit(&[Part::all(text)])?;
        drive.propose(&[(text, width)])
    }

    fn device(&self) -> &Device {
        &self.bench.device
    }
}

/// A drafter at work.
pub(super) struct Drive<'a> {
    stage: &'a Stage<'a>,
    pub(super) drafter: Box<dyn Drafter>,
}

impl Drive<'_> {
    /// Tokens to ask for: as many as it drafts, up to a bound.
    pub(super) fn width(&self) -> u32 {
        self.drafter.max_tokens().min(WIDE)
    }

    /// Commits rows of each part, as after one pass over all of them.
    pub(super) fn commit(&mut self, parts: &[Part<'_>]) -> Result<(), Failure> {
        self.try_commit(parts, true).map_err(|error| Failure::new(format!("commit: {error}")))
    }

    /// The same with the drafter's own error, and perhaps without the taps it needs.
    pub(super) fn try_commit(&mut self, parts: &[Part<'_>], with_taps: bool) -> Result<(), ProposerError> {
        let width = self.drafter.taps().count() * self.stage.ground.facts.hidden_size as usize;
        let (mut taps, mut places, mut row) = (Vec::new(), Vec::new(), 0);
        for Part { text, from, rows, before, rejected } in parts {
            // Rows of nobody: they must not matter, so they may hold anything.
            let others = (0..*before).flat_map(|place| text.states(1_000_000 + place, 0, width));
            taps.extend(others.map(|x| 3.0 * x));
            for position in *from..from + rows {
                taps.extend(text.states(position, text.tokens[position as usize], width));
            }
            for (position, token) in (from + rows..).zip(*rejected) {
                taps.extend(text.states(position, *token, width));
            }
            places.push((row + before..row + before + rows).collect::<Vec<u32>>());
            row += before + rows + rejected.len() as u32;
        }
        let committed: Vec<_> = (parts.iter().zip(&places))
            .map(|(part, rows)| CommittedRows::new(part.text.id, rows, part.from, &part.text.tokens, &part.text.pages))
            .collect();
        let device = self.stage.device();
        let taps = if width > 0 && with_taps { Some(device.upload(&taps, "made-up taps")?) } else { None };
        let mut commands = device.commands()?;
        let lent = Lent { decoder: &self.stage.decoder, asked: RefCell::default() };
        self.drafter.commit(&mut Outcome::new(&mut commands, &committed, taps.as_ref(), &lent))?;
        let _ = commands.submit()?;
        Ok(())
    }

    /// Asks for drafts, and checks what holds of every answer.
    pub(super) fn propose(&mut self, wanted: &[(&Text, u32)]) -> Result<Drafts, Failure> {
        let drafts = self.try_propose(wanted).map_err(|error| Failure::new(format!("propose: {error}")))?;
        let vocab = self.stage.vocab();
        // How many there are is checked already, by the guard that every drafter is loaded behind.
        match drafts.ids.iter().flatten().find(|id| **id >= vocab) {
            Some(id) => Err(Failure::new(format!("id {id} drafted, the vocabulary ends at {vocab}"))),
            None => Ok(drafts),
        }
    }

    /// The same with the drafter's own error.
    pub(super) fn try_propose(&mut self, wanted: &[(&Text, u32)]) -> Result<Drafts, ProposerError> {
        let device = self.stage.device();
        let sequences: Vec<_> =
            wanted.iter().map(|(text, width)| DraftSequence::new(text.id, &text.tokens, *width, &text.pages)).collect();
        let lent = Lent { decoder: &self.stage.decoder, asked: RefCell::default() };
        let mut commands = device.commands()?;
        let proposal = self.drafter.propose(&mut ProposeContext::new(&mut commands, &sequences, &lent))?;
        let ids = match proposal {
            Proposal::Host(drafts) => {
                let _ = commands.submit()?;
                drafts.into_iter().map(|draft| draft.tokens).collect()
            }
            Proposal::Device { ids, stride, counts } => {
                let readback = commands.read_back(ids.whole())?;
                let _ = commands.submit()?;
                let all = readback.wait_as::<u32>()?;
                let mut drafts = Vec::new();
                for (sequence, (count, (text, _))) in counts.iter().zip(wanted).enumerate() {
                    let drafted = &all[sequence * stride as usize..][..1 + *count as usize];
                    if Some(&drafted[0]) != text.tokens.last() {
                        let last = text.tokens.last();
                        return Err(refused(format!("{} in the place of the anchor {last:?}", drafted[0])));
                    }
                    drafts.push(drafted[1..].to_vec());
                }
                drafts
            }
            other => return Err(refused(format!("a proposal unknown to the kit: {other:?}"))),
        };
        let mut logits = Vec::new();
        for (rows, first, readback) in lent.asked.into_inner() {
            let all = readback.wait_as::<f32>()?;
            let vocab = all.len() / rows.max(1) as usize;
            logits.extend(all.chunks(vocab.max(1)).skip(first as usize).map(<[f32]>::to_vec));
        }
        Ok(Drafts { ids, logits })
    }

    /// One step: drafts, accepts up to `accepted` of them, and goes on with a token that was not drafted.
    pub(super) fn step(&mut self, text: &mut Text, width: u32, accepted: usize) -> Result<(), Failure> {
        let drafts = self.propose(&[(text, width)])?;
        self.accept(text, drafts.only(), accepted)
    }

    /// Accepts up to `accepted` of the drafted tokens.
    pub(super) fn accept(&mut self, text: &mut Text, drafted: &[u32], accepted: usize) -> Result<(), Failure> {
        let accepted = accepted.min(drafted.len());
        let from = text.rows();
        text.tokens.extend(&drafted[..accepted]);
        let bonus = text.other_than(drafted.get(accepted).copied(), self.stage.vocab());
        text.tokens.push(bonus);
        let rejected = &drafted[accepted..];
        self.commit(&[Part { text, from, rows: accepted as u32 + 1, before: 0, rejected }])
    }
}

/// The target's embedding and head, with a note of what the head was asked for.
#[derive(Debug)]
struct Lent<'a> {
    decoder: &'a Decoder,
    asked: RefCell<Vec<(u32, u32, Readback)>>,
}

fn refused(error: impl std::fmt::Display) -> ProposerError {
    ProposerError::Unsupported(error.to_string())
}

impl TargetServices for Lent<'_> {
    fn embed(
        &self,
        commands: &mut Commands,
        ids: BufferSlice<'_>,
        rows: u32,
        out: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        self.decoder.embed(commands, ids, rows, out).map_err(refused)
    }

    fn head_argmax(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        first: u32,
        ids: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        let vocab = self.decoder.config().vocab_size;
        let bytes = u64::from(rows) * u64::from(vocab) * 4;
        let logits = commands.device().alloc(bytes, "logits of a draft")?;
        self.decoder.logits(commands, hidden, rows, true, logits.whole()).map_err(refused)?;
        ops::argmax(commands, logits.whole(), first..rows, vocab, ids).map_err(refused)?;
        self.asked.borrow_mut().push((rows, first, commands.read_back(logits.whole())?));
        Ok(())
    }

    fn head_logits(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        logits: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        self.decoder.logits(commands, hidden, rows, true, logits).map_err(refused)?;
        let vocab = u64::from(self.decoder.config().vocab_size);
        let held = logits.buffer().slice(logits.offset(), u64::from(rows) * vocab * 4)?;
        self.asked.borrow_mut().push((rows, 0, commands.read_back(held)?));
        Ok(())
    }

    fn head_top_k(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        k: u32,
        ids: BufferSlice<'_>,
        log_probabilities: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        let vocab = self.decoder.config().vocab_size;
        let logits = commands.device().alloc(u64::from(rows) * u64::from(vocab) * 4, "logits of a draft")?;
        self.head_logits(commands, hidden, rows, logits.whole())?;
        ops::top_k(commands, logits.whole(), rows, vocab, k, ids, log_probabilities).map_err(refused)
    }
}
