//! `polyattn bench generate`.

use std::{ops::ControlFlow, path::PathBuf};

use crate::{
    api::Registry,
    bench,
    engine::{Engine, EngineOptions, Generation, Request},
};
use serde::Serialize;

use super::acceptance;
use crate::{
    commands::{
        load::Model,
        options::{ModelArgs, ProposerChoice, SpeculativeChoice},
    },
    failure::{Ended, Failure, Verdict},
    output::{self, Context},
};

/// One prompt of each domain, so that acceptance is neither flattered nor slandered.
const PROMPTS: [&str; 4] = [
    "Hi! I had a long day at work. What should I cook for dinner tonight?",
    "Write a Python function that counts how often each word occurs in a text.",
    "Tell me a short story about a lighthouse keeper who finds a letter in a bottle.",
    "A shop sells pencils at 3 coins each. Anna buys 12 pencils and pays with 50 coins. What is her change?",
];

/// What a prompt of a given length is filled with.
const FILLER: &str = "The river ran past the old mill and under the stone bridge, where every morning the baker's \
    daughter stopped to count the boats before she carried bread up the hill to the houses at the edge of the wood. ";

/// Prefill and decode tokens/s of a model, plain and with each proposer.
///
/// Prefill is measured on a prompt of the given length, decoding on four short prompts (chat, code, prose, maths) taken
/// together, without regard to end tokens. A proposer that remembers requests begins each run without memory, and has
/// seen no more than the prompts of that run before the one at hand. On the CPU the ceilings are measured in the same
/// run: the bandwidth of a copy in memory, and the gemm library's speed on a large matrix.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn bench generate --model smollm2
  polyattn bench generate --proposer none --proposer ngram -n 64 --device gpu
  polyattn bench generate --proposer dflash --num-speculative-tokens 5 --num-speculative-tokens 15")]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// A proposer to measure, none for plain decoding; may be given several times. Without, plain decoding and every
    /// proposer that the model has what it needs for.
    #[arg(long, value_name = "NAME|none")]
    proposer: Vec<String>,

    /// The draft model of proposers that need one: a file or a folder.
    #[arg(long, value_name = "DIR|FILE")]
    draft_model: Option<PathBuf>,

    /// Tokens verified a step; may be given several times, one row each. Without, each proposer's own default.
    #[arg(long, value_name = "N")]
    num_speculative_tokens: Vec<u32>,

    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,

    /// New tokens.
    #[arg(short = 'n', long = "max-tokens", value_name = "N", default_value_t = 128,
        value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// Runs of each row, of which the fastest counts.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
}

#[derive(Serialize)]
struct Answer<'a> {
    command: String,
    model: &'a str,
    device: &'a str,
    driver: &'a str,
    prompt_tokens: usize,
    new_tokens: u32,
    weight_bytes: u64,
    ceilings: Option<Ceilings>,
    rows: Vec<Row>,
}

/// What the CPU reaches at the most, measured.
#[derive(Clone, Copy, Serialize)]
struct Ceilings {
    /// Bytes read of a copy in memory, by the second.
    copy_gigabytes_per_second: f64,
    /// f32 arithmetic of the gemm library.
    gemm_gigaflops: f64,
}

impl From<bench::Ceilings> for Ceilings {
    fn from(ceilings: bench::Ceilings) -> Self {
        Self {
            copy_gigabytes_per_second: ceilings.copy_gigabytes_per_second / 2.0,
            gemm_gigaflops: ceilings.product_f32_teraflops * 1e3,
        }
    }
}

#[derive(Serialize)]
struct Row {
    proposer: String,
    num_speculative_tokens: Option<u32>,
    prefill_tokens_per_second: f64,
    decode_tokens_per_second: f64,
    /// Against the first row, which is plain decoding unless it was left out.
    speed_up: f64,
    mean_acceptance_length: Option<f64>,
    /// Decoding time ÷ the time in which the weights could be copied once for each target pass; CPU alone.
    decode_over_memory_floor: Option<f64>,
    /// Prefill's arithmetic in the matrices ÷ what the gemm library reaches; CPU alone.
    prefill_share_of_gemm: Option<f64>,
}

