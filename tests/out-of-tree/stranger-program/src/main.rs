//! The `polyattn` program with a stranger's plugins: one line for each.

use std::process::ExitCode;

use stranger_attention as _;
use stranger_proposer as _;

fn main() -> ExitCode {
    polyattn::program::run()
}
