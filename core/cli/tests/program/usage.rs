//! Help, wrong command lines, options of every command.

use crate::run::{command, finish, run};

const COMMANDS: [&str; 8] = ["backends", "proposers", "devices", "select", "fetch", "replay", "generate", "bench"];

#[test]
fn help_and_version_end_well() {
    for args in [&["--help"] as &[&str], &["-h"], &["--version"], &["help"], &["help", "select"], &["--help", "--json"]]
    {
        let run = run(args);
        assert_eq!(run.code, 0, "{args:?}: {run:?}");
        assert!(run.stdout.contains("polyattn") && run.stderr.is_empty(), "{args:?}: {run:?}");
    }
    for name in COMMANDS {
        let run = run(&[name, "--help"]);
        assert_eq!(run.code, 0, "{name}: {run:?}");
        for part in ["Examples:\n  polyattn ", "--json", "--device"] {
            assert!(run.stdout.contains(part), "{name}: {part}");
        }
    }
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    for (args, named) in [
        (&[] as &[&str], "Usage"),
        (&["juggle"], "'juggle'"),
        (&["--juggle"], "'--juggle'"),
        (&["devices", "--juggle"], "'--juggle'"),
        (&["devices", "extra"], "'extra'"),
        (&["select"], "CONFIG"),
        (&["replay"], "FILE"),
        (&["fetch"], "NAME"),
        (&["generate"], "PROMPT"),
        (&["generate", "one", "two"], "'two'"),
        (&["generate", "x", "--speculative-config.method_x", "y"], "--speculative-config.method_x"),
        (&["bench"], "Usage"),
    ] {
        let plain = run(args);
        assert_eq!((plain.code, plain.stdout.as_str()), (2, ""), "{args:?}: {plain:?}");
        assert!(plain.stderr.contains(named), "{args:?}: {plain:?}");
        let mut with_json = args.to_vec();
        with_json.push("--json");
        assert!(!run(&with_json).error().is_empty());
    }
    let message = run(&["devices", "--json", "--juggle"]).error();
    assert_eq!(message, "unexpected argument '--juggle' found");
}

#[test]
fn what_follows_two_dashes_is_no_option() {
    let plain = run(&["generate", "--juggle", "--", "--json"]);
    assert_eq!((plain.code, plain.stdout.as_str()), (2, ""), "{plain:?}");
    let missing = run(&["select", "--json", "--", "--config.json"]);
    assert!(missing.error().starts_with("--config.json: cannot be read: "), "{missing:?}");
    let missing = run(&["select", "--", "--json"]);
    assert_eq!((missing.code, missing.stdout.as_str()), (2, ""), "{missing:?}");
    assert!(missing.stderr.contains("--json: cannot be read"), "{missing:?}");
}

#[test]
fn common_options_stand_before_or_after_the_command() {
    for args in [["--json", "--device", "cpu", "devices"], ["devices", "--json", "--device", "cpu"]] {
        assert!(run(&args).json().is_array());
    }
}

#[test]
fn a_device_that_is_not_there_is_named_with_those_that_are() {
    for device in ["99", "Voodoo 3"] {
        for args in [&["select", "-"] as &[&str], &["replay", "none.safetensors"]] {
            let mut args = args.to_vec();
            args.extend(["--json", "--device", device]);
            let run = finish(command(&args), Some(crate::select::SMALL));
            let message = run.error();
            assert!(message.starts_with(&format!("--device: no device '{device}'")), "{message}");
            assert!(message.contains("cpu"), "{message}");
        }
    }
}

#[test]
fn bad_values_of_generate_are_named() {
    for (args, wanted) in [
        (&["-n", "0", "x"] as &[&str], "-n: 0 "),
        (&[""], "PROMPT: ''"),
        (&["--top-p", "2", "x"], "--top-p: 2 "),
        (&["--speculative-config", "{\"methods\":1}", "x"], "--speculative-config: methods: unknown field `methods`"),
        (
            &["--proposer", "ngram", "--speculative-config", "{\"method\":\"dflash\"}", "x"],
            "--proposer 'ngram' and --speculative-config method 'dflash' contradict each other",
        ),
    ] {
        let mut all = vec!["generate", "--json"];
        all.extend(args);
        let message = run(&all).error();
        assert!(message.starts_with(wanted), "{args:?}: {message}");
    }
}

#[test]
fn more_words_go_to_standard_error() {
    let run = finish(command(&["select", "-", "--device", "cpu", "--json", "-v"]), Some(crate::select::SMALL));
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.json().is_object());
    assert!(run.stderr.contains("attention backend selected") && run.stderr.contains("role=target"), "{run:?}");
}
