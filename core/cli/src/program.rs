//! The `polyattn` program as a library, for programs that bring plugins of their own.
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! // One line for each plugin: `use my_backend as _;`
//!
//! fn main() -> ExitCode {
//!     polyattn::program::run()
//! }
//! ```

use std::process::ExitCode;

/// Does what this process's command line asks for, on every plugin that the program names. Exit codes: 0 done; 1 ran,
/// but the thing asked for does not hold; 2 bad input or nothing that can serve it.
#[must_use]
pub fn run() -> ExitCode {
    crate::args::run()
}
