use polyattn_api::{
    Buffer, Commands, Device, DraftSequence, Drafter, LoadContext, Marginals, Outcome, PrefixReuse, Proposal,
    ProposeContext, ProposerError, TapSpec, TreeWish,
};
use polyattn_nn::{
    NnError, WeightLoader,
    drafting::{Candidates, ChainOrder, Chains, NewRow, RowStore},
    load::Checkpoint,
    ops::{self, LinearCall, Matrix, Vector},
};

use crate::MedusaConfig;

/// Loaded Medusa heads.
#[derive(Debug)]
pub struct MedusaDrafter {
    config: MedusaConfig,
    taps: TapSpec,
    heads: Vec<Head>,
    kept: RowStore,
    chains: Chains,
    memory: Memory,
}

/// One head: residual blocks, then an output head.
#[derive(Debug)]
struct Head {
    blocks: Vec<(Matrix, Vector)>,
    output: Matrix,
}

/// Memory of a step.
#[derive(Debug)]
struct Memory {
    hidden: Buffer,
    gate: Buffer,
    mixed: [Buffer; 2],
    logits: Buffer,
}

/// What the head that ran last left behind, for tests against an independent implementation.
#[derive(Debug)]
#[non_exhaustive]
pub struct Stages<'a> {
    /// Its logits, `[sequences, vocabulary]` f32.
    pub logits: &'a Buffer,
}

impl MedusaDrafter {
    /// Loads a checkpoint.
    ///
    /// # Errors
    /// A checkpoint that is broken or does not fit the target; more tokens than heads; no memory.
    pub fn load(context: &LoadContext<'_>) -> Result<Self, ProposerError> {
        let path = context.checkpoint.ok_or(ProposerError::NoCheckpoint("medusa"))?;
        let config = MedusaConfig::open(path)?;
        config.check(context.target)?;
        if let Some(tokens) = context.num_speculative_tokens
            && tokens > config.heads
        {
            return Err(ProposerError::Unsupported(format!(
                "num_speculative_tokens is {tokens}, {} Medusa heads draft at most {0}",
                config.heads
            )));
        }
        let checkpoint = Checkpoint::open(&config.folder).map_err(NnError::from)?;
        let (device, target, sequences) = (context.device, context.target, context.max_sequences.max(1));
        let heads = heads(&config, &checkpoint, device, target.hidden_size, target.vocab_size)?;
        let alloc = |width: u32, label: &str| device.alloc(u64::from(sequences) * u64::from(width) * 4, label);
        Ok(Self {
            taps: TapSpec::of_last_hidden(),
            kept: RowStore::new(device, target.hidden_size, sequences)?,
            chains: Chains::new(device, sequences, config.heads)?,
            memory: Memory {
                hidden: alloc(target.hidden_size, "draft hidden states")?,
                gate: alloc(target.hidden_size, "draft gates")?,
                mixed: [alloc(target.hidden_size, "draft blocks")?, alloc(target.hidden_size, "draft blocks")?],
                logits: alloc(target.vocab_size, "draft logits")?,
            },
            heads,
            config,
        })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &MedusaConfig {
        &self.config
    }

    /// What the last step left behind.
    #[must_use]
    pub fn stages(&self) -> Stages<'_> {
        Stages { logits: &self.memory.logits }
    }

    /// Records the logits of a head for the first `rows` hidden states.
    fn logits(&self, commands: &mut Commands, head: &Head, rows: u32) -> Result<(), NnError> {
        let memory = &self.memory;
        let mut x = &memory.hidden;
        for ((weight, bias), out) in head.blocks.iter().zip(memory.mixed.iter().cycle()) {
            let gate = memory.gate.whole();
            let bias = Some(bias);
            let call = LinearCall { x: x.whole(), rows, weight, norm: None, bias, out: gate, accumulate: false };
            ops::linear(commands, &call)?;
            ops::add_silu(commands, x.whole(), gate, rows, weight.rows, out.whole())?;
            x = out;
        }
        let (x, out, weight) = (x.whole(), memory.logits.whole(), &head.output);
        Ok(ops::linear(commands, &LinearCall { x, rows, weight, norm: None, bias: None, out, accumulate: false })?)
    }

    /// What each head takes for likely, whatever stands before.
    fn marginals(
        &self,
        commands: &mut Commands,
        order: &ChainOrder,
        wish: TreeWish<'_>,
        sequences: usize,
    ) -> Result<Proposal, ProposerError> {
        let mut found = Vec::new();
        for (number, head) in (0..order.longest()).zip(&self.heads) {
            let (rows, vocab) = (order.rows_beyond(number), head.output.rows);
            self.logits(commands, head, rows)?;
            let candidates = Candidates::new(commands.device(), rows, wish.candidates.clamp(1, vocab))?;
            let (ids, logs) = (candidates.ids.whole(), candidates.logs.whole());
            ops::top_k(commands, self.memory.logits.whole(), rows, vocab, candidates.k, ids, logs)?;
            found.push((vocab, candidates));
        }
        let mut all = vec![Marginals::default(); sequences];
        for (vocab, candidates) in found {
            let slots = candidates.read(commands, |id| (id < vocab).then_some(id))?;
            for (slot, place) in slots.into_iter().zip(order.rows()) {
                all[*place].slots.push(slot);
            }
        }
        Ok(Proposal::Marginals(all))
    }

