//! `polyattn select`.

use std::{
    fmt::Write,
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use crate::api::{
    BackendChoice, BackendName, DeviceFacts, EngineConfig, Phase, Policy, Registry, Resolution, ResolvedLayer, Role,
    resolve,
};
use serde::de::DeserializeOwned;
use tracing::subscriber::{NoSubscriber, with_default};

use crate::{
    failure::{Ended, Failure, Verdict},
    output::{self, Context},
};

/// Resolve an engine configuration: which backend serves each role, phase and layer kind, and why each other one does
/// not.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn select engine.json
  polyattn select engine.json --explain
  polyattn select engine.toml --device cpu --json
  polyattn select - < engine.json")]
pub(crate) struct Args {
    /// The configuration, JSON or TOML by its extension, otherwise by its content; - is standard input.
    config: PathBuf,

    /// A table of who serves what and why, who declined and why, and what one change would let them in.
    #[arg(long)]
    explain: bool,
}

/// The method of a speculative section that names none.
const DEFAULT_METHOD: &str = "dflash";

pub(crate) fn run(args: &Args, context: &Context) -> Ended {
    let (name, text) = read(&args.config)?;
    let mut config: EngineConfig =
        parse(&text, syntax(&args.config, &text)).map_err(|message| Failure::new(format!("{name}: {message}")))?;
    if let Some(speculative) = config.speculative.as_mut().filter(|speculative| speculative.method.is_empty()) {
        DEFAULT_METHOD.clone_into(&mut speculative.method);
    }
    let registry = Registry::global()?;
    let device = context.open()?;
    let resolution =
        resolve(&config, device.facts(), registry).map_err(|error| Failure::new(format!("{name}: {error}")))?;
    context.answer(&resolution, || {
        let facts = device.facts();
        if args.explain { explain(&resolution, &config, facts, registry) } else { text_of(&resolution, &facts.name) }
    })?;
    Ok(Verdict::Holds)
}

fn read(path: &Path) -> Result<(String, String), Failure> {
    let (name, bytes) = if path == Path::new("-") {
        let mut bytes = Vec::new();
        ("standard input".to_owned(), std::io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes))
    } else {
        (path.display().to_string(), fs::read(path))
    };
    let bytes = bytes.map_err(|error| Failure::new(format!("{name}: cannot be read: {error}")))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        Failure::new(format!("{name}: is no text: byte {} is not UTF-8", error.utf8_error().valid_up_to()))
    })?;
    // Some editors begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    Ok((name, text))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Syntax {
    Json,
    Toml,
}

fn syntax(path: &Path, text: &str) -> Syntax {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    match extension.as_deref() {
        Some("json") => Syntax::Json,
        Some("toml") => Syntax::Toml,
        // No TOML document starts with a brace, and no configuration in JSON with anything else.
        _ if text.trim_start().starts_with('{') => Syntax::Json,
        _ => Syntax::Toml,
    }
}

/// Reads a configuration. The message of an error names field, line and column.
fn parse<T: DeserializeOwned>(text: &str, syntax: Syntax) -> Result<T, String> {
    match syntax {
        Syntax::Json => {
            let mut source = serde_json::Deserializer::from_str(text);
            let value = serde_path_to_error::deserialize(&mut source).map_err(|error| {
                let path = error.path().to_string();
                at(&path, error.inner().to_string())
            })?;
            source.end().map_err(|error| error.to_string())?;
            Ok(value)
        }
        Syntax::Toml => {
            let place = |error: &toml::de::Error| match error.span() {
                Some(span) => {
                    let (line, column) = line_and_column(text, span.start);
                    format!("{} at line {line} column {column}", error.message())
                }
                None => error.message().to_owned(),
            };
            let source = toml::Deserializer::parse(text).map_err(|error| place(&error))?;
            serde_path_to_error::deserialize(source).map_err(|error| {
                let path = error.path().to_string();
                at(&path, place(error.inner()))
            })
        }
    }
}

/// A message with the path it belongs to; the root has none.
fn at(path: &str, message: String) -> String {
    if path == "." { message } else { format!("{path}: {message}") }
}

/// Line and column, from 1, of a place in bytes.
fn line_and_column(text: &str, place: usize) -> (usize, usize) {
    let before = text.get(..place).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|char| *char != '\n').count() + 1;
    (line, column)
}

