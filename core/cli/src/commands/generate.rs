//! `polyattn generate`.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind, Write},
    ops::ControlFlow,
    path::PathBuf,
    sync::atomic::Ordering,
};

use crate::{
    api::{EngineConfig, ModelConfig, Role},
    engine::{Acceptance, Backends, Engine, EngineOptions, Generation, RecordOptions, Request, Sampling, StopReason},
    nn::load::Detokenizer,
};
use serde::Serialize;

use super::{
    load::Model,
    options::{AttentionOptions, ModelArgs, SpeculativeArgs, SpeculativeChoice},
};
use crate::{
    failure::{Ended, Failure, Verdict},
    interrupt,
    output::{self, Context},
};

/// Generate text with a real model, and report who served which attention.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn generate --chat \"What is the capital of France?\"
  polyattn generate --model model.gguf --proposer ngram -n 64 \"Once upon a time\"
  polyattn generate --model smollm2 --attention-backend plain --speculative-config.attention_backend flash \"Hello\"
  polyattn generate --json --temperature 0.8 --top-p 0.95 --seed 1 -- \"--a prompt that begins with dashes\"")]
pub(crate) struct Args {
    /// The text to go on from.
    prompt: String,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    speculative: SpeculativeArgs,

    /// Put the prompt into the model's chat template.
    #[arg(long)]
    chat: bool,

    /// New tokens at the most.
    #[arg(short = 'n', long = "max-tokens", value_name = "N", default_value_t = 256, allow_negative_numbers = true)]
    max_tokens: usize,

    /// 0 always takes the most likely token; above, the next token is drawn at random.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,

    /// Draw among the K most likely tokens.
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    top_k: Option<usize>,

    /// Draw among the most likely tokens whose probabilities reach P.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,

    /// Logits of tokens that the text has are divided by it where positive, multiplied where negative.
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f64,

    /// The same seed draws the same tokens.
    #[arg(long, value_name = "S", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,

    /// Write attention calls of the run as replay files into this folder.
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// The layer whose calls are written, counted from 0 in the target and in the draft.
    #[arg(long, value_name = "LAYER", default_value_t = 0, requires = "record", allow_negative_numbers = true)]
    record_layer: u32,

    /// The step whose calls are written; all when unset. The chunks of the prompt count as steps, from 0.
    #[arg(long, value_name = "STEP", requires = "record", allow_negative_numbers = true)]
    record_step: Option<u64>,
}

/// What to generate, checked as far as it can be without a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct GenerateOptions {
    /// The text to go on from; not empty.
    pub(crate) prompt: String,
    /// The model: a known name, a file or a folder; the default one when unset.
    pub(crate) model: Option<String>,
    /// Whether nothing may be downloaded.
    pub(crate) offline: bool,
    /// Whether the prompt goes into the model's chat template.
    pub(crate) chat: bool,
    /// Who may serve the target's attention.
    pub(crate) attention: AttentionOptions,
    /// Speculative decoding.
    pub(crate) speculative: SpeculativeChoice,
    /// New tokens at the most; at least 1.
    pub(crate) max_tokens: usize,
    /// 0 is greedy.
    pub(crate) temperature: f64,
    /// Only the k most likely tokens, at least 1; all when unset.
    pub(crate) top_k: Option<usize>,
    /// Above 0, up to 1, which is all tokens.
    pub(crate) top_p: f64,
    /// Above 0; 1 changes nothing.
    pub(crate) repetition_penalty: f64,
    /// The seed.
    pub(crate) seed: u64,
    /// Attention calls to write down.
    pub(crate) record: Option<Record>,
}

/// Which attention calls to write down, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// The folder.
    pub(crate) folder: PathBuf,
    /// The layer, from 0.
    pub(crate) layer: u32,
    /// The step; all when unset.
    pub(crate) step: Option<u64>,
}

impl TryFrom<Args> for GenerateOptions {
    type Error = Failure;

