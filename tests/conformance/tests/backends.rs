//! The kit over every backend of the project, on the CPU and on a GPU where there is one.

use std::process::ExitCode;

use polyattn_cpu as _;
use polyattn_flash as _;
use polyattn_mla as _;
use polyattn_plain as _;
use polyattn_splitkv as _;

fn main() -> ExitCode {
    polyattn_conformance::backend_main("all")
}