fn text_of(resolution: &Resolution, device: &str) -> String {
    let layers = || resolution.target.iter().chain(&resolution.draft);
    let mut table = output::table(&["role", "phase", "layer", "served by", "policy", "attention"]);
    for layer in layers() {
        table.add_row([
            layer.problem.role.to_string(),
            layer.phase_name(),
            layer.problem.layer.to_string(),
            layer.backend.name().to_owned(),
            layer.policy.name().to_owned(),
            if layer.use_non_causal() { "non-causal" } else { "causal" }.to_owned(),
        ]);
    }
    let mut out = format!("On {device}:\n{table}\n");
    out += &experts(resolution);
    if let Some(proposer) = &resolution.proposer
        && resolution.draft.is_empty()
    {
        let _ = writeln!(out, "The proposer '{}' runs no attention of its own.", proposer.proposer.name());
    }
    let _ = writeln!(out, "\nNot taken:");
    let mut told: Vec<(Told<'_>, Vec<String>)> = Vec::new();
    for layer in layers() {
        for told_now in reasons(layer) {
            match told.iter_mut().find(|(one, _)| *one == told_now) {
                Some((_, phases)) => phases.push(layer.phase_name()),
                None => told.push((told_now, vec![layer.phase_name()])),
            }
        }
    }
    if told.is_empty() {
        let _ = writeln!(out, "  nobody else is registered");
    }
    for (one, phases) in told {
        let why = if one.why.is_empty() { "could serve, was outranked".to_owned() } else { one.why };
        let _ = writeln!(out, "  {} for {} {} layer '{}': {why}", one.backend, one.role, phases.join(", "), one.layer);
    }
    out
}

/// The whole decision as a table. Phases of a layer kind that came out alike share their rows.
fn explain(resolution: &Resolution, config: &EngineConfig, device: &DeviceFacts, registry: &Registry) -> String {
    let mut groups: Vec<Vec<&ResolvedLayer>> = Vec::new();
    for layer in resolution.target.iter().chain(&resolution.draft) {
        let alike = |other: &ResolvedLayer| {
            let key = |one: &ResolvedLayer| {
                (one.problem.role, one.problem.layer.clone(), one.backend.name(), one.policy.name())
            };
            key(other) == key(layer) && other.declined == layer.declined
        };
        match groups.iter_mut().find(|group| group.first().is_some_and(|other| alike(other))) {
            Some(group) => group.push(layer),
            None => groups.push(vec![layer]),
        }
    }
    let mut table = output::table(&["role", "layer", "phase", "backend", "", "why", "one change that would let it in"]);
    for group in groups {
        let Some(layer) = group.first() else { continue };
        let problem = &layer.problem;
        let phases = group.iter().map(|layer| layer.phase_name()).collect::<Vec<_>>().join(", ");
        let place = [problem.role.to_string(), problem.layer.to_string(), phases];
        let why = chosen_why(layer);
        table.add_row(place.into_iter().chain([layer.backend.name().into(), "serves".into(), why, String::new()]));
        for declined in &layer.declined {
            let entry = registry.backend(declined.backend);
            let (verdict, why, change) = if declined.reasons.is_empty() {
                let priority = entry.map_or(0, |entry| entry.priority);
                let change = naming(declined.backend, &group, config, device, registry);
                let change = change.map_or_else(|| "-".into(), |change| format!("name it: {change}"));
                ("outranked", format!("could serve; priority {priority}"), change)
            } else {
                let why = declined.reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
                let change = entry.and_then(|entry| entry.remedy(&declined.reasons)).unwrap_or_else(|| "-".into());
                ("declines", why, change)
            };
            let blank = [String::new(), String::new(), String::new()];
            table.add_row(blank.into_iter().chain([declined.backend.into(), verdict.into(), why, change]));
        }
    }
    let mut out = format!("On {}:\n{table}\n", device.name);
    let mut caches: Vec<_> = resolution.target.iter().chain(&resolution.draft).collect();
    caches.dedup_by_key(|layer| (layer.problem.role, layer.problem.layer.clone()));
    out += &experts(resolution);
    for layer in caches {
        let (problem, layout) = (&layer.problem, layer.problem.kv_layout.name());
        let _ = writeln!(out, "The cache of {} layer '{}' has the layout {layout}.", problem.role, problem.layer);
    }
    if let Some(proposer) = &resolution.proposer {
        let name = proposer.proposer.name();
        let _ = match resolution.draft.is_empty() {
            true => writeln!(out, "The proposer '{name}' runs no attention of its own."),
            false => {
                writeln!(out, "The draft's attention is chosen apart from the target's; the proposer is '{name}'.")
            }
        };
    }
    out
}

/// A line for each layer kind with experts: who serves them, and why nobody else.
fn experts(resolution: &Resolution) -> String {
    let mut out = String::new();
    for moe in &resolution.moe {
        let (role, layer, backend) = (moe.problem.role, &moe.problem.layer, moe.backend.name());
        let _ = write!(out, "The experts of {role} layer '{layer}' are served by '{backend}' ({})", moe.policy.name());
        for one in &moe.declined {
            let reasons: Vec<_> = one.reasons.iter().map(ToString::to_string).collect();
            let why = if reasons.is_empty() { "could serve".to_owned() } else { reasons.join("; ") };
            let _ = write!(out, ", not by '{}': {why}", one.backend);
        }
        out.push_str(".\n");
    }
    out
}

fn chosen_why(layer: &ResolvedLayer) -> String {
    let able = 1 + layer.declined.iter().filter(|one| one.reasons.is_empty()).count();
    let ranked = match able {
        1 => "the only one that can serve".to_owned(),
        _ => format!("highest priority ({}) of {able} that can serve", layer.backend.priority),
    };
    match &layer.policy {
        Policy::Require(_) => "required by name".into(),
        Policy::Prefer(name) if name.as_str() == layer.backend.name() => "preferred by name".into(),
        Policy::Prefer(name) => format!("{ranked}; '{name}' is preferred and declines"),
        _ => ranked,
    }
}

/// The setting that gives a layer kind's phases to a backend which could serve them: the widest with which the whole
/// configuration still resolves. `None` where no single one does it.
fn naming(
    backend: &str,
    group: &[&ResolvedLayer],
    config: &EngineConfig,
    device: &DeviceFacts,
    registry: &Registry,
) -> Option<String> {
    let (name, problem) = (BackendName::parse(backend)?, &group.first()?.problem);
    let choice = BackendChoice::Require(name.clone());
    let kind = problem.layer.to_string();
    let mut phases: Vec<Phase> = group.iter().map(|layer| layer.problem.phase).collect();
    phases.dedup();
    // Each setting with the configuration that has it, and the phases that it is for.
    let mut settings: Vec<(String, EngineConfig, &[Phase])> = Vec::new();
    let mut setting = |fields: &[String], phases, change: &dyn Fn(&mut EngineConfig)| {
        let mut changed = config.clone();
        change(&mut changed);
        let named: Vec<_> = fields.iter().map(|field| format!("{field} \"{backend}\"")).collect();
        settings.push((named.join(", "), changed, phases));
    };
    match problem.role {
        Role::Target => {
            setting(&["attention.backend".into()], &phases, &|config| config.attention.backend = choice.clone());
            // Those of all phases first, then of one.
            for some in [&phases[..]].into_iter().chain(phases.chunks(1)) {
                let fields: Vec<_> = some.iter().map(|phase| format!("attention.backend_per_phase.{phase}")).collect();
                setting(&fields, some, &|config| {
                    let chosen = some.iter().map(|phase| (*phase, choice.clone()));
                    config.attention.backend_per_phase.extend(chosen);
                });
            }
            setting(&[format!("attention.backend_per_kind.{kind}")], &phases, &|config| {
                config.attention.backend_per_kind.insert(kind.clone(), choice.clone());
            });
        }
        Role::Draft => {
            setting(&["speculative.attention_backend".into()], &phases, &|config| {
                if let Some(speculative) = &mut config.speculative {
                    speculative.attention_backend = Some(name.clone());
                }
            });
            setting(&[format!("speculative.attention_backend_per_kind.{kind}")], &phases, &|config| {
                if let Some(speculative) = &mut config.speculative {
                    speculative.attention_backend_per_kind.insert(kind.clone(), choice.clone());
                }
            });
        }
    }
    let works = |(_, changed, phases): &(String, EngineConfig, &[Phase])| {
        // What is only tried is not logged.
        let resolved = with_default(NoSubscriber::default(), || resolve(changed, device, registry));
        resolved.is_ok_and(|resolution| {
            let layers = resolution.target.iter().chain(&resolution.draft).filter(|one| {
                let other = &one.problem;
                (other.role, &other.layer) == (problem.role, &problem.layer) && phases.contains(&other.phase)
            });
            layers.into_iter().all(|one| one.backend.name() == backend)
        })
    };
    settings.into_iter().find(works).map(|(setting, ..)| setting)
}

/// What is told of a backend that was not taken; the same for several phases is told once.
#[derive(PartialEq)]
struct Told<'a> {
    backend: &'static str,
    role: Role,
    layer: &'a str,
    why: String,
}