    fn try_from(args: Args) -> Result<Self, Failure> {
        let fault = |option: &str, message: String| Err(Failure::new(format!("{option}: {message}")));
        if args.prompt.is_empty() {
            return fault("PROMPT", "'' is empty, there is nothing to go on from".into());
        }
        if args.max_tokens == 0 {
            return fault("-n", "0 tokens cannot be generated, at least 1".into());
        }
        if !args.temperature.is_finite() || args.temperature < 0.0 {
            return fault("--temperature", format!("{} is out of range, 0 or more", args.temperature));
        }
        if args.top_k == Some(0) {
            return fault("--top-k", "0 is out of range, at least 1".into());
        }
        // Written so that NaN is refused too.
        if !(args.top_p > 0.0 && args.top_p <= 1.0) {
            return fault("--top-p", format!("{} is out of range, above 0 and up to 1", args.top_p));
        }
        if !(args.repetition_penalty.is_finite() && args.repetition_penalty > 0.0) {
            return fault("--repetition-penalty", format!("{} is out of range, above 0", args.repetition_penalty));
        }
        if args.model.model.as_deref() == Some("") {
            return fault("--model", "'' is no name, file or folder".into());
        }
        Ok(Self {
            prompt: args.prompt,
            attention: args.model.attention()?,
            model: args.model.model,
            offline: args.model.offline,
            chat: args.chat,
            speculative: args.speculative.merge()?,
            max_tokens: args.max_tokens,
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            repetition_penalty: args.repetition_penalty,
            seed: args.seed,
            record: args.record.map(|folder| Record { folder, layer: args.record_layer, step: args.record_step }),
        })
    }
}