pub(super) fn run(args: &Args, context: &Context) -> Ended {
    let device = context.open()?;
    let model = Model::open(args.model.model.as_deref(), args.model.offline)?;
    let filler = model.source.tokenizer.encode_text(FILLER)?;
    let prompt: Vec<u32> = filler.iter().copied().cycle().take(args.prompt_tokens as usize).collect();
    let mut prompts = Vec::new();
    for text in PROMPTS {
        prompts.push(model.prompt(text, model.source.chat_template.is_some())?);
    }
    let ceilings = match device.is_cpu() {
        true => Some(Ceilings::from(bench::Ceilings::measure(&device)?)),
        false => None,
    };
    let mut answer = Answer {
        command: output::command_line(),
        model: &model.name,
        device: &device.facts().name,
        driver: &device.facts().driver,
        prompt_tokens: prompt.len(),
        new_tokens: args.max_tokens,
        weight_bytes: 0,
        ceilings,
        rows: Vec::new(),
    };
    for (proposer, draft_model) in proposers(args, &model)? {
        let remembers = Registry::global()?
            .proposer(&proposer)
            .is_some_and(|entry| entry.proposer.requirements().remembers_requests);
        let choice = SpeculativeChoice {
            proposer: match proposer.as_str() {
                "none" => ProposerChoice::None,
                _ => ProposerChoice::Named(proposer),
            },
            draft_model,
            ..SpeculativeChoice::default()
        };
        let room = prompt.len().max(256).saturating_add(args.max_tokens as usize);
        let mut setup = EngineOptions::default()
            .with_context(u32::try_from(room).unwrap_or(u32::MAX))
            .with_speculative(model.speculative(&choice)?);
        let attention = args.model.attention()?;
        setup.attention = attention.attention;
        setup.backend_config = attention.backend_config;
        setup.kernel.moe_backend = attention.moe_backend;
        let load = || model.engine(&device, &setup);
        let mut engine = load()?;
        answer.weight_bytes = engine.weight_bytes();
        let widths: Vec<Option<u32>> = match (engine.proposer(), args.num_speculative_tokens.as_slice()) {
            (None, _) | (_, []) => vec![None],
            (Some(_), several) => several.iter().map(|tokens| Some(*tokens)).collect(),
        };
        let mut fresh = true;
        for width in widths {
            let mut best = Measured::default();
            for round in 0..args.repeat {
                if remembers && !fresh {
                    // Two at once may not fit.
                    drop(engine);
                    engine = load()?;
                    fresh = true;
                }
                if let Some(width) = width {
                    engine.set_speculative_tokens(width)?;
                }
                if fresh || round == 0 {
                    // Pipelines are compiled on first use. No prompt that is measured is known after it.
                    generate(&mut engine, &prompt, args.max_tokens.min(16))?;
                }
                fresh = false;
                best.keep(Measured::take(&mut engine, &prompt, &prompts, args.max_tokens)?);
            }
            let mut row = best.row(&engine, &model, prompt.len(), ceilings);
            let first = answer.rows.first().map_or(row.decode_tokens_per_second, |row| row.decode_tokens_per_second);
            row.speed_up = row.decode_tokens_per_second / first;
            if !context.json {
                output::note(&format!("{} done", row.proposer));
            }
            answer.rows.push(row);
        }
    }
    context.answer(&answer, || table(&answer))?;
    Ok(Verdict::Holds)
}

/// Those asked for, or plain decoding and all that the model has what they need for, each with its draft model where one
/// was named.
fn proposers(args: &Args, model: &Model) -> Result<Vec<(String, Option<PathBuf>)>, Failure> {
    let registry = Registry::global()?;
    let named = |name: &String| {
        let entry = registry.proposer(name);
        let needs_checkpoint = entry.is_some_and(|entry| entry.proposer.requirements().checkpoint);
        (name.to_ascii_lowercase(), args.draft_model.clone().filter(|_| needs_checkpoint))
    };
    if !args.proposer.is_empty() {
        return Ok(args.proposer.iter().map(named).collect());
    }
    let fitting = acceptance::fitting(model, args.draft_model.as_deref())?;
    let plain = ("none".to_owned(), None);
    Ok(std::iter::once(plain).chain(fitting.into_iter().map(|(name, path)| (name.to_owned(), path))).collect())
}

/// Greedy tokens without regard to end tokens.
fn generate(engine: &mut Engine, prompt: &[u32], tokens: u32) -> Result<Generation, Failure> {
    let mut request = Request::new(prompt.to_vec(), tokens as usize);
    request.stop = Some(Vec::new());
    Ok(engine.generate(&request, &mut |_| ControlFlow::Continue(()))?)
}

/// The fastest of some runs, and the counts of the last, which are those of each.
#[derive(Default)]
struct Measured {
    prefill: Option<f64>,
    decode: Option<f64>,
    tokens: usize,
    passes: u64,
    accepted: u64,
    drafted_steps: u64,
}

