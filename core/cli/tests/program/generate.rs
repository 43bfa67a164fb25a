//! `generate` on tiny models: what it answers, and how it refuses what it cannot use.

use std::{
    fs,
    path::{Path, PathBuf},
};

use polyattn::api::TargetFacts;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::run::{Run, command, finish, has_gpu, run};

const FAMILIES: [&str; 4] = ["llama", "llama3-scaled", "qwen2", "qwen3"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn family(name: &str) -> String {
    golden("tiny").join(name).display().to_string()
}

fn generate(model: &str, args: &[&str]) -> Run {
    let mut all = vec!["generate", "hello hello hello hello", "--model", model, "--json"];
    if !args.contains(&"-n") {
        all.extend(["-n", "8"]);
    }
    if !args.contains(&"--device") {
        all.extend(["--device", "cpu"]);
    }
    all.extend(args);
    run(&all)
}

#[track_caller]
fn answer(model: &str, args: &[&str]) -> Value {
    let run = generate(model, args);
    assert_eq!(run.code, 0, "{args:?}: {run:?}");
    run.json()
}

/// A copy of a folder that may be changed.
fn copy(of: &Path) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(of).expect("it is there") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copied");
    }
    folder
}

fn edit(config: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(config).expect("readable")).expect("JSON");
    change(&mut value);
    fs::write(config, value.to_string()).expect("writable");
}

#[track_caller]
fn text(path: &Path) -> &str {
    path.to_str().expect("a path of text")
}

#[test]
fn every_family_answers_on_every_device_with_and_without_drafts() {
    let devices: &[&str] = if has_gpu() { &["cpu", "gpu"] } else { &["cpu"] };
    for name in FAMILIES {
        let model = family(name);
        for device in devices {
            for sampling in [&[] as &[&str], &["--temperature", "0.8", "--seed", "3"]] {
                let mut args = vec!["--device", device, "--chat"];
                args.extend(sampling);
                let plain = answer(&model, &args);
                args.extend(["--proposer", "ngram"]);
                let drafted = answer(&model, &args);
                assert_eq!(plain["tokens"], drafted["tokens"], "{name} {args:?}");
                assert_eq!((&plain["proposer"], &plain["acceptance"]), (&Value::Null, &Value::Null));
                assert_eq!(drafted["proposer"], "ngram");
            }
        }
    }
}

#[test]
fn an_answer_has_what_is_promised() {
    let answer = answer(&family("qwen2"), &["--proposer", "ngram", "-n", "12"]);
    let tokens = answer["tokens"].as_array().expect("a list");
    assert!(tokens.len() <= 12 && tokens.iter().all(Value::is_u64), "{answer}");
    assert!(answer["text"].is_string() && answer["prompt_tokens"].is_u64());
    assert!(answer["tokens_per_second"].is_f64() && answer["steps"].is_u64());
    assert_eq!(answer["backends"]["target"]["prefill"], "cpu");
    assert_eq!(answer["backends"]["draft"], json!({}), "n-grams run no attention");
    for (phase, name) in answer["backends"]["target"].as_object().expect("an object") {
        assert!(["prefill", "decode", "verify"].contains(&phase.as_str()) && name == "cpu", "{answer}");
    }
    assert_eq!(answer["calls"].as_object().expect("an object").keys().collect::<Vec<_>>(), ["cpu"]);
    let acceptance = &answer["acceptance"];
    assert!(acceptance["mean_length"].is_f64() && acceptance["rate"].is_f64() && acceptance["per_position"].is_array());
}

#[test]
fn a_model_with_experts_says_who_serves_them() {
    let model = family("deepseek-moe");
    let moe = |args: &[&str]| answer(&model, args)["moe_backends"].clone();
    assert_eq!(moe(&[]), json!({ "target": "grouped", "draft": null }));
    assert_eq!(moe(&["--moe-backend", "Dense"]), json!({ "target": "dense", "draft": null }));
    assert_eq!(moe(&["--moe-backend", "AUTO", "--proposer", "ngram"])["target"], "grouped");
    assert_eq!(answer(&family("deepseek"), &["--moe-backend", "abacus"])["moe_backends"], Value::Null);
    let run = generate(&model, &["--moe-backend", "abacus"]);
    assert_eq!(run.code, 2, "{run:?}");
    assert_eq!(run.json()["error"], "unknown MoE backend 'abacus'; registered are: dense, grouped");
}

