//! `polyattn bench`.

use std::path::PathBuf;

use super::options::ModelArgs;
use crate::{
    failure::{Ended, Failure},
    output::Context,
};

/// Measure, and print tables that say on which device.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn bench generate --model smollm2
  polyattn bench generate --device cpu --json")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Prefill and decode tokens/s of a model, plain and with each proposer.
    Generate(GenerateArgs),
}

/// Prefill and decode tokens/s of a model, plain and with each proposer.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn bench generate --model smollm2
  polyattn bench generate --proposer none --proposer ngram -n 64 --device gpu")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// A proposer to measure, none for plain decoding; may be given several times. Without, plain decoding and every
    /// proposer that the model has what it needs for.
    #[arg(long, value_name = "NAME|none")]
    pub(crate) proposer: Vec<String>,

    /// The draft model of proposers that need one: a file or a folder.
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) draft_model: Option<PathBuf>,

    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) prompt_tokens: u32,

    /// New tokens.
    #[arg(short = 'n', long = "max-tokens", value_name = "N", default_value_t = 128,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,

    /// Runs of each row, of which the fastest counts.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeat: u32,
}

pub(crate) fn run(args: Args, context: &Context) -> Ended {
    let What::Generate(args) = args.what;
    tracing::debug!(?args, device = %context.device, "bench generate");
    Err(Failure::new("bench generate: this build has no engine to measure"))
}
