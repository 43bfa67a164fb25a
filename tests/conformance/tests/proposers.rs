//! The kit on every proposer of this repository, on the CPU and on a GPU where there is one.

use std::{io, path::Path, process::ExitCode, sync::Arc};

use polyattn_api::{Device, Origin, Proposer, RegisteredProposer, TargetFacts};
use polyattn_conformance::{ProposerSubject, proposer_suite, run};
use polyattn_device::DeviceChoice;
use polyattn_dflash::{DFlash, tiny};
use polyattn_eagle::{Eagle, Eagle3, tiny as tiny_eagle};
use polyattn_medusa::{Medusa, tiny as tiny_medusa};
use polyattn_mtp::{Form, Mtp, tiny as tiny_mtp};
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
    // Drafters that know what the counting target says next, so that whole drafts are accepted: a hidden state of
    // another row, a token that is one off or a wrong head would cost that.
    let random = |name: &str, make: fn(&TargetFacts, &Path) -> io::Result<()>| {
        ProposerSubject::new().named(name).make_checkpoint(make)
    };
    let counting = |name: &str, make: fn(&TargetFacts, &Path) -> io::Result<()>, floor: f64| {
        ProposerSubject::new().named(name).make_checkpoint(make).acceptance_floor(floor)
    };
    let random = [
        (registered(Medusa), random("random", tiny_medusa::write_random)),
        (registered(Eagle), random("random", tiny_eagle::write_random)),
        (registered(Eagle3), random("random", tiny_eagle::write_random3)),
        (registered(Mtp), random("deepseek", |target, folder| tiny_mtp::write_random(target, folder, Form::DeepSeek))),
        (registered(Mtp), random("qwen", |target, folder| tiny_mtp::write_random(target, folder, Form::Qwen))),
    ];
    let counting = [
        (registered(Medusa), counting("counting", tiny_medusa::write_counting, 3.9)),
        (registered(Eagle), counting("counting", tiny_eagle::write_counting, 4.6)),
        // One id of a circle of 27 is not in the draft's vocabulary.
        (registered(Eagle3), counting("counting", tiny_eagle::write_counting3, 4.0)),
        (
            registered(Mtp),
            counting(
                "deepseek-counting",
                |target, folder| tiny_mtp::write_counting(target, folder, Form::DeepSeek),
                2.9,
            ),
        ),
        (
            registered(Mtp),
            counting("qwen-counting", |target, folder| tiny_mtp::write_counting(target, folder, Form::Qwen), 2.9),
        ),
    ];
    let mut trials = Vec::new();
    for device in &devices {
        trials.extend(proposer_suite(&registered(NGram), &lookup, device));
        trials.extend(proposer_suite(&registered(DFlash), &full, device));
        trials.extend(proposer_suite(&registered(DFlash), &sliding, device));
        for (proposer, subject) in &random {
            trials.extend(proposer_suite(proposer, subject, device));
        }
        for (proposer, subject) in &counting {
            let all = proposer_suite(proposer, subject, device);
            trials.extend(all.into_iter().filter(|trial| trial.name().contains("/generates/")));
        }
    }
    run(trials)
}
