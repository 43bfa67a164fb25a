//! polyattn: every registered backend that serves a shape.

use std::time::Duration;

use polyattn::{
    api::{Device, Policy, Registry, select},
    bench::{Shape, Workload},
};

use crate::{
    Error,
    contest::{Contestant, Row},
};

pub(crate) const NAME: &str = "polyattn";

const PAGE_SIZE: u32 = 16;

pub(crate) struct Own {
    device: Device,
    registry: &'static Registry,
}

impl Own {
    pub(crate) fn new(device: Device, registry: &'static Registry) -> Self {
        Self { device, registry }
    }
}

impl Contestant for Own {
    fn measure(&mut self, shape: &Shape, budget: Duration) -> Result<Vec<Row>, Error> {
        let workload = Workload::new(&self.device, shape, PAGE_SIZE)?;
        let samples = workload.samples()?;
        let selected = select(workload.problem(), self.device.facts(), self.registry, &Policy::Auto)?;
        let mut rows = Vec::new();
        for backend in self.registry.backends().iter() {
            if !backend.declines(workload.problem(), self.device.facts()).is_empty() {
                continue;
            }
            let name = format!("{NAME}/{}", backend.name());
            let timing = workload.time(backend, budget)?;
            let mut row = Row::new(name, &timing, &workload.check(backend, &samples)?);
            row.selected = backend.name() == selected.backend.name();
            rows.push(row);
        }
        Ok(rows)
    }
}
