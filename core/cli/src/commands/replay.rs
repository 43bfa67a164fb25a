//! `polyattn replay`.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    api::{BackendName, Decline, Device, Policy, RegisteredBackend, Registry, select},
    replay::{Case, Comparison, Outcome, ReplayError},
};
use serde::Serialize;

use crate::{
    failure::{Ended, Failure, Verdict},
    output::{self, Context},
};

/// Run recorded attention problems and compare with the recorded output, or with a reference in 64-bit floats where none
/// is recorded.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn replay call.safetensors
  polyattn replay calls/*.safetensors --backend all --device gpu --json
  polyattn replay call.safetensors --backend flash --write answer.safetensors")]
pub(crate) struct Args {
    /// Replay files.
    #[arg(required = true)]
    files: Vec<PathBuf>,

    /// The backend that must serve them; auto takes the best that can, all takes every one that can.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    backend: String,

    /// Write what the backend answered: a file for one input and one backend, otherwise a folder of such files.
    #[arg(long, value_name = "OUT")]
    write: Option<PathBuf>,
}

/// One input on one backend.
#[derive(Serialize)]
struct Row {
    file: String,
    backend: &'static str,
    device: String,
    ran: bool,
    #[serde(flatten)]
    found: Found,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Found {
    // serde_json writes what is not finite as null.
    Ran { max_abs_err: f64, rel_l2: f64, lse_max_abs_err: Option<f64>, within_tolerance: bool, milliseconds: f64 },
    Declined { declined: Vec<Decline> },
}

impl Row {
    fn outside(&self) -> bool {
        matches!(self.found, Found::Ran { within_tolerance: false, .. })
    }
}

enum Choice {
    One(Policy),
    All,
}

pub(crate) fn run(args: &Args, context: &Context) -> Ended {
    let registry = Registry::global()?;
    let choice = choice(&args.backend, registry)?;
    if args.write.is_some() && args.files.len() > 1 {
        // A bad input must not come up when half of the answers are written.
        for file in &args.files {
            Case::load(file)?;
        }
    }
    let target = Target::of(args, matches!(choice, Choice::All))?;
    let device = context.open()?;

    let mut rows = Vec::new();
    for file in &args.files {
        let case = Case::load(file)?;
        let name = file.display().to_string();
        let chosen: Vec<RegisteredBackend> = match &choice {
            Choice::One(policy) => {
                let selection = select(&case.problem, device.facts(), registry, policy);
                vec![selection.map_err(|error| Failure::new(format!("{name}: {error}")))?.backend]
            }
            Choice::All => registry.backends().to_vec(),
        };
        let before = rows.len();
        for entry in chosen {
            let found = run_one(&case, &entry, &device, target.as_ref(), file)
                .map_err(|error| Failure::new(format!("{name}: backend '{}': {error}", entry.name())))?;
            let ran = matches!(found, Found::Ran { .. });
            rows.push(Row {
                file: name.clone(),
                backend: entry.name(),
                device: device.facts().name.clone(),
                ran,
                found,
            });
        }
        if rows[before..].iter().all(|row| !row.ran) {
            return Err(nobody(&name, &rows[before..]));
        }
    }
    context.answer(&rows, || text(&rows))?;
    Ok(if rows.iter().any(Row::outside) { Verdict::Fails } else { Verdict::Holds })
}

fn choice(text: &str, registry: &Registry) -> Result<Choice, Failure> {
    if text.trim().eq_ignore_ascii_case("all") {
        return Ok(Choice::All);
    }
    let Some(name) = BackendName::parse(text) else { return Ok(Choice::One(Policy::Auto)) };
    if registry.backend(name.as_str()).is_none() {
        let names = registry.backend_names();
        return Err(Failure::new(format!("--backend: unknown attention backend '{text}'; registered are: {names}")));
    }
    Ok(Choice::One(Policy::Require(name)))
}

/// Nobody serves a file: what every backend has to say of it.
fn nobody(file: &str, rows: &[Row]) -> Failure {
    let told: Vec<_> = rows
        .iter()
        .map(|row| match &row.found {
            Found::Declined { declined } => {
                let reasons: Vec<_> = declined.iter().map(ToString::to_string).collect();
                format!("{}: {}", row.backend, reasons.join("; "))
            }
            Found::Ran { .. } => row.backend.to_owned(),
        })
        .collect();
    Failure::new(format!("{file}: no attention backend can serve it: {}", told.join(" | ")))
}

fn run_one(
    case: &Case,
    entry: &RegisteredBackend,
    device: &Device,
    target: Option<&Target>,
    file: &Path,
) -> Result<Found, ReplayError> {
    let outcome = match case.run(device, entry.backend.as_ref()) {
        Ok(outcome) => outcome,
        Err(ReplayError::Declined(declined)) => return Ok(Found::Declined { declined }),
        Err(error) => return Err(error),
    };
    let comparison = Comparison::of(case, &outcome)?;
    if let Some(target) = target {
        target.save(case, &outcome, file, entry.name())?;
    }
    Ok(Found::Ran {
        max_abs_err: comparison.max_abs_err,
        rel_l2: comparison.rel_l2,
        lse_max_abs_err: comparison.lse_max_abs_err,
        within_tolerance: comparison.within_tolerance,
        milliseconds: outcome.milliseconds,
    })
}

/// Where answers are written.
enum Target {
    File(PathBuf),
    Folder(PathBuf),
}

impl Target {
    fn of(args: &Args, all: bool) -> Result<Option<Self>, Failure> {
        let Some(out) = &args.write else { return Ok(None) };
        if args.files.len() == 1 && !all {
            return Ok(Some(Self::File(out.clone())));
        }
        let mut names = HashSet::new();
        for file in &args.files {
            let stem = stem(file);
            let shown = stem.to_string_lossy().into_owned();
            if !names.insert(stem) {
                let message = format!("--write: two inputs are called '{shown}', the answers would have one name");
                return Err(Failure::new(message));
            }
        }
        fs::create_dir_all(out)
            .map_err(|error| Failure::new(format!("--write: cannot make the folder '{}': {error}", out.display())))?;
        Ok(Some(Self::Folder(out.clone())))
    }

    fn save(&self, case: &Case, outcome: &Outcome, input: &Path, backend: &str) -> Result<(), ReplayError> {
        match self {
            Self::File(path) => outcome.save(case, path),
            Self::Folder(folder) => {
                let mut name = stem(input);
                name.push(format!(".{backend}.safetensors"));
                outcome.save(case, folder.join(name))
            }
        }
    }
}

/// An input's name, without the extension of its format.
fn stem(file: &Path) -> OsString {
    let named = match file.extension() {
        Some(extension) if extension == "safetensors" => file.file_stem(),
        _ => file.file_name(),
    };
    named.unwrap_or(file.as_os_str()).to_owned()
}

fn text(rows: &[Row]) -> String {
    let mut table = output::table(&[
        "file",
        "backend",
        "max abs error",
        "relative L2",
        "LSE max abs error",
        "ms",
        "within tolerance",
    ]);
    let dash = || "–".to_owned();
    for row in rows {
        let cells = match &row.found {
            Found::Ran { max_abs_err, rel_l2, lse_max_abs_err, within_tolerance, milliseconds } => [
                format!("{max_abs_err:.2e}"),
                format!("{rel_l2:.2e}"),
                lse_max_abs_err.map_or_else(dash, |error| format!("{error:.2e}")),
                format!("{milliseconds:.3}"),
                if *within_tolerance { "yes" } else { "NO" }.to_owned(),
            ],
            Found::Declined { declined } => {
                let reasons: Vec<_> = declined.iter().map(ToString::to_string).collect();
                [dash(), dash(), dash(), dash(), format!("declined: {}", reasons.join("; "))]
            }
        };
        table.add_row([row.file.clone(), row.backend.to_owned()].into_iter().chain(cells));
    }
    let device = rows.first().map(|row| row.device.as_str()).unwrap_or_default();
    format!("On {device}:\n{table}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inputs_name_loses_the_extension_of_its_format_alone() {
        for (file, name) in [("a/b.safetensors", "b"), ("b.bin", "b.bin"), ("a.b.safetensors", "a.b"), ("x", "x")] {
            assert_eq!(stem(Path::new(file)), name);
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_null() {
        let row = Row {
            file: "a".into(),
            backend: "b",
            device: "c".into(),
            ran: true,
            found: Found::Ran {
                max_abs_err: f64::NAN,
                rel_l2: f64::INFINITY,
                lse_max_abs_err: None,
                within_tolerance: false,
                milliseconds: 1.5,
            },
        };
        assert_eq!(
            serde_json::to_value(&row).expect("plain data"),
            serde_json::json!({
                "file": "a", "backend": "b", "device": "c", "ran": true, "max_abs_err": null, "rel_l2": null,
                "lse_max_abs_err": null, "within_tolerance": false, "milliseconds": 1.5,
            })
        );
        let row = Row { ran: false, found: Found::Declined { declined: vec![Decline::Mla] }, ..row };
        assert_eq!(
            serde_json::to_value(&row).expect("plain data"),
            serde_json::json!({ "file": "a", "backend": "b", "device": "c", "ran": false, "declined": ["MLA not supported"] })
        );
    }
}