#[test]
fn folders_that_are_no_model_are_refused() {
    type Spoil = fn(&Path);
    let cases: [(&str, Spoil); 12] = [
        ("tokenizer.json: tokenizer: the file is missing", |f| fs::remove_file(f.join("tokenizer.json")).unwrap()),
        ("tokenizer.json: tokenizer: it is not valid JSON", |f| fs::write(f.join("tokenizer.json"), "{").unwrap()),
        ("the folder has no .safetensors file", |f| fs::remove_file(f.join("model.safetensors")).unwrap()),
        ("the folder has no config.json", |f| fs::remove_file(f.join("config.json")).unwrap()),
        ("config.json: field 'model_type'", |f| fs::write(f.join("config.json"), "{}").unwrap()),
        ("model.safetensors: the file is empty", |f| fs::write(f.join("model.safetensors"), "").unwrap()),
        ("model.safetensors: this is not a sound", |f| {
            let file = f.join("model.safetensors");
            let bytes = fs::read(&file).unwrap();
            fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        }),
        ("model.safetensors: this is not a sound", |f| {
            // Offsets beyond the end.
            let file = f.join("model.safetensors");
            let header = r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,1000000]}}"#;
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            fs::write(&file, bytes).unwrap();
        }),
        ("no tensor 'model.layers.", |f| edit(&f.join("config.json"), |c| c["num_hidden_layers"] = json!(9))),
        ("field 'rope_theta': 0 ", |f| edit(&f.join("config.json"), |c| c["rope_theta"] = json!(0))),
        ("has only 10 rows", |f| edit(&f.join("config.json"), |c| c["vocab_size"] = json!(10))),
        ("field 'vocab_size': -1 ", |f| edit(&f.join("config.json"), |c| c["vocab_size"] = json!(-1))),
    ];
    for (wanted, spoil) in cases {
        let folder = copy(&golden("tiny/llama"));
        spoil(folder.path());
        let message = generate(text(folder.path()), &[]).error();
        assert!(message.starts_with(text(folder.path())) && message.contains(wanted), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
    let sharded = copy(&golden("tiny/llama3-scaled"));
    fs::remove_file(sharded.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(generate(text(sharded.path()), &[]).error().contains("model-00002-of-00002.safetensors: cannot open"));
}

#[test]
fn files_that_are_no_model_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let header = |version: u32, tensors: u64, metadata: u64| {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(metadata.to_le_bytes());
        bytes
    };
    for (bytes, wanted) in [
        (b"".to_vec(), "the file is empty"),
        (b"hello there".to_vec(), "not a GGUF file"),
        (b"GG".to_vec(), "the file ends within the magic number"),
        (header(3, 0, 0)[..17].to_vec(), "the file ends within"),
        (header(3, u64::MAX, 0), "claims 18446744073709551615 tensors"),
        (header(3, 0, u64::MAX), "claims 18446744073709551615"),
        (header(77, 0, 0), "77"),
        (header(3, 0, 0), "general.architecture"),
    ] {
        let file = folder.path().join("m.gguf");
        fs::write(&file, bytes).expect("writable");
        let message = generate(text(&file), &[]).error();
        assert!(message.starts_with(text(&file)) && message.contains(wanted), "{wanted}: {message}");
    }
    let message = generate("no such model", &[]).error();
    assert!(message.starts_with("--model: 'no such model' ") && message.contains("smollm2"), "{message}");
}

#[test]
fn drafters_that_do_not_fit_are_refused_with_their_file() {
    let model = family("qwen3");
    let drafter = copy(&golden("dflash/full"));
    let config = drafter.path().join("config.json");
    let refused = |path: &Path| generate(&model, &["--draft-model", text(path)]).error();

    let message = refused(drafter.path());
    assert!(message.starts_with("the draft model does not fit the target: "), "{message}");
    assert!(message.contains(text(&config)) && message.contains(" is 6, the target has 2 layers"), "{message}");

    edit(&config, |c| c["hidden_size"] = json!("wide"));
    let message = refused(drafter.path());
    assert!(message.starts_with(&format!("{}: hidden_size: ", text(&config))) && message.contains("wide"), "{message}");
    for (content, wanted) in [("[]", "no JSON object"), ("{", "EOF"), ("{}", "missing field `block_size`")] {
        fs::write(&config, content).expect("writable");
        let message = refused(drafter.path());
        assert!(message.starts_with(text(&config)) && message.contains(wanted), "{message}");
    }
    fs::remove_file(&config).expect("it was there");
    assert!(refused(drafter.path()).starts_with(text(&config)));

    let other = drafter.path().join("notes.txt");
    fs::write(&other, "no drafter").expect("writable");
    assert!(refused(&other).starts_with(&format!("{}: this is no DFlash checkpoint", text(&other))));
    let missing = drafter.path().join("missing");
    assert!(refused(&missing).starts_with("--draft-model: there is nothing at "));
}

#[test]
fn a_drafter_that_is_not_used_is_said() {
    let args = ["--proposer", "ngram", "--draft-model", &family("qwen3")];
    let run = generate(&family("qwen3"), &args);
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.stderr, "note: --draft-model is not used: proposer 'ngram' needs none\n");
}

