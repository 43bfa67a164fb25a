//! `bench kernels`, `bench acceptance` and `bench generate`.

use serde_json::Value;

use crate::run::{Run, has_gpu, run};

/// A shape that takes a moment on a processor, and the decode call beside it.
const TINY: &str = "smollm2-135m/verify-q8/1x256";

#[track_caller]
fn measured(device: &str, more: &[&str]) -> (Run, Value) {
    let args = ["bench", "kernels", "--device", device, "--shape", TINY, "--seconds", "0.01", "--json"];
    let run = run(&[&args[..], more].concat());
    let answer = run.json();
    (run, answer)
}

#[test]
fn shapes_are_measured_beside_their_ceilings() {
    for device in ["cpu", "gpu"] {
        if device == "gpu" && !has_gpu() {
            eprintln!("skipped on a GPU: there is none");
            continue;
        }
        let (run, answer) = measured(device, &[]);
        assert_eq!(run.code, 0, "{run:?}");
        assert!(answer["ceilings"]["copy_gigabytes_per_second"].as_f64().expect("a number") > 0.0);
        assert!(answer["ceilings"]["product_f32_teraflops"].as_f64().expect("a number") > 0.0);
        let shapes = answer["shapes"].as_array().expect("a list");
        let names: Vec<_> = shapes.iter().map(|shape| shape["shape"].as_str().expect("a name")).collect();
        assert_eq!(names, ["smollm2-135m/decode/1x256", TINY], "verification comes with its decode call");
        for shape in shapes {
            let backends = shape["backends"].as_array().expect("a list");
            assert!(backends.iter().any(|row| row["backend"] == shape["selected"]), "{shape}");
            assert_eq!(backends.iter().any(|row| row["backend"] == "cpu"), device == "cpu", "{shape}");
            for row in backends {
                assert_eq!(row["within_tolerance"], true, "{row}");
                let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
                // Numbers that are derived from each other.
                let seconds = number("microseconds") / 1e6;
                let bytes = shape["bytes"].as_f64().expect("a number");
                assert!((number("gigabytes_per_second") * seconds * 1e9 / bytes - 1.0).abs() < 1e-9, "{row}");
                assert!(seconds > 0.0 && number("share_of_copy") > 0.0 && number("share_of_product") > 0.0, "{row}");
                assert_eq!(row["over_decode"].is_null(), shape["phase"] == "decode", "{row}");
            }
        }
    }
}

#[test]
fn a_slow_choice_is_told() {
    // Whoever is selected is not among those measured.
    let (run, answer) = measured("cpu", &["--assert-selection"]);
    assert_eq!(run.code, 0, "alone, the CPU's backend is the fastest: {run:?}");
    assert_eq!(answer["shapes"][0]["selected"], "cpu");
    if !has_gpu() {
        eprintln!("skipped on a GPU: there is none");
        return;
    }
    let (run, _) = measured("gpu", &["--assert-selection", "--backend", "PLAIN"]);
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.stderr.contains("is selected and was not measured"), "{run:?}");
}

#[test]
fn a_selection_that_nothing_was_compared_with_does_not_hold() {
    // Keys and values by heads are no latent attention.
    let args = ["bench", "kernels", "--device", "cpu", "--shape", TINY, "--backend", "mla", "--json"];
    let held = run(&args);
    assert_eq!((held.code, held.json()["shapes"].as_array().map(Vec::len)), (0, Some(0)), "{held:?}");
    let asserted = run(&[&args[..], &["--assert-selection"]].concat());
    assert_eq!(asserted.code, 1, "{asserted:?}");
    assert!(asserted.stderr.contains("--assert-selection compared nothing: no backend was measured"), "{asserted:?}");
}

#[test]
fn people_get_a_table_and_a_picture() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("roofline.svg");
    let path = file.to_str().expect("text");
    let args = ["bench", "kernels", "--device", "cpu", "--shape", TINY, "--seconds", "0.01", "--plot", path];
    let run = run(&args);
    assert_eq!(run.code, 0, "{run:?}");
    for part in [TINY, "cpu ←", "GB/s", "÷ decode", "ceilings of this run: copy", "wall clock"] {
        assert!(run.stdout.contains(part), "{part}: {}", run.stdout);
    }
    let picture = std::fs::read_to_string(file).expect("it was written");
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"), "{picture}");
    assert!(picture.contains(&format!("<title>{TINY}: cpu")) && !picture.contains("NaN"), "{picture}");
}

#[test]
fn what_is_too_large_is_skipped_with_the_numbers() {
    if !has_gpu() {
        eprintln!("skipped: there is no GPU");
        return;
    }
    let run = run(&["bench", "kernels", "--device", "gpu", "--shape", "llama3-8b/decode/128x8k", "--json"]);
    assert_eq!(run.code, 0, "{run:?}");
    let skipped = &run.json()["skipped"][0];
    assert_eq!(skipped["shape"], "llama3-8b/decode/128x8k");
    let reason = skipped["reason"].as_str().expect("a text");
    assert!(reason.starts_with("keys of 2147483648 bytes, one binding holds "), "{reason}");
}

