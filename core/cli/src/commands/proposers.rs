//! `polyattn proposers`.

use crate::api::Registry;
use serde::Serialize;

use crate::{
    failure::{Ended, Verdict},
    output::{self, Context},
};

/// List every registered proposer: what it needs of the target, and whether it asks for non-causal attention.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn proposers
  polyattn proposers --json")]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    #[serde(rename = "crate")]
    crate_name: &'static str,
    version: &'static str,
    taps: bool,
    checkpoint: bool,
    draft_attention: bool,
    non_causal: bool,
    target_vocabulary: bool,
    last_hidden: bool,
    trees: bool,
}

pub(crate) fn run(_: &Args, context: &Context) -> Ended {
    let registry = Registry::global()?;
    let rows: Vec<_> = registry
        .proposers()
        .iter()
        .map(|entry| {
            let needs = entry.proposer.requirements();
            Row {
                name: entry.proposer.name(),
                crate_name: entry.origin.crate_name,
                version: entry.origin.version,
                taps: needs.taps,
                checkpoint: needs.checkpoint,
                draft_attention: needs.draft_attention,
                non_causal: needs.non_causal,
                target_vocabulary: needs.target_vocabulary,
                last_hidden: needs.last_hidden,
                trees: needs.drafts_trees,
            }
        })
        .collect();
    context.answer(&rows, || {
        let mut table = output::table(&[
            "proposer",
            "crate",
            "taps of the target",
            "target's vocabulary",
            "checkpoint",
            "attention of its own",
            "non-causal",
            "trees",
        ]);
        let yes = |needed: bool| if needed { "yes" } else { "–" }.to_owned();
        for row in &rows {
            table.add_row([
                row.name.to_owned(),
                format!("{} {}", row.crate_name, row.version),
                yes(row.taps || row.last_hidden),
                yes(row.target_vocabulary),
                yes(row.checkpoint),
                yes(row.draft_attention),
                yes(row.non_causal),
                yes(row.trees),
            ]);
        }
        table.to_string()
    })?;
    Ok(Verdict::Holds)
}
