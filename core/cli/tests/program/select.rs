//! `select`.

use std::fs;

use serde_json::{Value, json};

use crate::run::{Run, command, finish, has_gpu, run};

/// The smallest configuration.
pub(crate) const SMALL: &str = r#"{ "target": { "dtype": "f16", "layers": [
    { "name": "full", "kind": "gqa", "query_heads": 16, "kv_heads": 8, "head_dim": 128 } ] } }"#;

/// The configuration of the documentation.
fn full() -> Value {
    json!({
        "target": { "dtype": "f16", "layers": [
            { "name": "full", "count": 28, "kind": "gqa", "query_heads": 16, "kv_heads": 8, "head_dim": 128,
              "value_dim": 128, "window": null, "softcap": null, "sinks": false, "alibi": false } ] },
        "kv_cache": { "dtype": "auto", "page_size": null },
        "attention": { "backend": null, "use_non_causal": false },
        "kernel": { "moe_backend": null },
        "speculative": { "method": "dflash", "num_speculative_tokens": 7, "attention_backend": null,
            "moe_backend": null, "draft": { "dtype": "f16", "layers": [
                { "name": "draft", "count": 5, "kind": "gqa", "query_heads": 32, "kv_heads": 8, "head_dim": 128 } ] } }
    })
}

fn select(config: &str, device: &str) -> Run {
    finish(command(&["select", "-", "--json", "--device", device]), Some(config))
}

fn served<'a>(answer: &'a Value, role: &str) -> Vec<&'a str> {
    answer[role].as_array().expect("a list").iter().map(|one| one["backend"].as_str().expect("a name")).collect()
}

#[test]
fn the_answer_has_the_promised_shape() {
    let run = select(&full().to_string(), "cpu");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
    let answer = run.json();
    let fields: Vec<_> = answer.as_object().expect("an object").keys().collect();
    assert_eq!(fields, ["draft", "draft_config", "kv_layout", "target"]);
    assert_eq!(served(&answer, "target"), ["cpu"; 3]);
    let phases: Vec<_> = answer["target"].as_array().expect("a list").iter().map(|one| &one["phase"]).collect();
    assert_eq!(phases, ["prefill", "decode", "verify"]);
    let draft = &answer["draft"][0];
    assert_eq!(answer["draft"].as_array().map(Vec::len), Some(1));
    for (field, wanted) in [
        ("layer", json!("draft")),
        ("phase", json!("draft")),
        ("backend", json!("cpu")),
        ("policy", json!("auto")),
        ("use_non_causal", json!(true)),
    ] {
        assert_eq!(draft[field], wanted, "{field}");
    }
    let plain = draft["declined"].as_array().expect("a list").iter().find(|one| one["backend"] == "plain");
    let wanted = json!(["needs a GPU", "non-causal attention not supported"]);
    assert_eq!(plain.expect("listed")["reasons"], wanted);
    assert_eq!(
        answer["draft_config"],
        json!({ "attention": { "backend": null, "use_non_causal": true }, "kernel": { "moe_backend": null } })
    );
    assert_eq!(answer["kv_layout"]["shared"], true);
    assert_eq!(answer["kv_layout"]["target"], answer["kv_layout"]["draft"]);
}

#[test]
fn without_a_draft_there_is_none() {
    let answer = select(SMALL, "cpu").json();
    assert_eq!(served(&answer, "target"), ["cpu"; 2]);
    assert_eq!(answer["draft"], json!([]));
    assert!(answer["draft_config"].is_null() && answer["kv_layout"]["shared"].is_null());
    let mut config = full();
    config["speculative"] = json!({ "method": "ngram" });
    let answer = select(&config.to_string(), "cpu").json();
    assert_eq!(served(&answer, "target"), ["cpu"; 3]);
    assert_eq!(answer["draft"], json!([]));
}

#[test]
fn a_method_that_is_left_out_is_the_documented_one() {
    let mut config = full();
    config["speculative"].as_object_mut().expect("an object").remove("method");
    let answer = select(&config.to_string(), "cpu").json();
    assert_eq!(answer["draft"][0]["use_non_causal"], true);
}

