//! The contestants' processes, and their answers side by side.

use std::{
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use crate::{
    Error,
    contest::{ANSWER, Row},
};

/// Fills in the ratios against the selected row. Wrong answers are compared with nobody.
pub(crate) fn compare(rows: &mut [Row]) {
    let Some(own) = rows.iter().find(|row| row.selected).cloned() else { return };
    for row in rows.iter_mut().filter(|row| row.within_tolerance == Some(true)) {
        let over = |own: Option<f64>, other: Option<f64>| Some(other? / own?);
        row.ratio = over(own.microseconds, row.microseconds);
        row.wall_ratio = over(own.wall_microseconds, row.wall_microseconds);
    }
}

/// A contestant's process, as the one who holds the contest sees it.
pub(crate) struct Child {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    running: Option<Running>,
}

struct Running {
    process: std::process::Child,
    answers: Receiver<Vec<Row>>,
}

impl Child {
    pub(crate) fn new(name: &str, program: PathBuf, args: &[&str]) -> Self {
        Self { name: name.into(), program, args: args.iter().map(|arg| (*arg).into()).collect(), running: None }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn start(&mut self) -> Result<(), Error> {
        let mut process =
            Command::new(&self.program).args(&self.args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (send, answers) = channel();
        if let Some(out) = process.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    if let Some(rows) = line.strip_prefix(ANSWER).and_then(|text| serde_json::from_str(text).ok()) {
                        let _ = send.send(rows);
                    }
                }
            });
        }
        self.running = Some(Running { process, answers });
        Ok(())
    }

    /// Measures a shape in a process that is started for it and ends with its answer, or after `patience`: a tuner that
    /// went on would slow whoever comes next.
    pub(crate) fn measure(&mut self, shape: &str, patience: Duration) -> Vec<Row> {
        if let Err(error) = self.start() {
            return vec![Row::failed(&self.name, error.to_string())];
        }
        let Some(running) = &mut self.running else { return Vec::new() };
        let asked = match &mut running.process.stdin {
            Some(stdin) => writeln!(stdin, "{shape}").and_then(|()| stdin.flush()).is_ok(),
            None => false,
        };
        let answer = if asked { running.answers.recv_timeout(patience).ok() } else { None };
        match answer {
            Some(mut rows) => {
                self.stop();
                for row in rows.iter_mut().filter(|row| row.contestant.is_empty()) {
                    row.contestant.clone_from(&self.name);
                }
                rows
            }
            None => {
                let gone = running.process.try_wait().ok().flatten();
                self.stop();
                let why = match gone {
                    Some(status) => format!("it ended: {status}"),
                    None => format!("no answer within {} s", patience.as_secs()),
                };
                vec![Row::failed(&self.name, why)]
            }
        }
    }

    fn stop(&mut self) {
        if let Some(mut running) = self.running.take() {
            let _ = running.process.kill();
            let _ = running.process.wait();
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_against_what_is_selected_and_only_of_right_answers() {
        let row = |name: &str, microseconds: f64, right: bool| Row {
            contestant: name.into(),
            microseconds: Some(microseconds),
            within_tolerance: Some(right),
            ..Row::default()
        };
        let mut rows = [row("a", 4.0, true), row("b", 2.0, true), row("c", 3.0, false), Row::failed("d", "it is gone")];
        rows[1].selected = true;
        compare(&mut rows);
        assert_eq!(rows.map(|row| row.ratio), [Some(2.0), Some(1.0), None, None]);
    }
}
