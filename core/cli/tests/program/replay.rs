//! `replay`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use polyattn::api::{AttentionKind, DType};
use polyattn_replay::{
    Case,
    random::{self, Spec},
};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::run::{Run, has_gpu, run};

const GQA: AttentionKind = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 32, value_dim: 32 };
const MLA: AttentionKind = AttentionKind::Mla { query_heads: 4, latent_dim: 32, rope_dim: 16 };

fn case(kind: AttentionKind) -> Case {
    random::case(7, &Spec::new(kind, DType::F32, &[(3, 40), (1, 17)]))
}

fn saved(folder: &Path, name: &str, case: &Case) -> String {
    let path = folder.join(name);
    case.save(&path).expect("writable");
    path.to_str().expect("text").to_owned()
}

fn replay(args: &[&str]) -> Run {
    let mut all = vec!["replay", "--json"];
    all.extend(args);
    run(&all)
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("writable")
}

#[test]
fn a_good_answer_is_within_tolerance() {
    let folder = folder();
    let file = saved(folder.path(), "a.safetensors", &case(GQA));
    for backend in ["auto", "cpu", "CPU", "AUTO"] {
        let run = replay(&[&file, "--device", "cpu", "--backend", backend]);
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
        let rows = run.json();
        assert_eq!(rows.as_array().map(Vec::len), Some(1));
        let row = rows[0].as_object().expect("an object");
        assert_eq!(row["file"], file.as_str());
        assert_eq!((&row["backend"], &row["device"]), (&json!("cpu"), &json!("cpu")));
        assert_eq!((&row["ran"], &row["within_tolerance"]), (&json!(true), &json!(true)));
        for field in ["max_abs_err", "rel_l2", "lse_max_abs_err", "milliseconds"] {
            assert!(row[field].is_f64(), "{field}: {row:?}");
        }
    }
    let run = run(&["replay", &file, "--device", "cpu"]);
    assert!(run.code == 0 && run.stdout.contains("within tolerance"), "{run:?}");
}

#[test]
fn a_bad_input_among_several_leaves_nothing_written() {
    let folder = folder();
    let good = saved(folder.path(), "good.safetensors", &case(GQA));
    let bad = folder.path().join("bad.safetensors").display().to_string();
    std::fs::write(&bad, "no replay file").expect("writable");
    let out = folder.path().join("answers");
    let run = replay(&[&good, &bad, "--device", "cpu", "--write", &out.display().to_string()]);
    assert!(run.error().starts_with(&bad), "{run:?}");
    assert!(!out.exists());
}

#[test]
fn a_wrong_answer_ends_with_1() {
    let folder = folder();
    let mut wrong = case(GQA);
    wrong.out = Some(vec![9.0; wrong.out_elements()]);
    let file = saved(folder.path(), "wrong.safetensors", &wrong);
    let good = saved(folder.path(), "good.safetensors", &case(GQA));
    for backend in ["auto", "all"] {
        let run = replay(&[&good, &file, "--device", "cpu", "--backend", backend]);
        assert_eq!(run.code, 1, "{run:?}");
        let rows = run.json();
        let ran: Vec<_> = rows.as_array().expect("a list").iter().filter(|row| row["ran"] == true).collect();
        assert_eq!(ran.iter().map(|row| &row["within_tolerance"]).collect::<Vec<_>>(), [true, false]);
    }
    // What is expected to be NaN is met by nothing.
    let mut nan = case(GQA);
    nan.out = Some(vec![f32::NAN; nan.out_elements()]);
    let file = saved(folder.path(), "nan.safetensors", &nan);
    let run = replay(&[&file, "--device", "cpu"]);
    assert_eq!((run.code, &run.json()[0]["max_abs_err"]), (1, &Value::Null), "{run:?}");
}

#[test]
fn all_lists_those_that_declined() {
    let folder = folder();
    let file = saved(folder.path(), "mla.safetensors", &case(MLA));
    let run = replay(&[&file, "--device", "cpu", "--backend", "all"]);
    assert_eq!(run.code, 0, "{run:?}");
    let rows = run.json();
    let rows = rows.as_array().expect("a list");
    let plain = rows.iter().find(|row| row["backend"] == "plain").expect("listed");
    assert_eq!(plain["ran"], false);
    assert_eq!(plain["declined"][0], "needs a GPU");
    assert!(plain["declined"].as_array().expect("a list").contains(&json!("MLA not supported")));
    assert!(plain.get("within_tolerance").is_none());
    assert!(rows.iter().any(|row| row["backend"] == "cpu" && row["within_tolerance"] == true));
}