#[test]
fn a_prompt_beyond_the_context_is_refused() {
    let folder = copy(&golden("tiny/llama"));
    edit(&folder.path().join("config.json"), |c| c["max_position_embeddings"] = json!(5));
    let message = generate(text(folder.path()), &[]).error();
    assert!(message.starts_with("PROMPT: its ") && message.ends_with(", 5 tokens"), "{message}");
}

#[test]
fn more_tokens_than_the_context_holds_end_with_it() {
    let folder = copy(&golden("tiny/llama"));
    edit(&folder.path().join("config.json"), |c| c["max_position_embeddings"] = json!(40));
    for proposer in ["none", "ngram"] {
        let answer = answer(text(folder.path()), &["-n", "100000", "--proposer", proposer]);
        let tokens = answer["tokens"].as_array().expect("a list").len() as u64;
        let end = answer["stop"] == "end-of-sequence";
        assert!(end || tokens + answer["prompt_tokens"].as_u64().expect("a number") == 40, "{answer}");
    }
}

#[test]
fn names_that_nobody_has_are_answered_with_those_there_are() {
    let model = family("llama");
    for (args, wanted) in [
        (["--proposer", "crystal-ball"], "unknown proposer 'crystal-ball'; registered are: combine, dflash, "),
        (
            ["--attention-backend", "abacus"],
            "unknown attention backend 'abacus'; registered are: cpu, flash, mla, plain, splitkv",
        ),
        (["--attention-backend", "plain"], "backend 'plain' cannot serve target prefill layer 'full': needs a GPU"),
        (["--proposer", "dflash"], "proposer 'dflash' needs a draft model: --draft-model DIR"),
        (["--seed", "-1"], "invalid value '-1' for '--seed <S>'"),
        (["-n", "-1"], "invalid value '-1' for '--max-tokens <N>'"),
        (["--device", "-1"], "--device: no device '-1'"),
    ] {
        let message = generate(&model, &args).error();
        assert!(message.contains(wanted), "{args:?}: {message}");
        assert!(!message.contains('\n'), "{args:?}: {message}");
    }
    for tokens in ["33", "4000000000"] {
        let option = ["--proposer", "ngram", "--speculative-config.num_speculative_tokens", tokens];
        assert!(generate(&model, &option).error().contains(&format!("num_speculative_tokens is {tokens}")));
    }
}

#[test]
fn recorded_calls_replay() {
    let folder = tempfile::tempdir().expect("a folder");
    let calls = folder.path().join("calls");
    let model = family("qwen3");
    let options = ["--record", text(&calls), "--record-layer", "1"];
    answer(&model, &options);
    let mut files: Vec<_> = fs::read_dir(&calls)
        .expect("made")
        .map(|entry| entry.expect("readable").path().display().to_string())
        .collect();
    files.sort();
    assert_eq!(files.len(), 8, "the prompt and seven steps: {files:?}");
    let devices: &[&str] = if has_gpu() { &["cpu", "gpu"] } else { &["cpu"] };
    for device in devices {
        let mut args = vec!["replay", "--json", "--backend", "all", "--device", device];
        args.extend(files.iter().map(String::as_str));
        let run = run(&args);
        assert_eq!(run.code, 0, "{run:?}");
    }

    let one = folder.path().join("one");
    answer(&model, &["--record", text(&one), "--record-step", "3"]);
    assert_eq!(fs::read_dir(&one).expect("made").count(), 1);
}

#[test]
fn a_recording_of_nothing_is_said_and_leaves_no_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let calls = folder.path().join("calls");
    let model = family("qwen3");
    let run = generate(&model, &["--record", text(&calls), "--record-step", "99"]);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.stderr.contains("nothing was recorded") && run.stderr.contains("step 99"), "{run:?}");
    assert!(!calls.exists());
    let message = generate(&model, &["--record", text(&calls), "--record-layer", "2"]).error();
    assert_eq!(message, "--record-layer: there is no layer 2, they are 0 to 1");
    assert!(!calls.exists());

    let file = folder.path().join("file");
    fs::write(&file, "mine").expect("writable");
    for place in [file.clone(), file.join("calls")] {
        let message = generate(&model, &["--record", text(&place)]).error();
        assert!(message.starts_with(&format!("{}: cannot make the folder", text(&place))), "{message}");
    }
    assert_eq!(fs::read(&file).expect("still there"), b"mine");
}

