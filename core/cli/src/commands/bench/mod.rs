//! `polyattn bench`.

mod acceptance;
mod generate;
mod kernels;
mod plot;

use crate::{failure::Ended, output::Context};

/// Measure, and print tables that say on which device.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn bench generate --model smollm2
  polyattn bench generate --device cpu --json
  polyattn bench kernels --shape 'llama3-8b/decode' --device gpu
  polyattn bench kernels --assert-selection
  polyattn bench acceptance --dataset prompts.jsonl --plot acceptance.svg")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Prefill and decode tokens/s of a model, plain and with each proposer.
    Generate(generate::Args),
    /// What of drafts is accepted, by position and proposer, over a data set of prompts.
    Acceptance(Box<acceptance::Args>),
    /// Attention of real models' shapes, by every backend that serves them.
    Kernels(kernels::Args),
}

pub(crate) fn run(args: Args, context: &Context) -> Ended {
    match args.what {
        What::Generate(args) => generate::run(&args, context),
        What::Acceptance(args) => acceptance::run(&args, context),
        What::Kernels(args) => kernels::run(&args, context),
    }
}
