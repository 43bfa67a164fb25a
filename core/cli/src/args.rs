//! The command line.

use std::{convert::Infallible, ffi::OsString, io::IsTerminal, process::ExitCode};

use crate::device::DeviceChoice;
use clap::{ArgAction, Parser, Subcommand, error::ErrorKind};
use tracing_subscriber::EnvFilter;

use crate::{
    commands,
    failure::{Ended, Failure},
    output::{self, Context},
};

const TOP_EXAMPLES: &str = "Examples:
  polyattn generate --chat \"What is the capital of France?\"
  polyattn devices
  polyattn backends --json
  polyattn select engine.toml --device cpu
  polyattn replay call.safetensors --backend all

Exit codes: 0 done; 1 ran, but the thing asked for does not hold; 2 bad input, bad configuration or nothing that can
serve it, with one message on standard error (and with --json as {\"error\": …} on standard output).";

/// Attention as a plugin: who can serve which attention problem, and real models that use it.
#[derive(Debug, Parser)]
#[command(name = "polyattn", version, after_help = TOP_EXAMPLES, propagate_version = true)]
pub(crate) struct Cli {
    /// Print exactly one JSON document on standard output; errors too.
    #[arg(long, global = true)]
    json: bool,

    /// The device: auto (the best hardware adapter, else the CPU), cpu, gpu (the best adapter, software ones included),
    /// an adapter's index, or part of its name.
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto", value_parser = device,
        allow_negative_numbers = true)]
    device: DeviceChoice,

    /// Say more on standard error; twice for more still. The environment variable POLYATTN_LOG filters in detail.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List every registered attention backend: what it can serve, and where.
    Backends(commands::backends::Args),
    /// List every registered proposer: what it needs of the target, and of attention.
    Proposers(commands::proposers::Args),
    /// List the adapters and the CPU, with the facts that selection looks at.
    Devices(commands::devices::Args),
    /// Resolve an engine configuration: who serves what, and why each other one does not.
    Select(commands::select::Args),
    /// Download a known model into the cache folder.
    Fetch(commands::fetch::Args),
    /// Run recorded attention problems and compare with the recorded output.
    Replay(commands::replay::Args),
    /// Run the conformance kit against a registered backend.
    Check(commands::check::Args),
    /// Generate text with a real model.
    Generate(Box<commands::generate::Args>),
    /// Measure.
    Bench(commands::bench::Args),
}

fn device(text: &str) -> Result<DeviceChoice, Infallible> {
    text.parse()
}

/// Parses the command line, runs the command and tells how it went.
pub(crate) fn run() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) if error.kind() == ErrorKind::InvalidUtf8 => return fail(&no_text(&args), asks_for_json(&args)),
        Err(error) => return refused(&error, asks_for_json(&args)),
    };
    log(cli.verbose);
    let context = Context { json: cli.json, device: cli.device };
    match execute(cli.command, &context) {
        Ok(verdict) => verdict.into(),
        Err(failure) => fail(&failure, context.json),
    }
}

fn execute(command: Command, context: &Context) -> Ended {
    match command {
        Command::Backends(args) => commands::backends::run(&args, context),
        Command::Proposers(args) => commands::proposers::run(&args, context),
        Command::Devices(args) => commands::devices::run(&args, context),
        Command::Select(args) => commands::select::run(&args, context),
        Command::Fetch(args) => commands::fetch::run(&args, context),
        Command::Replay(args) => commands::replay::run(&args, context),
        Command::Check(args) => commands::check::run(&args, context),
        Command::Generate(args) => commands::generate::run(*args, context),
        Command::Bench(args) => commands::bench::run(args, context),
    }
}

/// Whether `--json` is among the options of a command line that clap could not read.
fn asks_for_json(args: &[OsString]) -> bool {
    args.iter().skip(1).take_while(|arg| *arg != "--").any(|arg| arg == "--json")
}

/// Names the argument that is no text.
fn no_text(args: &[OsString]) -> Failure {
    let found = args.iter().skip(1).find(|arg| arg.to_str().is_none());
    Failure::new(format!("the argument '{}' is not UTF-8", found.map(|arg| arg.to_string_lossy()).unwrap_or_default()))
}

/// Help, the version, or a command line that is wrong.
fn refused(error: &clap::Error, json: bool) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nobody is left to tell where standard output is closed.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        _ => {
            if json {
                let text = error.render().to_string();
                // The usage and hints that follow are for people.
                let message = ["\n\nUsage:", "\n\nFor more information"]
                    .iter()
                    .fold(text.as_str(), |text, end| text.split(end).next().unwrap_or(text));
                let message = message.strip_prefix("error: ").unwrap_or(message).trim();
                print_error(message);
            }
            let _ = error.print();
            ExitCode::from(Failure::EXIT)
        }
    }
}

fn fail(failure: &Failure, json: bool) -> ExitCode {
    if json {
        print_error(&failure.0);
    }
    output::complain(&failure.0);
    ExitCode::from(Failure::EXIT)
}

fn print_error(message: &str) {
    let document = serde_json::json!({ "error": message });
    if let Err(failure) = output::json(&document).and_then(|text| output::print(&text)) {
        output::complain(&failure.0);
    }
}

fn log(verbose: u8) {
    // wgpu warns of every driver's peculiarities, which are no concern of who runs a command.
    let filter = match verbose {
        0 => "warn,wgpu_core=error,wgpu_hal=error,naga=error",
        1 => "warn,polyattn=info,wgpu_core=error,wgpu_hal=error,naga=error",
        2 => "info,polyattn=debug",
        _ => "debug,polyattn=trace",
    };
    let filter = EnvFilter::try_from_env("POLYATTN_LOG").unwrap_or_else(|_| EnvFilter::new(filter));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_examples() {
        fn check(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:\n  polyattn "), "{} has none", command.get_name());
            for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
                check(sub);
            }
        }
        check(&Cli::command());
    }
}
