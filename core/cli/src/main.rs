//! The `polyattn` program.

#![deny(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    quieten_mesa();
    polyattn::program::run()
}

/// Mesa's drivers look for a Wayland socket and print an error where there is no folder for one, which is so in every
/// container. Standard error is for this program's own messages.
fn quieten_mesa() {
    const NAME: &str = "XDG_RUNTIME_DIR";
    if cfg!(target_os = "linux") && !std::env::var_os(NAME).is_some_and(|folder| std::path::Path::new(&folder).is_dir())
    {
        // SAFETY: `main` begins with this call, so there is no other thread that could read the environment.
        #[expect(unsafe_code, reason = "the drivers read nothing but the environment")]
        unsafe {
            std::env::set_var(NAME, std::env::temp_dir());
        }
    }
}
