//! `polyattn fetch`.

use std::sync::atomic::AtomicBool;

use crate::models::{self, Fetched, KnownModel, Progress};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::{
    failure::{Ended, Failure, Verdict},
    interrupt,
    output::{self, Context},
};

/// Download a known model into the cache folder.
///
/// The cache folder is the environment variable POLYATTN_CACHE where set, else the system's. A model that is there is
/// verified and left alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn fetch smollm2
  POLYATTN_CACHE=/data/models polyattn fetch smollm2 --json")]
pub(crate) struct Args {
    /// The model's name.
    name: String,
}

#[derive(Serialize)]
struct Answer<'a> {
    name: &'a str,
    path: String,
    bytes: u64,
    sha256: &'a str,
    already_present: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> Ended {
    let Some(model) = models::known(&args.name) else {
        return Err(Failure::new(format!("unknown model '{}'; known are: {}", args.name, models::names())));
    };
    let fetched = fetch(model, interrupt::flag())?;
    let path = fetched.path.display().to_string();
    let Fetched { already_present, .. } = fetched;
    let answer = Answer { name: model.name, path, bytes: model.bytes, sha256: model.sha256, already_present };
    context.answer(&answer, || {
        let how = if already_present { "is there already" } else { "is there now" };
        format!("{} {how}: {} ({})", model.name, answer.path, output::bytes(model.bytes))
    })?;
    Ok(Verdict::Holds)
}

/// Gets a model, with progress on standard error.
pub(crate) fn fetch(model: &KnownModel, interrupted: &AtomicBool) -> Result<Fetched, Failure> {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    let fetched = models::fetch(model, interrupted, &mut |progress| {
        bar.set_message(match progress {
            Progress::Verifying => format!("verifying {}", model.name),
            Progress::Downloading { bytes, total } => {
                format!("downloading {}: {} of {}", model.name, output::bytes(bytes), output::bytes(total))
            }
            Progress::Unpacking => format!("unpacking {}", model.name),
        });
        bar.tick();
    });
    bar.finish_and_clear();
    fetched.map_err(|error| Failure::new(format!("fetch {}: {error}", model.name)))
}
