//! Running the program.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use serde_json::Value;

/// What a run left behind.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// Standard output as the one JSON document it must be.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        match serde_json::from_str(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("no single JSON document ({error}): {self:?}"),
        }
    }

    /// The message of a run that must have ended with exit code 2, without and with `--json`.
    #[track_caller]
    pub(crate) fn error(&self) -> String {
        assert_eq!(self.code, 2, "{self:?}");
        let json = self.json();
        let object = json.as_object().expect("an object");
        assert_eq!(object.len(), 1, "{self:?}");
        let message = object["error"].as_str().expect("a text").to_owned();
        assert!(!message.is_empty() && self.stderr.contains(message.lines().next().unwrap_or_default()), "{self:?}");
        message
    }
}

/// The program, apart from the user's own models and settings.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polyattn"));
    command.args(args).env_remove("XDG_RUNTIME_DIR").env_remove("POLYATTN_LOG").env_remove("POLYATTN_MODELS");
    command.env("POLYATTN_CACHE", std::env::temp_dir().join("polyattn-tests-without-models"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub(crate) fn finish(mut command: Command, stdin: Option<&str>) -> Run {
    if stdin.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().expect("the program was built");
    if let (Some(text), Some(mut pipe)) = (stdin, child.stdin.take()) {
        // A program that refuses its arguments does not read.
        let _ = pipe.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().expect("it ends");
    Run {
        code: output.status.code().expect("no signal ended it"),
        stdout: String::from_utf8(output.stdout).expect("text"),
        stderr: String::from_utf8(output.stderr).expect("text"),
    }
}

pub(crate) fn run(args: &[&str]) -> Run {
    finish(command(args), None)
}

/// Whether the machine has an adapter, be it a software one.
pub(crate) fn has_gpu() -> bool {
    let devices = run(&["devices", "--json"]).json();
    devices.as_array().expect("a list").len() > 1
}
