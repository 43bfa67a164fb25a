//! The kit for attention backends: trials made from what a backend advertises.

mod answers;
mod bits;
mod declines;
mod edges;
mod random;
mod store;
mod subject;

use std::process::ExitCode;

use polyattn_api::{Device, RegisteredBackend, Registry};

use crate::{Failure, Trial, trial::run_named};
use subject::Subject;

/// Every trial of a backend on a device, made from its [`Capabilities`](polyattn_api::Capabilities): to advertise a
/// feature is to be tested for it, so a false claim fails, and what is not advertised must be declined.
///
/// | group | what it asks |
/// |---|---|
/// | `masks`, `windows`, `logits`, `formats`, `dims`, `pages`, `phases` | an answer within tolerance of the f64 reference, LSE included where advertised, over pages of NaN that belong to nobody |
/// | `edges` | empty batches and sequences, one key, pages just full, large logits, rows that see nothing |
/// | `random` | random problems within the capabilities, shrunk where one fails |
/// | `store` | new rows of K and V in their slots, rounded right, and nothing else changed |
/// | `bits` | the same bits again, and in any batch, where advertised |
/// | `declines` | every feature that is not advertised, batches and buffers that contradict themselves |
///
/// A device that the backend does not run on gives one trial: that it says so.
///
/// For each wrong answer a replay file is written, which `polyattn replay FILE --backend NAME` runs again: into the
/// folder `POLYATTN_CONFORMANCE_DIR`, by default `polyattn-conformance` among the temporary files.
/// `POLYATTN_CONFORMANCE_CASES` is the number of random problems (24), `POLYATTN_CONFORMANCE_SEED` where they start.
#[must_use]
pub fn suite(backend: &RegisteredBackend, device: &Device) -> Vec<Trial> {
    let subject = Subject::new(backend, device);
    let mut trials = Trials { subject, list: Vec::new() };
    if !backend.backend.capabilities().device_declines(device.facts()).is_empty() {
        declines::elsewhere(&mut trials);
        return trials.list;
    }
    answers::trials(&mut trials);
    edges::trials(&mut trials);
    random::trials(&mut trials);
    store::trials(&mut trials);
    bits::trials(&mut trials);
    declines::trials(&mut trials);
    trials.list
}

/// Runs [`suite`] for a registered backend, or for `all`, on the CPU and on a GPU where there is one, as a test target
/// without a harness. It understands the arguments of `cargo test`.
#[must_use]
pub fn backend_main(name: &str) -> ExitCode {
    let registry = match Registry::global() {
        Ok(registry) => registry,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let unknown = format!("unknown attention backend '{name}'; registered are: {}", registry.backend_names());
    run_named(&registry.backends(), name, |one| one.name(), &unknown, suite)
}

/// The trials so far.
struct Trials {
    subject: Subject,
    list: Vec<Trial>,
}

impl Trials {
    fn add(&mut self, name: String, run: impl FnOnce(&Subject) -> Result<(), Failure> + Send + 'static) {
        let subject = self.subject.clone();
        self.list.push(Trial::new(name, move || run(&subject)));
    }
}
