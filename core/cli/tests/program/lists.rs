//! `backends`, `proposers`, `devices`.

use serde_json::Value;

use crate::run::run;

fn list(command: &str) -> Vec<Value> {
    let run = run(&[command, "--json"]);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.stderr, "", "nothing to say");
    run.json().as_array().expect("a list").clone()
}

fn named<'a>(list: &'a [Value], name: &str) -> &'a Value {
    list.iter().find(|one| one["name"] == name).unwrap_or_else(|| panic!("{name} is missing"))
}

#[test]
fn backends_tell_what_they_can_do_and_where() {
    let backends = list("backends");
    let devices = list("devices");
    for name in ["cpu", "plain", "flash", "splitkv", "mla"] {
        let backend = named(&backends, name);
        assert_eq!(backend["crate"], format!("polyattn-{name}"));
        assert_eq!(backend["version"], env!("CARGO_PKG_VERSION"));
        assert!(backend["priority"].is_i64() && backend["capabilities"].is_object());
        let on = backend["devices"].as_array().expect("a list");
        assert_eq!(on.len(), devices.len(), "each device that is present");
        for (on, device) in on.iter().zip(&devices) {
            assert_eq!(on["device"], device["name"]);
            let reasons = on["reasons"].as_array().expect("a list");
            assert_eq!(on["usable"], reasons.is_empty(), "{on}");
            let foreign = match (name, device["kind"].as_str()) {
                ("cpu", Some("gpu")) => Some("needs the CPU device"),
                ("plain" | "flash" | "splitkv" | "mla", Some("cpu")) => Some("needs a GPU"),
                _ => None,
            };
            if let Some(reason) = foreign {
                assert_eq!(reasons, &[Value::from(reason)]);
            }
        }
    }
    assert_eq!(named(&backends, "plain")["capabilities"]["non_causal"], false);
    assert_eq!(named(&backends, "flash")["capabilities"]["non_causal"], true);
    let priorities: Vec<_> = backends.iter().map(|one| one["priority"].as_i64()).collect();
    assert!(priorities.is_sorted_by(|a, b| a >= b), "best first: {priorities:?}");
}

#[test]
fn proposers_tell_what_they_need() {
    let proposers = list("proposers");
    for (name, needs) in [("dflash", true), ("ngram", false)] {
        let proposer = named(&proposers, name);
        assert_eq!(proposer["crate"], format!("polyattn-{name}"));
        assert_eq!(proposer["version"], env!("CARGO_PKG_VERSION"));
        for field in ["taps", "non_causal", "draft_attention"] {
            assert_eq!(proposer[field], needs, "{name} {field}");
        }
    }
}

#[test]
fn devices_are_numbered_and_end_with_the_cpu() {
    let devices = list("devices");
    for (index, device) in devices.iter().enumerate() {
        assert_eq!(device["index"], index);
        for field in ["name", "kind", "interface", "driver"] {
            assert!(device[field].is_string(), "{field}");
        }
        assert!(device["hardware"].is_boolean() && device["features"].is_array() && device["limits"].is_object());
        assert!(device["subgroup_min"].is_u64() && device["subgroup_max"].is_u64());
    }
    let last = devices.last().expect("at least the CPU");
    assert_eq!((&last["name"], &last["kind"]), (&Value::from("cpu"), &Value::from("cpu")));
}

#[test]
fn people_get_tables() {
    for (command, word) in [("backends", "flash"), ("proposers", "dflash"), ("devices", "cpu")] {
        let run = run(&[command]);
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
        assert!(run.stdout.contains(word), "{run:?}");
    }
}

#[test]
fn the_table_of_capabilities_is_markdown() {
    let run = run(&["backends", "--markdown"]);
    assert_eq!(run.code, 0, "{run:?}");
    let columns = run.stdout.lines().next().expect("a header").matches('|').count();
    assert!(run.stdout.lines().all(|line| line.starts_with('|') && line.matches('|').count() == columns));
    for part in ["`cpu`", "`plain`", "`flash`", "`splitkv`", "`mla`", "| non-causal |", "| page sizes |"] {
        assert!(run.stdout.contains(part), "{part}");
    }
    assert_eq!(crate::run::run(&["backends", "--markdown", "--json"]).code, 2);
}
