//! Standard output: one JSON document, or text for people.

use std::io::{ErrorKind, Write};

use crate::device::{Device, DeviceChoice};
use comfy_table::Table;
use serde::Serialize;

use crate::failure::Failure;

/// What every command is given.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// Whether standard output carries one JSON document.
    pub(crate) json: bool,
    /// The device that was asked for.
    pub(crate) device: DeviceChoice,
}

impl Context {
    /// Opens the device and says once what the user should know of the choice.
    pub(crate) fn open(&self) -> Result<Device, Failure> {
        let device = Device::open(&self.device).map_err(|error| Failure::new(format!("--device: {error}")))?;
        if let Some(notice) = device.notice() {
            note(notice);
        }
        Ok(device)
    }

    /// Prints the answer of a command.
    pub(crate) fn answer(&self, document: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
        if self.json { print(&json(document)?) } else { print(&text()) }
    }
}

/// A remark for people, on standard error.
pub(crate) fn note(text: &str) {
    remark(&format!("note: {text}"));
}

/// What is said beside an answer, on standard error.
pub(crate) fn remark(text: &str) {
    // Nobody is left to tell where standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// One JSON document, indented.
pub(crate) fn json(document: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(document).map_err(|error| Failure::new(format!("the answer is no JSON: {error}")))
}

/// Writes to standard output, with a line end.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| {
        if !text.ends_with('\n') {
            out.write_all(b"\n")?;
        }
        out.flush()
    });
    match written {
        // A reader that has seen enough, as in `polyattn backends | head`, is no fault.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// The command that is running, as results keep it.
pub(crate) fn command_line() -> String {
    std::iter::once("polyattn".to_owned()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" ")
}

/// An empty table in the program's style.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::UTF8_FULL_CONDENSED).set_header(header.to_vec());
    table
}

/// A number of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    format!("{:.1} MB", count as f64 / 1e6)
}

/// A fault, on standard error.
pub(crate) fn complain(text: &str) {
    remark(&format!("error: {text}"));
}
