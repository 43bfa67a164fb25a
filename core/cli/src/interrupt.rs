//! Ctrl-C, as a flag that long work looks at, so that it can clean up behind itself.

use std::sync::{
    OnceLock,
    atomic::{AtomicBool, Ordering},
};

static PRESSED: AtomicBool = AtomicBool::new(false);

/// The flag that Ctrl-C sets from now on. A second Ctrl-C ends the program at once.
pub(crate) fn flag() -> &'static AtomicBool {
    static HANDLER: OnceLock<()> = OnceLock::new();
    HANDLER.get_or_init(|| {
        let set = ctrlc::set_handler(|| {
            if PRESSED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        });
        if let Err(error) = set {
            tracing::warn!("Ctrl-C will end the program without cleaning up: {error}");
        }
    });
    &PRESSED
}
