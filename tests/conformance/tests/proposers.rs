//! The kit on every proposer of this repository, on the CPU and on a GPU where there is one.

use std::{path::Path, process::ExitCode, sync::Arc};

use polyattn_api::{Device, Origin, Proposer, RegisteredProposer, TargetFacts};
use polyattn_conformance::{ProposerSubject, proposer_suite, run};
use polyattn_device::DeviceChoice;
use polyattn_dflash::{DFlash, tiny};
use polyattn_ngram::NGram;
use {polyattn_cpu as _, polyattn_flash as _, polyattn_plain as _};

fn registered(proposer: impl Proposer + 'static) -> RegisteredProposer {
    let origin = Origin { crate_name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") };
    RegisteredProposer { origin, proposer: Arc::new(proposer) }
}

fn main() -> ExitCode {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    // Prompt lookup accepts whole drafts of a text that counts in circles, once it has seen a circle.
    let lookup = ProposerSubject::new().acceptance_floor(7.5);
    let full = |target: &TargetFacts, folder: &Path| tiny::write_random(target, folder, false);
    let full = ProposerSubject::new().named("full").make_checkpoint(full);
    let sliding = |target: &TargetFacts, folder: &Path| tiny::write_random(target, folder, true);
    let sliding = ProposerSubject::new().named("sliding").make_checkpoint(sliding);
    let mut trials = Vec::new();
    for device in &devices {
        trials.extend(proposer_suite(&registered(NGram), &lookup, device));
        trials.extend(proposer_suite(&registered(DFlash), &full, device));
        trials.extend(proposer_suite(&registered(DFlash), &sliding, device));
    }
    run(trials)
}