impl Measured {
    /// One run.
    fn take(engine: &mut Engine, prompt: &[u32], prompts: &[Vec<u32>], max_tokens: u32) -> Result<Self, Failure> {
        let prefill = generate(engine, prompt, 1)?.prefill.as_secs_f64();
        let mut run = Self { prefill: Some(prefill), ..Self::default() };
        let mut seconds = 0.0;
        for prompt in prompts {
            let generation = generate(engine, prompt, max_tokens)?;
            seconds += generation.decode.as_secs_f64();
            run.tokens += generation.tokens.len() - 1;
            run.passes += generation.steps;
            if let Some(acceptance) = generation.acceptance {
                run.accepted += acceptance.accepted;
                run.drafted_steps += acceptance.drafted_steps;
            }
        }
        Ok(Self { decode: Some(seconds), ..run })
    }

    fn keep(&mut self, run: Self) {
        let least = |a: Option<f64>, b: Option<f64>| a.into_iter().chain(b).reduce(f64::min);
        *self = Self { prefill: least(self.prefill, run.prefill), decode: least(self.decode, run.decode), ..run };
    }

    fn row(&self, engine: &Engine, model: &Model, prompt_tokens: usize, ceilings: Option<Ceilings>) -> Row {
        let (prefill, decode) = (self.prefill.unwrap_or(0.0), self.decode.unwrap_or(0.0));
        let config = &model.source.config;
        let embedding = u64::from(config.vocab_size) * u64::from(config.hidden_size);
        // Of the embedding a prompt reads single rows, and its head is one row's.
        let held = engine.weight_bytes() as f64;
        let flops = 2.0 * (config.layer_parameters() as f64 * prompt_tokens as f64 + embedding as f64);
        let share = |part: f64, whole: u64| if whole == 0 { 0.0 } else { part / whole as f64 };
        Row {
            proposer: engine.proposer().map_or("none", |(name, _)| name).to_owned(),
            num_speculative_tokens: engine.proposer().map(|(_, tokens)| tokens),
            prefill_tokens_per_second: prompt_tokens as f64 / prefill,
            decode_tokens_per_second: if decode > 0.0 { self.tokens as f64 / decode } else { 0.0 },
            speed_up: 1.0,
            mean_acceptance_length: engine.proposer().map(|_| 1.0 + share(self.accepted as f64, self.drafted_steps)),
            decode_over_memory_floor: ceilings
                .filter(|_| self.passes > 0)
                .map(|ceilings| decode / (self.passes as f64 * held / (ceilings.copy_gigabytes_per_second * 1e9))),
            prefill_share_of_gemm: ceilings.map(|ceilings| flops / prefill / (ceilings.gemm_gigaflops * 1e9)),
        }
    }
}

fn table(answer: &Answer<'_>) -> String {
    let mut table = output::table(&[
        "proposer",
        "tokens a step",
        "prefill tokens/s",
        "decode tokens/s",
        "speed-up",
        "acceptance length",
        "÷ memory floor",
        "of gemm's peak",
    ]);
    let number =
        |value: Option<f64>, digits: usize| value.map_or("–".to_owned(), |value| format!("{value:.digits$}"));
    for row in &answer.rows {
        table.add_row([
            row.proposer.clone(),
            row.num_speculative_tokens.map_or("–".into(), |tokens| tokens.to_string()),
            format!("{:.1}", row.prefill_tokens_per_second),
            format!("{:.1}", row.decode_tokens_per_second),
            format!("{:.2}", row.speed_up),
            number(row.mean_acceptance_length, 2),
            number(row.decode_over_memory_floor, 2),
            number(row.prefill_share_of_gemm.map(|share| share * 100.0), 0)
                + if row.prefill_share_of_gemm.is_some() { " %" } else { "" },
        ]);
    }
    let mut text = format!(
        "{} on {} {}: prompt of {} tokens, {} new ones, weights of {}\n{table}",
        answer.model,
        answer.device,
        answer.driver,
        answer.prompt_tokens,
        answer.new_tokens,
        output::bytes(answer.weight_bytes)
    );
    if let Some(ceilings) = answer.ceilings {
        text += &format!(
            "\nceilings of this run: copy {:.1} GB/s read, gemm {:.0} GFLOP/s",
            ceilings.copy_gigabytes_per_second, ceilings.gemm_gigaflops
        );
    }
    text
}
