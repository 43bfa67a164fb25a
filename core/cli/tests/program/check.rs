//! `check`.

use crate::run::run;

#[test]
fn a_right_backend_passes() {
    let run = run(&["check", "plain", "--device", "gpu", "--json"]);
    if !crate::run::has_gpu() {
        eprintln!("skipped on a GPU: there is none");
        assert_eq!(run.code, 2, "{run:?}");
        return;
    }
    assert_eq!(run.code, 0, "{run:?}");
    let rows = run.json();
    let rows = rows.as_array().expect("a list");
    assert!(rows.len() > 40 && rows.iter().all(|row| row["passed"] == true && row["backend"] == "plain"), "{rows:?}");
    assert!(rows.iter().any(|row| row["trial"] == "gqa/masks/causal"));
    assert!(rows.iter().any(|row| row["trial"] == "gqa/declines/bidirectional"), "what it does not advertise");
}

#[test]
fn people_get_a_table() {
    let mut command = crate::run::command(&["check", "CPU", "--device", "cpu"]);
    command.env("POLYATTN_CONFORMANCE_CASES", "2");
    let run = crate::run::finish(command, None);
    assert_eq!(run.code, 0, "{run:?}");
    for word in ["backend", "trials", "failed", "cpu"] {
        assert!(run.stdout.contains(word), "{word}: {}", run.stdout);
    }
}

#[test]
fn what_cannot_be_checked_says_why() {
    for (args, wanted) in [
        (
            ["check", "abacus", "--device", "cpu"],
            "unknown attention backend 'abacus'; registered are: cpu, flash, mla, plain, splitkv",
        ),
        (["check", "flash", "--device", "cpu"], "backend 'flash' cannot run on cpu: needs a GPU"),
    ] {
        let error = run(&[&args[..], &["--json"]].concat()).error();
        assert!(error.starts_with(wanted), "{error}");
    }
}
