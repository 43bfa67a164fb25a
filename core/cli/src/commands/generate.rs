//! `polyattn generate`.

use std::path::PathBuf;

use polyattn::api::BackendName;

use super::options::{ModelArgs, SpeculativeArgs, SpeculativeChoice};
use crate::{
    failure::{Ended, Failure},
    output::Context,
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

    /// The same seed draws the same tokens.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,

    /// Write attention calls of the run as replay files into this folder.
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// The layer whose calls are written, counted from 0 in the target and in the draft.
    #[arg(long, value_name = "LAYER", default_value_t = 0, requires = "record")]
    record_layer: u32,

    /// The step whose calls are written; all when unset. The chunks of the prompt count as steps, from 0.
    #[arg(long, value_name = "STEP", requires = "record")]
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
    /// The target's attention backend; automatically selected when unset.
    pub(crate) attention_backend: Option<BackendName>,
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
        if args.model.model.as_deref() == Some("") {
            return fault("--model", "'' is no name, file or folder".into());
        }
        Ok(Self {
            prompt: args.prompt,
            model: args.model.model,
            offline: args.model.offline,
            chat: args.chat,
            attention_backend: args.model.attention_backend.as_deref().and_then(BackendName::parse),
            speculative: args.speculative.merge()?,
            max_tokens: args.max_tokens,
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            seed: args.seed,
            record: args.record.map(|folder| Record { folder, layer: args.record_layer, step: args.record_step }),
        })
    }
}

pub(crate) fn run(args: Args, context: &Context) -> Ended {
    let options = GenerateOptions::try_from(args)?;
    tracing::debug!(?options, device = %context.device, "generate");
    Err(Failure::new("generate: this build has no engine to generate with"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
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
            attention_backend: None,
            speculative: SpeculativeChoice::default(),
            max_tokens: 256,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
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
        assert_eq!(found.attention_backend, BackendName::parse("plain"));
        assert_eq!(found.speculative.proposer, ProposerChoice::Named("ngram".into()));
        assert_eq!(found.speculative.attention_backend, BackendName::parse("flash"), "the draft's alone");
        assert_eq!((found.max_tokens, found.top_k, found.seed), (12, Some(40), 7));
        assert_eq!((found.temperature, found.top_p), (0.5, 0.9));
        assert_eq!(found.record, Some(Record { folder: "calls".into(), layer: 3, step: Some(2) }));
        let auto = options(&["--attention-backend", "AUTO", "x"]).expect("good options");
        assert_eq!(auto.attention_backend, None);
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