fn reasons(layer: &ResolvedLayer) -> impl Iterator<Item = Told<'_>> {
    layer.declined.iter().map(|declined| Told {
        backend: declined.backend,
        role: layer.problem.role,
        layer: &layer.problem.layer,
        why: declined.reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = "[target]\ndtype = \"f16\"\n[[target.layers]]\nname = \"full\"\nkind = \"gqa\"\nquery_heads = 8\n\
                        kv_heads = 2\nhead_dim = 64\n";
    const JSON: &str = r#"{ "target": { "dtype": "f16", "layers": [
        { "name": "full", "kind": "gqa", "query_heads": 8, "kv_heads": 2, "head_dim": 64 } ] } }"#;

    fn error(text: &str, syntax: Syntax) -> String {
        parse::<EngineConfig>(text, syntax).expect_err("a bad configuration")
    }

    #[test]
    fn both_syntaxes_say_the_same() {
        let toml: EngineConfig = parse(TOML, Syntax::Toml).expect("good");
        assert_eq!(toml, parse(JSON, Syntax::Json).expect("good"));
    }

    #[test]
    fn the_syntax_goes_by_the_extension_then_by_the_content() {
        assert_eq!(syntax(Path::new("a.json"), TOML), Syntax::Json);
        assert_eq!(syntax(Path::new("a.TOML"), JSON), Syntax::Toml);
        assert_eq!(syntax(Path::new("a"), JSON), Syntax::Json);
        assert_eq!(syntax(Path::new("-"), TOML), Syntax::Toml);
        assert_eq!(syntax(Path::new("a.conf"), "\n  {"), Syntax::Json);
    }

    #[test]
    fn errors_name_field_line_and_column() {
        let found = error(&JSON.replace("64", "\"wide\""), Syntax::Json);
        assert!(found.starts_with("target.layers[0].head_dim: "), "{found}");
        assert!(found.contains("\"wide\"") && found.contains("line 2 column"), "{found}");

        let found = error(&TOML.replace("64", "\"wide\""), Syntax::Toml);
        assert!(found.starts_with("target.layers[0].head_dim: "), "{found}");
        assert!(found.contains("\"wide\"") && found.ends_with("at line 8 column 12"), "{found}");

        let found = error(&TOML.replace("head_dim", "heads_dim"), Syntax::Toml);
        assert!(found.contains("unknown field `heads_dim`") && found.contains("line 8"), "{found}");
        let found = error(&TOML.replace("head_dim = 64", "head_dim = "), Syntax::Toml);
        assert!(found.contains("line 8"), "{found}");
        let found = error(&JSON.replace(": 64", ":"), Syntax::Json);
        assert!(found.contains("line 2"), "{found}");
        for empty in ["", " ", "[]", "3", "{"] {
            assert!(!error(empty, Syntax::Json).is_empty());
        }
        assert!(error("", Syntax::Toml).contains("target"));
        assert!(error(&format!("{JSON} {JSON}"), Syntax::Json).contains("trailing characters"));
    }

    #[test]
    fn deep_nesting_is_an_error() {
        assert!(!error(&"[".repeat(100_000), Syntax::Json).is_empty());
        assert!(!error(&format!("a = {}", "[".repeat(100_000)), Syntax::Toml).is_empty());
        assert!(!error(&format!("{{\"target\":{}", "{\"a\":".repeat(100_000)), Syntax::Json).is_empty());
    }

    #[test]
    fn places_are_counted_in_characters() {
        assert_eq!(line_and_column("", 0), (1, 1));
        assert_eq!(line_and_column("ä\nöx", 5), (2, 2));
        assert_eq!(line_and_column("ab", 99), (1, 3));
    }
}