#[test]
fn shapes_are_listed() {
    let run = run(&["bench", "kernels", "--list", "--json"]);
    assert_eq!(run.code, 0, "{run:?}");
    let list = run.json();
    let shape = |name: &str| {
        let found = list.as_array().expect("a list").iter().find(|shape| shape["shape"] == name);
        found.unwrap_or_else(|| panic!("no {name}")).clone()
    };
    let decode = shape("llama3-8b/decode/64x8k");
    assert_eq!((&decode["query_heads"], &decode["kv_heads"], &decode["dtype"]), (&32.into(), &8.into(), &"f16".into()));
    for rows in [2, 4, 8, 16] {
        assert_eq!(shape(&format!("llama3-8b/verify-q{rows}/8x32k"))["query_rows"], rows);
    }
    assert_eq!(shape("deepseek-v2-lite/decode/64x8k")["kind"], "mla");
}

#[test]
fn bad_input_is_refused() {
    for (args, wanted) in [
        (["--shape", "llama9"], "--shape 'llama9' fits no shape; 'polyattn bench kernels --list' shows them"),
        (["--backend", "abacus"], "unknown attention backend 'abacus'; registered are: "),
        (["--seconds", "0"], "invalid value '0' for '--seconds <S>': 0 is not between 0.001 and 60"),
        (["--page-size", "0"], "invalid value '0' for '--page-size <N>'"),
        (["--plot", "/nowhere/to/be.svg"], "--plot /nowhere/to/be.svg: "),
    ] {
        let fixed = ["bench", "kernels", "--device", "cpu", "--seconds", "0.001", "--json"];
        let tiny = if args[0] == "--shape" { &[] as &[&str] } else { &["--shape", TINY] };
        let args: Vec<&str> = if args[0] == "--seconds" {
            ["bench", "kernels", "--device", "cpu", "--json"].iter().chain(tiny).chain(&args).copied().collect()
        } else {
            fixed.iter().chain(tiny).chain(&args).copied().collect()
        };
        let error = run(&args).error();
        assert!(error.starts_with(wanted), "{error}");
    }
}

#[test]
fn acceptance_is_measured_over_a_data_set() {
    let folder = tempfile::tempdir().expect("a folder");
    let (dataset, plot) = (folder.path().join("prompts.jsonl"), folder.path().join("acceptance.svg"));
    let lines = "{\"prompt\": \"hello hello hello hello\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"a b a b a b\"}]}\n";
    std::fs::write(&dataset, lines).expect("written");
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/qwen2");
    let of = |path: &std::path::Path| path.display().to_string();
    let (dataset, plot, model) = (of(&dataset), of(&plot), of(&model));
    let base = ["bench", "acceptance", "--json", "--device", "cpu", "--model", &model, "--raw", "-n", "30"];
    let more = ["--dataset", &dataset, "--plot", &plot, "--proposer", "ngram"];
    let measured = run(&[&base[..], &more].concat());
    assert_eq!(measured.code, 0, "{measured:?}");
    let answer = measured.json();
    assert_eq!(answer["prompts"], 2);
    let row = &answer["rows"][0];
    let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
    assert_eq!((&row["proposer"], &row["tree"], &row["lossless"]), (&"ngram".into(), &"chain".into(), &true.into()));
    assert_eq!(number("drafted"), number("accepted") + number("wasted"));
    assert!((number("mean_acceptance_length") - 1.0 - number("accepted") / number("steps")).abs() < 1e-9);
    let svg = std::fs::read_to_string(&plot).expect("drawn");
    assert!(svg.starts_with("<svg ") && svg.matches("<polyline").count() == 1, "{svg}");
    assert_eq!(row["drafters_lost"], 0);

    // Without a name, all that the model has what they need for; mtp's layers are not in it.
    let all = run(&[&base[..], &["--dataset", &dataset]].concat());
    assert_eq!(all.code, 0, "{all:?}");
    let names = |run: &Run| -> Vec<String> {
        let rows = run.json()["rows"].as_array().expect("a list").clone();
        rows.iter().map(|row| row["proposer"].as_str().expect("a name").to_owned()).collect()
    };
    assert_eq!(names(&all), ["ngram", "suffix"]);
    let one = run(&[&base[..], &["--dataset", &dataset, "--speculative-config.method", "suffix"]].concat());
    assert_eq!((one.code, names(&one)), (0, vec!["suffix".to_owned()]), "{one:?}");
    for (dataset, wanted) in [("nowhere.jsonl", "cannot read it"), (&plot, "line 1: ")] {
        let refused = run(&[&base[..], &["--dataset", dataset]].concat());
        assert_eq!(refused.code, 2, "{refused:?}");
        assert!(refused.json()["error"].as_str().expect("a text").contains(wanted), "{refused:?}");
    }
}

/// What a proposer remembers of one run does not help it in the next.
#[test]
fn a_proposer_that_remembers_is_measured_without_memory() {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/qwen2");
    let model = model.display().to_string();
    let lengths = |repeat: &str| -> Vec<f64> {
        let base = ["bench", "generate", "--json", "--device", "cpu", "--model", &model, "--prompt-tokens", "16"];
        let widths = ["--num-speculative-tokens", "6", "--num-speculative-tokens", "6"];
        let run = run(&[&base[..], &["-n", "24", "--proposer", "suffix", "--repeat", repeat], &widths].concat());
        assert_eq!(run.code, 0, "{run:?}");
        let rows = run.json()["rows"].as_array().expect("a list").clone();
        rows.iter().map(|row| row["mean_acceptance_length"].as_f64().expect("a number")).collect()
    };
    let (once, thrice) = (lengths("1"), lengths("3"));
    assert_eq!((once.len(), once[0]), (2, once[1]), "two rows of one width");
    assert_eq!(once, thrice);
}