#[test]
fn target_and_draft_are_chosen_apart() {
    if !has_gpu() {
        eprintln!("no adapter: nothing to choose between");
        return;
    }
    let with = |target: Value, draft: Value| {
        let mut config = full();
        config["attention"]["backend"] = target;
        config["speculative"]["attention_backend"] = draft;
        select(&config.to_string(), "gpu")
    };
    // As the device has subgroups or not.
    let few_rows = ["splitkv", "flash"];
    for (target, draft) in [(Value::Null, Value::Null), (json!("plain"), Value::Null), (json!("Plain"), json!("FLASH"))]
    {
        let answer = with(target.clone(), draft.clone()).json();
        let of_target = served(&answer, "target");
        if target.is_null() {
            assert_eq!(of_target[0], "flash", "prompts are not split-KV attention's");
            assert!(of_target[1..].iter().all(|name| few_rows.contains(name)), "{of_target:?}");
        } else {
            assert_eq!(of_target, ["plain"; 3]);
        }
        let of_draft = served(&answer, "draft");
        assert!(if draft.is_null() { few_rows.contains(&of_draft[0]) } else { of_draft == ["flash"] }, "{of_draft:?}");
        assert_eq!(answer["draft_config"]["attention"]["backend"], json!(draft.as_str().map(str::to_lowercase)));
    }
    let error = with(Value::Null, json!("plain")).error();
    assert!(
        error.ends_with("backend 'plain' cannot serve draft draft layer 'draft': non-causal attention not supported"),
        "{error}"
    );
    let error = with(json!("cpu"), Value::Null).error();
    assert!(error.ends_with("backend 'cpu' cannot serve target prefill layer 'full': needs the CPU device"), "{error}");
}

#[test]
fn experts_are_served_by_a_backend_of_their_own() {
    let mut config: Value = serde_json::from_str(SMALL).expect("JSON");
    config["target"]["layers"][0]["moe"] =
        json!({ "experts": 64, "experts_per_token": 6, "hidden_size": 2048, "intermediate_size": 1408 });
    let answer = select(&config.to_string(), "cpu").json();
    let declined = json!([{ "backend": "dense", "reasons": [] }]);
    let served = json!({ "layer": "full", "backend": "grouped", "policy": "auto", "declined": declined });
    assert_eq!(answer["moe"], json!({ "target": [served], "draft": [] }));
    config["kernel"] = json!({ "moe_backend": "abacus" });
    let run = select(&config.to_string(), "cpu");
    assert_eq!(run.code, 2, "{run:?}");
    let error = run.json()["error"].to_string();
    assert!(error.contains("unknown MoE backend 'abacus'; registered are: dense, grouped"), "{error}");
    config["kernel"] = json!({ "moe_backend": "dense" });
    let run = finish(command(&["select", "-", "--device", "cpu"]), Some(&config.to_string()));
    let line = "The experts of target layer 'full' are served by 'dense' (require), not by 'grouped': could serve.";
    assert!(run.stdout.contains(line), "{run:?}");
}

#[test]
fn what_cannot_be_served_says_why() {
    let with = |set: fn(&mut Value)| {
        let mut config = full();
        set(&mut config);
        select(&config.to_string(), "cpu").error()
    };
    let error = with(|config| config["attention"]["backend"] = json!("plain"));
    assert_eq!(error, "standard input: backend 'plain' cannot serve target prefill layer 'full': needs a GPU");
    let error = with(|config| config["speculative"]["attention_backend"] = json!("plain"));
    assert_eq!(
        error,
        "standard input: backend 'plain' cannot serve draft draft layer 'draft': needs a GPU; \
         non-causal attention not supported"
    );
    let error = with(|config| config["attention"]["backend"] = json!("flush"));
    assert!(error.contains("attention.backend: unknown attention backend 'flush'; registered are: cpu, "), "{error}");
    let error = with(|config| config["speculative"]["method"] = json!("eagle9"));
    assert!(
        error.contains("speculative.method: unknown proposer 'eagle9'; registered are: combine, dflash, "),
        "{error}"
    );
    let error = with(|config| config["speculative"]["draft"] = Value::Null);
    assert!(error.contains("speculative.draft: missing"), "{error}");
    let error = with(|config| config["target"]["layers"][0]["kv_heads"] = json!(3));
    assert!(error.contains("target.layers[0].kv_heads: 3 does not divide 16"), "{error}");
    let error = with(|config| config["speculative"]["draft"]["layers"][0]["count"] = json!(0));
    assert!(error.contains("speculative.draft.layers[0].count: 0 "), "{error}");
}

#[test]
fn a_preference_falls_back() {
    let mut config = full();
    config["attention"]["backend"] = json!({ "prefer": "plain" });
    let answer = select(&config.to_string(), "cpu").json();
    assert_eq!(served(&answer, "target"), ["cpu"; 3]);
    assert_eq!(answer["target"][0]["policy"], "prefer");
    assert_eq!(answer["draft"][0]["policy"], "auto");
}

