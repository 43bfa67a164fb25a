//! `polyattn devices`.

use crate::device::{Device, DeviceFacts};
use serde::Serialize;

use crate::{
    failure::{Ended, Verdict},
    output::{self, Context},
};

/// List the adapters and the CPU, with the facts that selection looks at.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn devices
  polyattn devices --json")]
pub(crate) struct Args {}

#[derive(Serialize)]
struct Row<'a> {
    index: usize,
    #[serde(flatten)]
    facts: &'a DeviceFacts,
}

pub(crate) fn run(_: &Args, context: &Context) -> Ended {
    let devices = Device::list();
    let rows: Vec<_> = devices.iter().enumerate().map(|(index, facts)| Row { index, facts }).collect();
    context.answer(&rows, || {
        let mut table =
            output::table(&["", "name", "kind", "interface", "driver", "f16", "subgroups", "workgroup memory"]);
        for Row { index, facts } in &rows {
            let (f16, subgroups, memory) = if facts.is_cpu() {
                (String::new(), String::new(), String::new())
            } else {
                (
                    if facts.has("shader-f16") { "yes" } else { "no" }.to_owned(),
                    match (facts.subgroup_min, facts.subgroup_max) {
                        (_, 0) => "no".to_owned(),
                        (min, max) if min == max => max.to_string(),
                        (min, max) => format!("{min} to {max}"),
                    },
                    format!("{} KiB", facts.limits.workgroup_bytes / 1024),
                )
            };
            let kind = match (facts.is_cpu(), facts.hardware) {
                (true, _) => "CPU",
                (false, true) => "GPU",
                (false, false) => "GPU (software)",
            };
            table.add_row([
                &index.to_string(),
                facts.name.as_str(),
                kind,
                &facts.interface,
                &facts.driver,
                &f16,
                &subgroups,
                &memory,
            ]);
        }
        table.to_string()
    })?;
    Ok(Verdict::Holds)
}