pub(crate) fn run(args: Args, context: &Context) -> Ended {
    let options = GenerateOptions::try_from(args)?;
    let device = context.open()?;
    let model = Model::open(options.model.as_deref(), options.offline)?;
    let tokenizer = &model.source.tokenizer;
    if !tokenizer.survives_round_trip(&options.prompt) {
        output::note("the model's vocabulary cannot spell all of the prompt; what it lacks is lost");
    }
    let prompt = model.prompt(&options.prompt, options.chat)?;
    // The engine would say so too, after all weights are loaded.
    let context_length = model.source.config.context_length;
    if prompt.len() >= context_length as usize {
        return Err(Failure::new(format!(
            "PROMPT: its {} tokens leave no room in the context of {}, {context_length} tokens",
            prompt.len(),
            model.name
        )));
    }

    let mut setup = EngineOptions::default()
        .with_context(u32::try_from(prompt.len().saturating_add(options.max_tokens)).unwrap_or(u32::MAX))
        .with_speculative(model.speculative(&options.speculative)?);
    setup.attention = options.attention.attention.clone();
    setup.backend_config = options.attention.backend_config.clone();
    setup.kernel.moe_backend = options.attention.moe_backend.clone();
    setup.record = options.record.clone().map(|record| RecordOptions {
        folder: record.folder,
        layer: record.layer,
        step: record.step,
    });
    let mut engine = model.engine(&device, &setup)?;
    if let Some(record) = &options.record {
        check_layer(record.layer, engine.config())?;
    }

    let mut request = Request::new(prompt, options.max_tokens);
    request.sampling = Sampling {
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
        repetition_penalty: options.repetition_penalty,
        seed: options.seed,
    };
    let mut words = Words { detokenizer: tokenizer.detokenizer(), silent: context.json, fault: None };
    let interrupted = interrupt::flag();
    let generation = engine.generate(&request, &mut |tokens| {
        let heard = words.say(tokens);
        if heard && !interrupted.load(Ordering::SeqCst) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    words.finish()?;

    if context.json {
        let answer = Answer {
            text: tokenizer.decode(&generation.tokens),
            tokens: &generation.tokens,
            prompt_tokens: generation.prompt_tokens,
            stop: generation.stop,
            model: &model.name,
            device: &device.facts().name,
            proposer: engine.proposer().map(|(name, _)| name),
            num_speculative_tokens: engine.proposer().map(|(_, tokens)| tokens),
            backends: &generation.backends,
            moe_backends: MoeBackends::of(&engine),
            calls: &generation.calls,
            steps: generation.steps,
            tokens_per_second: generation.tokens_per_second(),
            prefill_seconds: generation.prefill.as_secs_f64(),
            decode_seconds: generation.decode.as_secs_f64(),
            acceptance: generation.acceptance.as_ref(),
            strategies: engine.strategies().map(|(tree, acceptance, length)| StrategyNames {
                tree,
                acceptance,
                length,
            }),
            lossless: generation.lossless,
            drafter_lost: generation.drafter_lost,
        };
        output::print(&output::json(&answer)?)?;
    } else {
        // The text is on standard output by itself; what is said of it goes beside it.
        output::remark(&summary(&engine, &generation));
    }
    Ok(Verdict::Holds)
}

/// Checks that the target or the draft has a layer of this number.
fn check_layer(layer: u32, config: &EngineConfig) -> Result<(), Failure> {
    let count = |model: &ModelConfig| model.layers.iter().map(|kind| kind.count).sum::<u32>();
    let target = count(&config.model);
    let draft = config.speculative.as_ref().and_then(|speculative| speculative.draft.as_ref()).map_or(0, count);
    match target.max(draft) {
        most if layer >= most => Err(Failure::new(format!(
            "--record-layer: there is no layer {layer}, they are 0 to {}",
            most.saturating_sub(1)
        ))),
        _ => Ok(()),
    }
}

/// New text on its way to standard output, in whole characters.
struct Words {
    detokenizer: Detokenizer,
    silent: bool,
    /// Why the last text could not be written.
    fault: Option<io::Error>,
}

impl Words {
    /// Whether somebody is there to read.
    fn say(&mut self, tokens: &[u32]) -> bool {
        if self.silent {
            return true;
        }
        let text: String = tokens.iter().filter_map(|token| self.detokenizer.push(*token)).collect();
        self.fault = Self::write(&text).err();
        self.fault.is_none()
    }

    fn write(text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush())
    }

    fn finish(self) -> Result<(), Failure> {
        let fault = match self.fault {
            None if !self.silent => Self::write(&format!("{}\n", self.detokenizer.finish())).err(),
            fault => fault,
        };
        match fault {
            // A reader that has seen enough, as in `polyattn generate … | head`, is no fault.
            Some(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(Failure::new(format!("cannot write to standard output: {error}")))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    text: String,
    tokens: &'a [u32],
    prompt_tokens: usize,
    stop: StopReason,
    model: &'a str,
    device: &'a str,
    proposer: Option<&'a str>,
    num_speculative_tokens: Option<u32>,
    backends: &'a Backends,
    /// Null where neither model has experts.
    moe_backends: Option<MoeBackends>,
    calls: &'a BTreeMap<&'static str, u64>,
    steps: u64,
    tokens_per_second: f64,
    prefill_seconds: f64,
    decode_seconds: f64,
    acceptance: Option<&'a Acceptance>,
    strategies: Option<StrategyNames<'a>>,
    /// Whether the tokens follow the target's distribution.
    lossless: bool,
    drafter_lost: bool,
}

/// How drafts were used.
#[derive(Serialize)]
struct StrategyNames<'a> {
    tree: &'a str,
    acceptance: &'a str,
    length: &'a str,
}

/// Who serves the experts of a model, null where it has none.
#[derive(Serialize)]
struct MoeBackends {
    target: Option<&'static str>,
    draft: Option<&'static str>,
}

impl MoeBackends {
    fn of(engine: &Engine) -> Option<Self> {
        let [target, draft] = [Role::Target, Role::Draft]
            .map(|role| engine.resolution().moe_of(role).next().map(|moe| moe.backend.name()));
        (target.is_some() || draft.is_some()).then_some(Self { target, draft })
    }
}

/// Who served what, how fast, and how drafts fared.
fn summary(engine: &Engine, generation: &Generation) -> String {
    let mut table = output::table(&["role", "phase", "attention backend"]);
    for (role, backends) in [("target", &generation.backends.target), ("draft", &generation.backends.draft)] {
        for (phase, names) in &backends.0 {
            table.add_row([role, phase, &names.iter().copied().collect::<Vec<_>>().join(", ")]);
        }
    }
    let mut text = format!(
        "\n{table}\n{}: {} prompt tokens in {:.2} s, {} new ones at {:.1} tokens/s",
        engine.device().facts().name,
        generation.prompt_tokens,
        generation.prefill.as_secs_f64(),
        generation.tokens.len(),
        generation.tokens_per_second()
    );
    for moe in &engine.resolution().moe {
        text += &format!("\nexperts of the {}: {}", moe.problem.role, moe.backend.name());
    }
    if let (Some((name, width)), Some(acceptance)) = (engine.proposer(), &generation.acceptance) {
        text += &format!(
            "\n{name} drafting {width}: mean acceptance length {:.2}, {} target passes",
            acceptance.mean_length, generation.steps
        );
        if !acceptance.per_position.is_empty() {
            let shares: Vec<_> = acceptance.per_position.iter().map(|share| format!("{share:.2}")).collect();
            text += &format!("\naccepted by position: {}", shares.join(" "));
        }
    }
    if let (false, Some((_, rule, _))) = (generation.lossless, engine.strategies()) {
        text += &format!("\nLOSSY: under the acceptance rule '{rule}' the tokens are not the target's");
    }
    if generation.drafter_lost {
        text += "\nthe drafter failed on the way, and the rest was decoded without it";
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::api::BackendName;

    use crate::commands::options::ProposerChoice;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    fn options(args: &[&str]) -> Result<GenerateOptions, String> {
        let program = Program::try_parse_from(["program"].iter().chain(args)).map_err(|error| error.to_string())?;
        GenerateOptions::try_from(program.args).map_err(|failure| failure.0)
    }

    #[test]
    fn a_prompt_is_enough() {
        let found = options(&["Hello"]).expect("good options");
        let want = GenerateOptions {
            prompt: "Hello".into(),
            model: None,
            offline: false,
            chat: false,
            attention: AttentionOptions::default(),
            speculative: SpeculativeChoice::default(),
            max_tokens: 256,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 0,
            record: None,
        };
        assert_eq!(found, want);
    }

    #[test]
    fn every_option_arrives() {
        let args = [
            "--model",
            "m.gguf",
            "--chat",
            "--proposer",
            "NGram",
            "--attention-backend",
            "Plain",
            "-n",
            "12",
            "--speculative-config.attention_backend",
            "flash",
            "--temperature",
            "0.5",
            "--top-k",
            "40",
            "--top-p",
            "0.9",
            "--seed",
            "7",
            "--record",
            "calls",
            "--record-layer",
            "3",
            "--record-step",
            "2",
            "--offline",
            "--",
            "--prompt",
        ];
        let found = options(&args).expect("good options");
        assert_eq!(found.prompt, "--prompt", "what follows -- is no option");
        assert_eq!(found.model.as_deref(), Some("m.gguf"));
        assert!(found.chat && found.offline);
        assert_eq!(found.attention.attention.backend, BackendName::parse("plain").into());
        assert_eq!(found.speculative.proposer, ProposerChoice::Named("ngram".into()));
        assert_eq!(found.speculative.attention_backend, BackendName::parse("flash"), "the draft's alone");
        assert_eq!((found.max_tokens, found.top_k, found.seed), (12, Some(40), 7));
        assert_eq!((found.temperature, found.top_p), (0.5, 0.9));
        assert_eq!(found.record, Some(Record { folder: "calls".into(), layer: 3, step: Some(2) }));
        let auto = options(&["--attention-backend", "AUTO", "x"]).expect("good options");
        assert_eq!(auto.attention, AttentionOptions::default());
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        for (args, wanted) in [
            (&["-n", "0", "x"] as &[&str], "-n: 0 "),
            (&[""], "PROMPT: ''"),
            (&["--temperature", "-1", "x"], "--temperature: -1 "),
            (&["--temperature", "nan", "x"], "--temperature: NaN "),
            (&["--temperature", "inf", "x"], "--temperature: inf "),
            (&["--top-k", "0", "x"], "--top-k: 0 "),
            (&["--top-p", "0", "x"], "--top-p: 0 "),
            (&["--top-p", "1.5", "x"], "--top-p: 1.5 "),
            (&["--top-p", "NaN", "x"], "--top-p: NaN "),
            (&["--model", "", "x"], "--model: ''"),
        ] {
            let error = options(args).expect_err("bad options");
            assert!(error.starts_with(wanted), "{args:?}: {error}");
        }
        for args in [
            &[] as &[&str],
            &["-n", "-1", "x"],
            &["-n", "many", "x"],
            &["--top-k", "-3", "x"],
            &["--seed", "x", "x"],
            &["--record-layer", "3", "x"],
            &["--record-step", "3", "x"],
            &["x", "y"],
            &["--unknown", "x"],
        ] {
            assert!(options(args).is_err(), "{args:?}");
        }
    }
}