#[test]
fn json_and_toml_are_read_by_extension_or_content() {
    let folder = tempfile::tempdir().expect("writable");
    let toml = "[target]\ndtype = \"f16\"\n\n[[target.layers]]\nname = \"full\"\nkind = \"gqa\"\nquery_heads = 16\n\
                kv_heads = 8\nhead_dim = 128\n\n[speculative]\nmethod = \"ngram\"\n";
    let mut answers = Vec::new();
    for (name, text) in [("a.toml", toml), ("a.conf", toml), ("b.conf", SMALL), ("b.json", SMALL)] {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("writable");
        let run = run(&["select", path.to_str().expect("text"), "--json", "--device", "cpu"]);
        assert_eq!(run.code, 0, "{name}: {run:?}");
        answers.push(run.json()["target"][0].clone());
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    let marked = format!("\u{feff}{SMALL}");
    assert_eq!(select(&marked, "cpu").code, 0, "a byte order mark is no content");
}

#[test]
fn bad_files_are_named_with_field_and_place() {
    let folder = tempfile::tempdir().expect("writable");
    let refused = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).expect("writable");
        let path = path.to_str().expect("text").to_owned();
        let message = run(&["select", &path, "--json"]).error();
        message.strip_prefix(&format!("{path}: ")).unwrap_or_else(|| panic!("{message}")).to_owned()
    };
    let small = |from: &str, to: &str| SMALL.replace(from, to).into_bytes();
    for (name, content, wanted) in [
        ("a.json", small("\"head_dim\"", "\"heads_dim\""), "unknown field `heads_dim`"),
        ("a.json", small("128", "\"128\""), "target.layers[0].head_dim: invalid type: string \"128\""),
        ("a.json", small("128", "-1"), "target.layers[0].head_dim: invalid value: integer `-1`"),
        ("a.json", small("128", "4294967296"), "target.layers[0].head_dim: invalid value: integer `4294967296`"),
        ("a.json", small("128", "0"), "target.layers[0].head_dim: 0 is out of range"),
        ("a.json", small("f16", "f12"), "target.dtype: unknown variant `f12`"),
        ("a.json", b"{".to_vec(), "line 1"),
        ("a.json", b"".to_vec(), "EOF"),
        ("a.toml", b"[target".to_vec(), "line 1"),
        ("a.toml", b"[target]\ndtype = 3\n".to_vec(), "target.dtype"),
        ("a.toml", b"targte = 3\n".to_vec(), "unknown field `targte`"),
        ("a.json", b"\xff\xfe{".to_vec(), "byte 0 is not UTF-8"),
    ] {
        let message = refused(name, &content);
        assert!(message.contains(wanted), "{wanted}: {message}");
    }
    let missing = folder.path().join("missing.json");
    let message = run(&["select", missing.to_str().expect("text"), "--json"]).error();
    assert!(message.contains("missing.json: cannot be read: "), "{message}");
    let message = run(&["select", folder.path().to_str().expect("text"), "--json"]).error();
    assert!(message.contains("cannot be read: "), "{message}");
}

#[test]
fn people_get_a_table_and_the_reasons() {
    let run = finish(command(&["select", "-", "--device", "cpu"]), Some(&full().to_string()));
    assert_eq!(run.code, 0, "{run:?}");
    for part in ["verify", "draft", "non-causal", "plain for target prefill, decode, verify layer 'full': needs a GPU"]
    {
        assert!(run.stdout.contains(part), "{part}: {run:?}");
    }
}

#[test]
fn the_choice_of_the_cpu_is_told_once() {
    let devices = run(&["devices", "--json"]).json();
    let hardware = |one: &Value| one["kind"] == "gpu" && one["hardware"] == true;
    let run = select(SMALL, "auto");
    assert_eq!(run.code, 0, "{run:?}");
    let expected = if devices.as_array().expect("a list").iter().any(hardware) { 0 } else { 1 };
    assert_eq!(run.stderr.matches("no hardware GPU").count(), expected, "{run:?}");
}

