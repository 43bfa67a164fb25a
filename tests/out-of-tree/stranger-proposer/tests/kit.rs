//! The kit for proposers on the stranger's, which is found in the registry.

use std::process::ExitCode;

use polyattn_api::{Device, Registry};
use polyattn_conformance::{ProposerSubject, proposer_suite, run};
use polyattn_cpu as _;
use stranger_proposer as _;

fn main() -> ExitCode {
    let registered = Registry::global().ok().and_then(|registry| registry.proposer("bigram"));
    let Some(registered) = registered else {
        eprintln!("no proposer 'bigram' is registered");
        return ExitCode::FAILURE;
    };
    // A text that counts in circles it drafts to the end.
    run(proposer_suite(&registered, &ProposerSubject::new().acceptance_floor(4.0), &Device::cpu()))
}
