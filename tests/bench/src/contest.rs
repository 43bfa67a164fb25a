//! A contestant, in a process of its own.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use polyattn::bench::{Agreement, Clock, Shape, Timing, catalogue};
use serde::{Deserialize, Serialize};

use crate::Error;

/// What marks an answer among whatever else a library prints.
const ANSWER: &str = "answer: ";

/// Something that computes attention.
pub(crate) trait Contestant {
    /// Times it and checks its answer, in as many ways as it has.
    fn measure(&mut self, shape: &Shape, budget: Duration) -> Result<Vec<Row>, Error>;
}

/// One way to compute one shape.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) contestant: String,
    /// Whether it is what polyattn selects.
    pub(crate) selected: bool,
    pub(crate) error: Option<String>,
    /// By GPU timestamps; absent where there are none.
    pub(crate) microseconds: Option<f64>,
    pub(crate) wall_microseconds: Option<f64>,
    pub(crate) calls: Option<u32>,
    pub(crate) repetitions: Option<u32>,
    pub(crate) max_abs_err: Option<f64>,
    pub(crate) rel_l2: Option<f64>,
    pub(crate) within_tolerance: Option<bool>,
    /// Its time ÷ that of what polyattn selects.
    pub(crate) ratio: Option<f64>,
    pub(crate) wall_ratio: Option<f64>,
}

impl Row {
    pub(crate) fn new(contestant: impl Into<String>, timing: &Timing, agreement: &Agreement) -> Self {
        Self {
            contestant: contestant.into(),
            microseconds: (timing.clock == Clock::GpuTimestamps).then_some(timing.seconds * 1e6),
            wall_microseconds: Some(timing.wall_seconds * 1e6),
            calls: Some(timing.calls),
            repetitions: Some(timing.repetitions),
            max_abs_err: Some(agreement.max_abs_err),
            rel_l2: Some(agreement.rel_l2),
            within_tolerance: Some(agreement.within_tolerance),
            ..Self::default()
        }
    }

    pub(crate) fn failed(contestant: impl Into<String>, error: impl Into<String>) -> Self {
        Self { contestant: contestant.into(), error: Some(error.into()), ..Self::default() }
    }
}

/// Fills in the ratios against the selected row. Wrong answers are compared with nobody.
pub(crate) fn compare(rows: &mut [Row]) {
    let Some(own) = rows.iter().find(|row| row.selected).cloned() else { return };
    for row in rows.iter_mut().filter(|row| row.within_tolerance == Some(true)) {
        let over = |own: Option<f64>, other: Option<f64>| Some(other? / own?);
        row.ratio = over(own.microseconds, row.microseconds);
        row.wall_ratio = over(own.wall_microseconds, row.wall_microseconds);
    }
}

/// Answers shapes by name until standard input ends.
pub(crate) fn serve(contestant: &mut dyn Contestant, budget: Duration) -> Result<(), Error> {
    let shapes = catalogue();
    for name in std::io::stdin().lines() {
        let name = name?;
        let shape = shapes.iter().find(|shape| shape.name == name).ok_or_else(|| format!("no shape '{name}'"))?;
        let rows = match contestant.measure(shape, budget) {
            Ok(rows) => rows,
            Err(error) => vec![Row::failed("", error.to_string())],
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{ANSWER}{}", serde_json::to_string(&rows)?)?;
        out.flush()?;
    }
    Ok(())
}

/// A contestant's process, as the one who holds the contest sees it.
pub(crate) struct Child {
    name: String,
    args: Vec<String>,
    running: Option<Running>,
}

struct Running {
    process: std::process::Child,
    answers: Receiver<Vec<Row>>,
}

impl Child {
    pub(crate) fn new(name: &str, args: &[&str]) -> Result<Self, Error> {
        let mut child = Self { name: name.into(), args: args.iter().map(|arg| (*arg).into()).collect(), running: None };
        child.start()?;
        Ok(child)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn start(&mut self) -> Result<(), Error> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(&self.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
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

    /// Measures a shape; whoever dies or takes longer than `patience` is started anew for the next one.
    pub(crate) fn measure(&mut self, shape: &str, patience: Duration) -> Vec<Row> {
        if self.running.is_none()
            && let Err(error) = self.start()
        {
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
