//! The program with the stranger's plugins, run as a user runs it.

use std::process::{Command, Output};

use serde_json::{Value, json};

fn program(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stranger-program")).args(args).output().unwrap()
}

fn answer(args: &[&str]) -> Value {
    let output = program(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect()
}

#[test]
fn lists_the_strangers_plugins_beside_its_own() {
    let backends = answer(&["backends", "--json"]);
    assert_eq!(names(&backends), ["flash", "plain", "stranger", "cpu"]);
    let stranger = &backends[2];
    assert_eq!((&stranger["crate"], &stranger["version"]), (&json!("stranger-attention"), &json!("0.3.0")));
    assert_eq!(stranger["capabilities"]["mla"], json!(true));
    assert_eq!(names(&answer(&["proposers", "--json"])), ["bigram", "dflash", "ngram"]);
}

fn select(settings: Value) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("engine.json");
    let layer = json!({ "name": "latent", "kind": "mla", "query_heads": 16, "latent_dim": 512, "rope_dim": 64 });
    let config = json!({
        "target": { "dtype": "f16", "layers": [layer] },
        "backend_config": { "stranger": settings },
    });
    std::fs::write(&path, config.to_string()).unwrap();
    program(&["select", path.to_str().unwrap(), "--json", "--device", "gpu"])
}

#[test]
fn serves_latent_attention_with_its_settings() {
    let output = select(json!({ "keys_per_tile": 32 }));
    let stdout = String::from_utf8(output.stdout).unwrap();
    if stdout.contains("no device 'gpu'") {
        eprintln!("skipped: {stdout}");
        return;
    }
    let answer: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(answer["target"][0]["backend"], json!("stranger"), "{answer}");

    let output = select(json!({ "keys_per_tile": 33 }));
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("backend_config.stranger") && message.contains("keys_per_tile is 33"), "{message}");
}
