//! A drafter driven by hand: hidden states made up, drafts accepted and rejected at will. No engine stands in between,
//! because an engine's verification would hide what a wrong drafter does.

use std::{cell::RefCell, sync::Arc};

use polyattn_api::{
    BufferSlice, Commands, CommittedRows, Device, DraftAttention, DraftSequence, Drafter, EngineConfig, LoadContext,
    Outcome, Proposal, ProposeContext, ProposerError, TargetServices, resolve,
};
use polyattn_device::Readback;
use polyattn_nn::{decoder::Decoder, ops};

use super::failed;
use super::subject::{Bench, CONTEXT, Ground};
use crate::Failure;

/// Tokens of a page.
pub(super) const PAGE: u32 = 16;

/// Texts that have pages of their own.
const TEXTS: u32 = 3;

/// Pages of a text.
const TEXT_PAGES: u32 = CONTEXT / PAGE;

/// Drafted tokens from which on a drafter is taken for wide: it is asked for no more, to keep the trials short.
const WIDE: u32 = 8;

/// A text under way: committed tokens, the last of them the anchor.
#[derive(Clone, Debug)]
pub(super) struct Text {
    pub(super) id: u64,
    pub(super) tokens: Vec<u32>,
    pages: Vec<i32>,
    /// Of its hidden states.
    seed: u64,
}

impl Text {
    /// A text of `tokens` tokens on the pages of place 0 to 2. Few ids, so that the text repeats itself.
    pub(super) fn new(place: u32, tokens: usize, seed: u64, vocab: u32) -> Self {
        let ids = (0..tokens as u64).map(|place| (10 + mix(seed, place, 1) % 5) as u32 % vocab.max(1)).collect();
        Self { id: u64::from(place), tokens: ids, pages: Vec::new(), seed }.on_pages(place, false)
    }

    /// The same text on other pages; they are never in order.
    pub(super) fn on_pages(mut self, place: u32, reversed: bool) -> Self {
        let first = place % TEXTS * TEXT_PAGES;
        // 7 divides no number of pages of a text.
        let mut pages: Vec<_> = (0..TEXT_PAGES).map(|page| (first + page * 7 % TEXT_PAGES) as i32).collect();
        if reversed {
            pages.reverse();
        }
        self.pages = pages;
        self
    }

    pub(super) fn with_id(mut self, id: u64) -> Self {
        self.id = id;
        self
    }

    /// Leaves it without pages.
    pub(super) fn take_pages(&mut self) {
        self.pages.clear();
    }

    /// The same tokens with other hidden states.
    pub(super) fn with_other_states(mut self) -> Self {
        self.seed = self.seed.wrapping_add(77);
        self
    }

    /// Rows whose hidden states exist: all but the anchor's.
    pub(super) fn rows(&self) -> u32 {
        self.tokens.len() as u32 - 1
    }

    /// The hidden states of the token at `position`: of this text, this place and this token.
    fn states(&self, position: u32, token: u32, width: usize) -> impl Iterator<Item = f32> {
        let key = mix(self.seed, u64::from(position), u64::from(token));
        (0..width as u64).map(move |column| unit(mix(key, column, 2)))
    }
}

fn mix(a: u64, b: u64, c: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ c.rotate_left(40);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Committed rows of a text, and rows around them that are nobody's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    pub(super) text: &'a Text,
    /// The first row's position.
    pub(super) from: u32,
    pub(super) rows: u32,
    /// Rows before them in the buffer.
    pub(super) before: u32,
    /// Rejected tokens, whose rows follow.
    pub(super) rejected: &'a [u32],
}

impl<'a> Part<'a> {
    /// All rows of a text.
    pub(super) fn all(text: &'a Text) -> Self {
        Self::of(text, 0, text.rows())
    }

    /// Some rows of a text.
    pub(super) fn of(text: &'a Text, from: u32, rows: u32) -> Self {
        Self { text, from, rows, before: 0, rejected: &[] }
    }
}

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
            for (row, (got, want)) in self.logits.iter().zip(&want.logits).enumerate() {
                let most = want.iter().fold(1.0f32, |most, x| most.max(x.abs()));
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
                        let most = row.iter().fold(1.0f32, |most, x| most.max(x.abs()));
                        (x - y).abs() <= 2.0 * tolerance * most && row.iter().all(|other| other <= &x.max(*y))
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

/// What every drafter of a trial is loaded with.
pub(super) struct Stage<'a> {
    pub(super) bench: &'a Bench,
    pub(super) ground: &'a Ground,
    decoder: Arc<Decoder>,
    config: EngineConfig,
    attention: Vec<DraftAttention>,
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
            attention.push(DraftAttention { layer: Arc::clone(&problem.layer), kernel });
        }
        let config = resolution.draft_config.unwrap_or(config);
        Ok(Self { bench, ground, decoder: ground.decoder()?, config, attention })
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
        let width = self.drafter.taps().layers.len() * self.stage.ground.facts.hidden_size as usize;
        let (mut taps, mut committed, mut row) = (Vec::new(), Vec::new(), 0);
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
            let pages = &text.pages[..];
            let first_row = row + before;
            committed.push(CommittedRows { id: text.id, first_row, rows: *rows, position: *from, pages });
            row += before + rows + rejected.len() as u32;
        }
        let device = self.stage.device();
        let taps = if width > 0 && with_taps { Some(device.upload(&taps, "made-up taps")?) } else { None };
        let mut commands = device.commands()?;
        self.drafter.commit(&mut Outcome::new(&mut commands, &committed, taps.as_ref()))?;
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
        let sequences: Vec<_> = wanted
            .iter()
            .map(|(text, width)| DraftSequence { id: text.id, tokens: &text.tokens, width: *width, pages: &text.pages })
            .collect();
        let lent = Lent { decoder: &self.stage.decoder, asked: RefCell::default() };
        let mut commands = device.commands()?;
        let proposal = self.drafter.propose(&mut ProposeContext::new(&mut commands, &sequences, &lent))?;
        let ids = match proposal {
            Proposal::Host(ids) => {
                let _ = commands.submit()?;
                ids
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
        let position = text.tokens.len() as u64;
        let mut bonus = (10 + mix(text.seed, position, 3) % 5) as u32 % self.stage.vocab();
        if drafted.get(accepted) == Some(&bonus) {
            bonus = (bonus + 1) % self.stage.vocab();
        }
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
}