#[test]
fn nobody_who_serves_ends_with_2() {
    let folder = folder();
    let file = saved(folder.path(), "mla.safetensors", &case(MLA));
    let message = replay(&[&file, "--device", "cpu", "--backend", "plain"]).error();
    assert!(message.starts_with(&format!("{file}: backend 'plain' cannot serve target ")), "{message}");
    assert!(message.contains("needs a GPU; MLA not supported"), "{message}");
    let message = replay(&[&file, "--device", "cpu", "--backend", "flush"]).error();
    assert!(message.starts_with("--backend: unknown attention backend 'flush'; registered are: cpu, "), "{message}");
    if has_gpu() {
        let kind = AttentionKind::Mla { query_heads: 4, latent_dim: 36, rope_dim: 16 };
        let file = saved(folder.path(), "odd.safetensors", &case(kind));
        for backend in ["auto", "all"] {
            let message = replay(&[&file, "--device", "gpu", "--backend", backend]).error();
            assert!(message.contains("cpu: needs the CPU device"), "{message}");
            assert!(message.contains("plain: MLA not supported"), "{message}");
            assert!(message.contains("mla: latent_dim 36 not supported"), "{message}");
        }
    }
}

#[test]
fn every_backend_of_a_gpu_answers() {
    if !has_gpu() {
        eprintln!("no adapter: nothing to run on");
        return;
    }
    let folder = folder();
    let file = saved(folder.path(), "a.safetensors", &case(GQA));
    let run = replay(&[&file, "--device", "gpu", "--backend", "all"]);
    assert_eq!(run.code, 0, "{run:?}");
    let rows = run.json();
    for name in ["plain", "flash"] {
        let row = rows.as_array().expect("a list").iter().find(|row| row["backend"] == name).expect("listed");
        assert_eq!(row["within_tolerance"], true, "{row}");
    }
}

fn tensors(path: &Path) -> Vec<(String, Vec<usize>)> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut found: Vec<_> = file.tensors().into_iter().map(|(name, tensor)| (name, tensor.shape().to_vec())).collect();
    found.sort();
    found
}

#[test]
fn answers_are_written_to_a_file_or_a_folder() {
    let folder = folder();
    let first = saved(folder.path(), "a.safetensors", &case(GQA));
    let second = saved(folder.path(), "b.safetensors", &case(MLA));
    let written = |args: &[&str]| {
        let run = replay(args);
        assert_eq!(run.code, 0, "{run:?}");
    };
    let out: PathBuf = folder.path().join("out.safetensors");
    let out_text = out.to_str().expect("text");
    written(&[&first, "--device", "cpu", "--write", out_text]);
    let want = [("lse".to_owned(), vec![4, 4]), ("out".to_owned(), vec![4, 4, 32])];
    assert_eq!(tensors(&out), want);

    let many = folder.path().join("many").join("deep");
    written(&[&first, &second, "--device", "cpu", "--write", many.to_str().expect("text")]);
    assert_eq!(tensors(&many.join("a.cpu.safetensors")), want);
    assert_eq!(tensors(&many.join("b.cpu.safetensors")), want);

    let all = folder.path().join("all");
    written(&[&first, "--device", "cpu", "--backend", "all", "--write", all.to_str().expect("text")]);
    let names: Vec<_> = fs::read_dir(&all).expect("made").map(|entry| entry.expect("readable").file_name()).collect();
    assert_eq!(names, ["a.cpu.safetensors"], "a folder, whoever ran");
}

#[test]
fn answers_that_cannot_be_written_are_refused() {
    let folder = folder();
    let file = saved(folder.path(), "a.safetensors", &case(GQA));
    let other = folder.path().join("other");
    fs::create_dir(&other).expect("writable");
    let twin = saved(&other, "a.safetensors", &case(GQA));
    let out = other.join("out");
    let message = replay(&[&file, &twin, "--device", "cpu", "--write", out.to_str().expect("text")]).error();
    assert!(message.contains("two inputs are called 'a'"), "{message}");
    assert!(!out.exists(), "nothing is made before that is clear");

    let inside = Path::new(&file).join("x");
    let message = replay(&[&file, "--device", "cpu", "--write", inside.to_str().expect("text")]).error();
    assert!(message.contains("a.safetensors"), "{message}");
    let message =
        replay(&[&file, "--backend", "all", "--device", "cpu", "--write", inside.to_str().expect("text")]).error();
    assert!(message.starts_with("--write: cannot make the folder"), "{message}");
}

#[test]
fn bad_files_are_named() {
    let folder = folder();
    let good = saved(folder.path(), "good.safetensors", &case(GQA));
    let bytes = fs::read(&good).expect("readable");
    let place = folder.path().join("bad.safetensors");
    let bad = place.to_str().expect("text");
    for content in [&[] as &[u8], b"junk", &[0xff; 64], &bytes[..bytes.len() / 2], &bytes[..40]] {
        fs::write(&place, content).expect("writable");
        let message = replay(&[&good, bad, "--device", "cpu"]).error();
        assert!(message.contains("bad.safetensors"), "{message}");
    }
    let missing = folder.path().join("missing.safetensors");
    let message = replay(&[missing.to_str().expect("text"), "--device", "cpu"]).error();
    assert!(message.contains("missing.safetensors"), "{message}");
    let message = replay(&[folder.path().to_str().expect("text"), "--device", "cpu"]).error();
    assert!(!message.is_empty());
}
