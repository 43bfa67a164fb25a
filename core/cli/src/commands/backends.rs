//! `polyattn backends`.

use std::fmt::Write;

use crate::{
    api::{Capabilities, Decline, RegisteredBackend, RegisteredMoeBackend, Registry},
    device::{Device, DeviceFacts},
};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    failure::{Ended, Failure, Verdict},
    output::{self, Context},
};

/// List every registered attention backend: what it can serve, and on which of the devices present.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn backends
  polyattn backends --json
  polyattn backends --markdown")]
pub(crate) struct Args {
    /// Print the table of capabilities as Markdown, a column for each backend.
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
}

#[derive(Serialize)]
struct Row<'a> {
    name: &'static str,
    #[serde(rename = "crate")]
    crate_name: &'static str,
    version: &'static str,
    priority: i32,
    capabilities: &'a Capabilities,
    devices: Vec<OnDevice>,
}

#[derive(Serialize)]
struct OnDevice {
    device: String,
    usable: bool,
    reasons: Vec<Decline>,
}

impl OnDevice {
    fn of(entry: &RegisteredBackend, facts: &DeviceFacts) -> Self {
        let mut reasons = entry.backend.capabilities().device_declines(facts);
        // Without it the device cannot be opened, whatever the backend needs.
        let needed = Decline::NeedsFeature("immediates".into());
        if !facts.is_cpu()
            && !facts.has("immediates")
            && !reasons.contains(&Decline::NeedsCpu)
            && !reasons.contains(&needed)
        {
            reasons.push(needed);
        }
        Self { device: facts.name.clone(), usable: reasons.is_empty(), reasons }
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> Ended {
    let registry = Registry::global()?;
    let entries = registry.backends();
    if args.markdown {
        let columns: Vec<_> = entries.iter().map(|entry| (entry.name(), *entry.backend.capabilities())).collect();
        output::print(&markdown(&columns)?)?;
        return Ok(Verdict::Holds);
    }
    let devices = Device::list();
    let rows: Vec<_> = entries
        .iter()
        .map(|entry| Row {
            name: entry.name(),
            crate_name: entry.origin.crate_name,
            version: entry.origin.version,
            priority: entry.priority,
            capabilities: entry.backend.capabilities(),
            devices: devices.iter().map(|facts| OnDevice::of(entry, facts)).collect(),
        })
        .collect();
    context.answer(&rows, || text(&rows, &registry.moe_backends()))?;
    Ok(Verdict::Holds)
}

fn text(rows: &[Row<'_>], moe: &[RegisteredMoeBackend]) -> String {
    let mut table = output::table(&["backend", "crate", "priority", "device", "usable"]);
    for row in rows {
        for (place, on) in row.devices.iter().enumerate() {
            let first = |text: String| if place == 0 { text } else { String::new() };
            let reasons: Vec<_> = on.reasons.iter().map(ToString::to_string).collect();
            table.add_row([
                first(row.name.to_owned()),
                first(format!("{} {}", row.crate_name, row.version)),
                first(row.priority.to_string()),
                on.device.clone(),
                if on.usable { "yes".to_owned() } else { format!("no: {}", reasons.join("; ")) },
            ]);
        }
    }
    let moe: Vec<_> = moe.iter().map(|one| format!("{} ({})", one.name(), one.origin)).collect();
    let moe = if moe.is_empty() { "none".to_owned() } else { moe.join(", ") };
    format!(
        "{table}\nWhat each of them serves: polyattn backends --markdown (or --json)\n\
         For mixtures of experts, best first: {moe}"
    )
}

/// Titles of the capabilities in the order of the table. One that is not listed here follows under its field's name, so
/// that the table is never short of one.
const TITLES: &[(&str, &str)] = &[
    ("device", "device"),
    ("gqa", "MHA, MQA, GQA"),
    ("head_dims", "head dims"),
    ("value_dims", "other value dims"),
    ("mla", "MLA"),
    ("latent_dims", "latent dims"),
    ("rope_dims", "rope dims"),
    ("causal", "causal"),
    ("non_causal", "non-causal"),
    ("per_sequence_causal", "causality per sequence"),
    ("tree", "tree masks"),
    ("prefix_spans", "prefix spans"),
    ("sliding_window", "sliding windows"),
    ("softcap", "softcap"),
    ("sinks", "attention sinks"),
    ("alibi", "ALiBi"),
    ("lse", "LSE output"),
    ("dtypes", "dtypes"),
    ("kv_dtypes", "KV dtypes"),
    ("mixed_dtypes", "KV dtype apart from dtype"),
    ("page_sizes", "page sizes"),
    ("phases", "phases"),
    ("kv_layouts", "KV layouts"),
    ("max_query_rows", "query rows of a sequence"),
    ("needs_features", "needs features"),
    ("needs_workgroup_bytes", "needs bytes of workgroup memory"),
    ("deterministic", "same bits again"),
    ("batch_invariant", "same bits in any batch"),
];

/// The table of capabilities: a row for each, a column for each backend.
fn markdown(columns: &[(&str, Capabilities)]) -> Result<String, Failure> {
    let mut fields: Vec<Map<String, Value>> = Vec::new();
    for (_, capabilities) in columns {
        match serde_json::to_value(capabilities)? {
            Value::Object(map) => fields.push(map),
            other => return Err(Failure::new(format!("capabilities are no object: {other}"))),
        }
    }
    let known = TITLES.iter().map(|(field, title)| ((*field).to_owned(), (*title).to_owned()));
    let unknown = fields.first().into_iter().flat_map(Map::keys);
    let unknown = unknown.filter(|field| TITLES.iter().all(|(known, _)| known != field));
    let rows: Vec<_> = known.chain(unknown.map(|field| (field.clone(), field.replace('_', " ")))).collect();

    let mut out = String::from("| |");
    for (name, _) in columns {
        let _ = write!(out, " `{name}` |");
    }
    let _ = write!(out, "\n|---|{}", "---|".repeat(columns.len()));
    for (field, title) in rows {
        let _ = write!(out, "\n| {title} |");
        for map in &fields {
            let _ = write!(out, " {} |", cell(map.get(&field).unwrap_or(&Value::Null)));
        }
    }
    out.push('\n');
    Ok(out)
}

/// A capability in words.
fn cell(value: &Value) -> String {
    match value {
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "–".into(),
        Value::Null => "any".into(),
        Value::String(text) if text == "none" => "–".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.as_u64() == Some(0) => "–".into(),
        Value::Number(number) => number.to_string(),
        Value::Array(items) if items.is_empty() => "–".into(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(", "),
        Value::Object(map) => match (map.get("list"), map.get("steps")) {
            (Some(list), _) => cell(list),
            (_, Some(steps)) => {
                let part = |name: &str| steps.get(name).map(Value::to_string).unwrap_or_default();
                let step = part("step");
                let by = if step == "1" { String::new() } else { format!(" by {step}") };
                format!("{} to {}{by}", part("min"), part("max"))
            }
            _ => value.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use crate::api::{DType, DeviceNeed, Dims, DtypeSet, KvDType, KvDtypeSet, Phase, PhaseSet};

    use super::*;

    #[test]
    fn every_capability_has_a_row_and_a_title() {
        let one = Capabilities::none(DeviceNeed::Gpu)
            .gqa(Dims::Steps { min: 32, max: 256, step: 8 })
            .value_dims(Dims::List(&[64, 128]))
            .causal()
            .dtypes(DtypeSet::of(&[DType::F32, DType::F16]), KvDtypeSet::of(&[KvDType::F8E4M3]))
            .page_sizes(Dims::Any)
            .phases(PhaseSet::of(&[Phase::Decode]))
            .needs_features(&["shader-f16"])
            .max_query_rows(64);
        let table = markdown(&[("one", one), ("two", Capabilities::none(DeviceNeed::Any))]).expect("plain data");
        for line in [
            "| | `one` | `two` |",
            "|---|---|---|",
            "| head dims | 32 to 256 by 8 | – |",
            "| other value dims | 64, 128 | – |",
            "| non-causal | – | – |",
            "| dtypes | f32, f16 | – |",
            "| KV dtypes | f8e4m3 | – |",
            "| page sizes | any | – |",
            "| query rows of a sequence | 64 | any |",
            "| needs features | shader-f16 | – |",
            "| device | gpu | any |",
        ] {
            assert!(table.lines().any(|found| found == line), "{line} is missing in\n{table}");
        }
        let fields = serde_json::to_value(one).expect("plain data");
        let fields = fields.as_object().expect("an object").len();
        assert_eq!(table.lines().count(), fields + 2);
        assert_eq!(TITLES.len(), fields, "a new capability wants a title");
    }
}