#[test]
#[cfg(target_os = "linux")]
fn text_that_cannot_be_written_is_an_error() {
    for json in [&["--json"] as &[&str], &[]] {
        let mut args = vec!["generate", "hello", "--device", "cpu", "-n", "4", "--model"];
        let model = family("llama");
        args.push(&model);
        args.extend(json);
        let mut command = command(&args);
        command.stdout(fs::OpenOptions::new().write(true).open("/dev/full").expect("a full device"));
        let run = finish(command, None);
        assert_eq!(run.code, 2, "{run:?}");
        assert!(run.stderr.contains("cannot write to standard output: "), "{run:?}");
    }
}

#[test]
#[cfg(unix)]
fn an_argument_that_is_no_text_is_named() {
    use std::os::unix::ffi::OsStrExt;
    let mut command = command(&["generate", "--json"]);
    command.arg(std::ffi::OsStr::from_bytes(b"caf\xe9"));
    assert_eq!(finish(command, None).error(), "the argument 'caf\u{fffd}' is not UTF-8");
}

/// How drafts are used is told, and what changes the answer says so.
#[test]
fn strategies_are_named_and_told() {
    let plain = answer(&family("qwen2"), &["-n", "24"]);
    assert_eq!((&plain["strategies"], &plain["lossless"]), (&Value::Null, &json!(true)));
    let tree = answer(
        &family("qwen2"),
        &[
            "-n",
            "24",
            "--proposer",
            "ngram",
            "--speculative-config.tree",
            "TOP-K",
            "--speculative-config.tree_nodes",
            "6",
            "--speculative-config.length",
            r#"{"name":"fixed","parameters":{"tokens":3}}"#,
        ],
    );
    assert_eq!(tree["tokens"], plain["tokens"], "drafts in trees change no token");
    assert_eq!(tree["strategies"], json!({"tree": "top-k", "acceptance": "match", "length": "fixed"}));
    assert_eq!((&tree["lossless"], &tree["drafter_lost"]), (&json!(true), &json!(false)));
    let acceptance = &tree["acceptance"];
    let number = |name: &str| acceptance[name].as_u64().unwrap_or_else(|| panic!("{name}: {acceptance}"));
    assert_eq!(number("drafted"), number("accepted") + number("wasted"));
    assert!(acceptance["per_position"].as_array().expect("a list").len() <= 3);
    let histogram: u64 =
        acceptance["histogram"].as_array().expect("a list").iter().map(|count| count.as_u64().expect("a count")).sum();
    assert_eq!(histogram, number("drafted_steps"));

    let rule = r#"{"acceptance":{"name":"synthetic","parameters":{"length":2}}}"#;
    let synthetic = generate(&family("qwen2"), &["--proposer", "ngram", "--speculative-config", rule]);
    assert_eq!(synthetic.json()["lossless"], false);
    assert!(synthetic.stderr.contains("lossy"), "{}", synthetic.stderr);

    for (option, value, wanted) in [
        (
            "tree",
            "oak",
            "speculative.tree: unknown tree builder 'oak'; registered are: best-first, chain, static, top-k",
        ),
        ("acceptance", "never", "speculative.acceptance: unknown acceptance rule 'never'"),
        ("length", "long", "speculative.length: unknown length policy 'long'; registered are: adaptive, fixed,"),
        ("length", r#"{"name":"fixed","parameters":{"token":3}}"#, "unknown field `token`"),
        ("tree_nodes", "5000", "speculative.tree_nodes: 5000 is out of range"),
    ] {
        let option = format!("--speculative-config.{option}");
        let mut args = vec!["--proposer", "ngram", &option, value];
        if option.ends_with("tree_nodes") {
            args.extend(["--speculative-config.tree", "top-k"]);
        }
        let run = generate(&family("qwen2"), &args);
        assert_eq!(run.code, 2, "{args:?}: {run:?}");
        assert!(run.json()["error"].as_str().expect("a text").contains(wanted), "{args:?}: {run:?}");
    }
    let greedy = ["--proposer", "ngram", "--speculative-config.acceptance", "greedy", "--temperature", "1"];
    assert_eq!(generate(&family("qwen2"), &greedy).code, 2, "greedy acceptance is for temperature 0");
    let penalty = answer(&family("qwen2"), &["--repetition-penalty", "1.5", "-n", "24"]);
    assert_ne!(penalty["tokens"], plain["tokens"]);
    assert_eq!(generate(&family("qwen2"), &["--repetition-penalty", "0"]).code, 2);
}

/// The program's own words say what the document says.
#[test]
fn a_summary_tells_how_drafts_fared() {
    let model = family("qwen2");
    let base = ["generate", "hello hello hello hello", "--model", &model, "--device", "cpu", "-n", "24"];
    let plain = run(&base);
    let drafted = run(&[&base[..], &["--proposer", "ngram"]].concat());
    let synthetic = r#"{"name":"synthetic","parameters":{"length":2}}"#;
    let lossy = run(&[&base[..], &["--proposer", "ngram", "--speculative-config.acceptance", synthetic]].concat());
    for (run, by_position, marked) in [(&plain, false, false), (&drafted, true, false), (&lossy, true, true)] {
        assert_eq!(run.code, 0, "{run:?}");
        assert_eq!(run.stderr.contains("\naccepted by position: "), by_position, "{run:?}");
        assert_eq!(run.stderr.contains("\nLOSSY: under the acceptance rule 'synthetic' "), marked, "{run:?}");
        assert!(!run.stderr.contains("the drafter failed"), "{run:?}");
    }
}

/// A proposer reads its own parameters, and refuses what it does not know.
#[test]
fn parameters_reach_the_proposer() {
    let model = family("qwen2");
    let with = |proposer: &str, parameters: &str| {
        let args = ["--proposer", proposer, "--speculative-config.parameters", parameters, "-n", "24"];
        generate(&model, &args)
    };
    let drafted = |proposer: &str, parameters: &str| {
        let run = with(proposer, parameters);
        assert_eq!(run.code, 0, "{run:?}");
        run.json()["acceptance"]["drafted"].as_u64().expect("a count")
    };
    for (proposer, none) in [
        ("ngram", r#"{"min_match":20,"max_match":20}"#),
        ("suffix", r#"{"max_spec_factor":0.0,"max_spec_offset":0.0}"#),
    ] {
        assert!(drafted(proposer, "{}") > 0, "{proposer}");
        assert_eq!(drafted(proposer, none), 0, "{proposer}: {none}");
    }
    let object = r#"{"method":"suffix","parameters":{"max_spec_factor":0.0}}"#;
    assert_eq!(answer(&model, &["--speculative-config", object, "-n", "24"])["acceptance"]["drafted"], 0);
    for (proposer, parameters, wanted) in [
        ("ngram", r#"{"min_macth":3}"#, "min_macth"),
        ("suffix", r#"{"depth":3}"#, "depth"),
        ("suffix", r#"{"max_depth":1}"#, "speculative.parameters.max_depth is 1, 2 to 1024"),
        ("ngram", r#"{"min_match":9}"#, "min_match is 9 and max_match is 5"),
    ] {
        let message = with(proposer, parameters).error();
        assert!(message.contains(wanted), "{proposer} {parameters}: {message}");
    }
}

/// Each proposer that a tiny model can be given is a name away, and changes no token.
#[test]
fn other_proposers_run_from_the_command_line() {
    let model = family("qwen3");
    let drafter = tempfile::tempdir().expect("a folder");
    let facts = TargetFacts::new(2, 64, 288, 512);
    polyattn::dflash::tiny::write_random(&facts, drafter.path(), false).expect("written");
    let plain = answer(&model, &["-n", "24"]);
    for (proposer, draft_model) in
        [("suffix", None), ("draft-model", Some(&*model)), ("combine", Some(text(drafter.path())))]
    {
        let mut args = vec!["-n", "24", "--proposer", proposer];
        args.extend(draft_model.iter().flat_map(|path| ["--draft-model", *path]));
        let got = answer(&model, &args);
        assert_eq!((&got["proposer"], &got["drafter_lost"]), (&json!(proposer), &json!(false)));
        assert_eq!(got["tokens"], plain["tokens"], "{proposer}");
        assert!(got["acceptance"]["drafted"].as_u64() > Some(0), "{proposer}: {got}");
        if proposer == "draft-model" {
            assert_eq!(got["acceptance"]["rate"], 1.0, "a model that drafts for itself: {got}");
        }
    }
}