    /// Tokens to draft for a sequence: none where the hidden state before its anchor was not committed.
    fn width(&self, sequence: &DraftSequence<'_>) -> u32 {
        match self.kept.position(sequence.id) {
            Some(position) if position as usize + 2 == sequence.tokens.len() => sequence.width.min(self.config.heads),
            _ => 0,
        }
    }
}

fn heads(
    config: &MedusaConfig,
    checkpoint: &Checkpoint,
    device: &Device,
    hidden: u32,
    vocab: u32,
) -> Result<Vec<Head>, ProposerError> {
    let mut ignore = |_: u64| {};
    let mut loader = WeightLoader::new(checkpoint, device, &mut ignore);
    let prefix = ["", "medusa_head."].into_iter().find(|prefix| checkpoint.has(&format!("{prefix}0.0.linear.weight")));
    let prefix = prefix.unwrap_or_default();
    let mut matrix = |name: String, rows: u32, what: &str| -> Result<Matrix, ProposerError> {
        let (found, cols) = checkpoint.rows_and_columns(&name).map_err(NnError::from)?;
        if (found, cols) != (rows as usize, hidden as usize) {
            return Err(ProposerError::Mismatch(format!(
                "{}: tensor '{name}' is [{found}, {cols}], {what} needs [{rows}, {hidden}]",
                config.folder.display()
            )));
        }
        let dtype = loader.held_as(&name)?;
        Ok(loader.matrix(&[name], hidden, dtype)?)
    };
    let mut matrices = Vec::new();
    for head in 0..config.heads {
        let blocks = (0..config.blocks)
            .map(|block| matrix(format!("{prefix}{head}.{block}.linear.weight"), hidden, "the target's hidden_size"))
            .collect::<Result<Vec<_>, _>>()?;
        let output = matrix(format!("{prefix}{head}.{}.weight", config.blocks), vocab, "the target's vocabulary")?;
        matrices.push((blocks, output));
    }
    let head = |(number, (blocks, output)): (u32, (Vec<Matrix>, Matrix))| {
        let with_bias = |(block, weight): (u32, Matrix)| {
            let name = format!("{prefix}{number}.{block}.linear.bias");
            let bias = loader.vector(std::slice::from_ref(&name))?;
            match bias.len == hidden {
                true => Ok((weight, bias)),
                false => Err(NnError::Shape(format!("tensor '{name}' has {} elements, expected {hidden}", bias.len))),
            }
        };
        Ok(Head { blocks: (0..).zip(blocks).map(with_bias).collect::<Result<_, NnError>>()?, output })
    };
    Ok((0..).zip(matrices).map(head).collect::<Result<_, NnError>>()?)
}

impl Drafter for MedusaDrafter {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        self.config.heads
    }

    fn reuse(&self) -> PrefixReuse {
        PrefixReuse::Pages
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        let sequences = context.sequences;
        let order = ChainOrder::new(sequences.iter().map(|sequence| self.width(sequence)).collect());
        if order.longest() == 0 {
            return Ok(order.nothing());
        }
        self.chains.begin(sequences, &order)?;
        let wish = context.tree;
        let commands = &mut *context.commands;
        let drafted: Vec<u64> = order.rows().iter().map(|place| sequences[*place].id).collect();
        self.kept.gather(commands, &drafted, self.memory.hidden.whole())?;
        if let Some(wish) = wish {
            return self.marginals(commands, &order, wish, sequences.len());
        }
        for (number, head) in (0..order.longest()).zip(&self.heads) {
            let rows = order.rows_beyond(number);
            self.logits(commands, head, rows)?;
            let (logits, column) = (self.memory.logits.whole(), self.chains.column(number + 1)?);
            ops::argmax(commands, logits, 0..rows, head.output.rows, column)?;
        }
        Ok(self.chains.finish(commands, order)?)
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        let taps =
            outcome.taps.ok_or_else(|| ProposerError::Unsupported("medusa was given no hidden states".into()))?;
        // The last row is the one whose logits chose the anchor.
        let last = outcome.sequences.iter().filter_map(|committed| {
            let row = *committed.rows.last()?;
            Some(NewRow { sequence: committed.id, row, position: committed.position + committed.count() - 1 })
        });
        let last: Vec<_> = last.collect();
        Ok(self.kept.put(outcome.commands, taps.whole(), &last)?)
    }

    fn forget(&mut self, sequence: u64) {
        self.kept.forget(sequence);
    }
}