#[test]
fn explain_tells_people_why_and_what_would_change_it() {
    let mut config = full();
    config["kv_cache"]["page_size"] = json!(16);
    config["attention"]["backend"] = json!({ "prefer": "flash" });
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), config.to_string()).expect("written");
    let path = file.path().to_str().expect("text");
    let run = run(&["select", path, "--explain", "--device", "cpu"]);
    assert_eq!(run.code, 0, "{run:?}");
    for wanted in [
        "the only one that can serve; 'flash' is preferred and declines",
        "decode, verify",
        "needs a GPU",
        "--device gpu",
        "The cache of target layer 'full' has the layout page-token-head.",
        "The draft's attention is chosen apart from the target's; the proposer is 'dflash'.",
    ] {
        assert!(run.stdout.contains(wanted), "{wanted}: {}", run.stdout);
    }
}

#[test]
fn trees_are_told_from_chains() {
    let mut config = full();
    config["speculative"]["tree"] = json!("best-first");
    let config = config.to_string();
    for more in [&[][..], &["--explain"]] {
        let args = [&["select", "-", "--device", "cpu"][..], more].concat();
        let run = finish(command(&args), Some(&config));
        assert_eq!(run.code, 0, "{run:?}");
        assert!(run.stdout.contains("verify (tree)"), "{run:?}");
        let chains = finish(command(&args), Some(&full().to_string()));
        assert!(chains.stdout.contains("verify") && !chains.stdout.contains("(tree)"), "{chains:?}");
    }
    // Machines have the mask for it.
    let answer = select(&config, "cpu").json();
    let phases: Vec<_> = answer["target"].as_array().expect("a list").iter().map(|one| &one["phase"]).collect();
    assert_eq!(phases, ["prefill", "decode", "verify", "verify"]);
    assert_eq!(answer["target"][3]["mask"], "tree");
}

/// What `explain` would have one name, followed, resolves and names it.
#[test]
fn the_advice_to_name_a_backend_can_be_followed() {
    if !has_gpu() {
        eprintln!("skipped: there is no GPU");
        return;
    }
    let mut config = full();
    config["speculative"]["tree"] = json!("best-first");
    let run = finish(command(&["select", "-", "--explain", "--device", "gpu"]), Some(&config.to_string()));
    assert_eq!(run.code, 0, "{run:?}");
    let advice: Vec<_> = run.stdout.lines().filter_map(|line| Some(line.split_once("name it: ")?.1)).collect();
    for wanted in ["attention.backend \"", "attention.backend_per_phase.decode \"", "speculative.attention_backend \""]
    {
        assert!(advice.iter().any(|one| one.starts_with(wanted)), "{wanted}: {}", run.stdout);
    }
    for one in advice {
        let mut config = config.clone();
        let settings: Vec<_> = one.split(", ").map(|setting| setting.split_once(" \"").expect("a name")).collect();
        for (field, rest) in &settings {
            let name = rest.split('"').next().expect("a name");
            let place = field.split('.').fold(&mut config, |place, part| &mut place[part]);
            *place = json!(name);
        }
        let run = select(&config.to_string(), "gpu");
        assert_eq!(run.code, 0, "{one}: {run:?}");
        let answer = run.json();
        let name = settings[0].1.split('"').next().expect("a name");
        let layers = ["target", "draft"].into_iter().flat_map(|role| answer[role].as_array().expect("a list"));
        let mut named = layers.filter(|layer| layer["policy"] == "require").peekable();
        assert!(named.peek().is_some() && named.all(|layer| layer["backend"] == name), "{one}: {answer}");
    }
}

#[test]
fn a_backend_may_be_named_for_a_phase_a_kind_and_configured() {
    let mut config: Value = serde_json::from_str(SMALL).expect("JSON");
    config["attention"] = json!({ "backend_per_phase": { "decode": "cpu" }, "backend_per_kind": { "full": "CPU" } });
    let answer = select(&config.to_string(), "cpu").json();
    assert_eq!(answer["target"][0]["policy"], "require");
    let fault = |field: &str, value: Value, wanted: &str| {
        let mut config: Value = serde_json::from_str(SMALL).expect("JSON");
        config[field] = value;
        let run = select(&config.to_string(), "cpu");
        assert_eq!(run.code, 2, "{run:?}");
        assert!(run.json()["error"].as_str().expect("a message").contains(wanted), "{run:?}");
    };
    fault("attention", json!({ "backend_per_phase": { "decoding": "cpu" } }), "decoding");
    fault("attention", json!({ "backend_per_kind": { "sliding": "cpu" } }), "attention.backend_per_kind.sliding");
    fault("backend_config", json!({ "cpu": { "threads": 3 } }), "backend_config.cpu");
    fault("backend_config", json!({ "fast": {} }), "unknown attention backend 'fast'");
}
