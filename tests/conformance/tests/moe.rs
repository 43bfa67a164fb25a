//! The kit over every backend of the project for mixtures of experts, on the CPU and on a GPU where there is one.

use std::process::ExitCode;

use polyattn_moe_dense as _;
use polyattn_moe_grouped as _;

// A registry without attention backends is refused.
use polyattn_cpu as _;

fn main() -> ExitCode {
    polyattn_conformance::moe_main("all")
}
