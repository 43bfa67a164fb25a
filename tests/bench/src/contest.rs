//! A contestant, in a process of its own.

use std::{io::Write, time::Duration};

use polyattn::bench::{Agreement, Clock, Shape, Timing, catalogue};
use serde::{Deserialize, Serialize};

use crate::Error;

/// What marks an answer among whatever else a library prints.
pub(crate) const ANSWER: &str = "answer: ";

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
