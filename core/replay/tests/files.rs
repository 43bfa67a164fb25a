//! The file format: golden files, round trips, and what malformed files are told.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{collections::HashMap, path::PathBuf};

use polyattn_api::{AttentionKind, BackendError, DType, KvDType, Mask, Phase, Window};
use polyattn_replay::{
    Case, Comparison, Outcome, ReplayError,
    random::{self, Spec},
    reference,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

fn golden() -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/replay");
    let Ok(entries) = std::fs::read_dir(&folder) else { return Vec::new() };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    files
}

#[test]
fn golden_files_agree_with_the_reference() {
    let files = golden();
    if files.is_empty() {
        println!("skipped: no golden files");
    }
    let mut wrong = Vec::new();
    for file in files {
        let case = Case::load(&file).unwrap();
        let (out, lse) = reference::attention_f64(&case).unwrap();
        let size = if case.problem.kv_dtype == KvDType::F32 { 1e-5 } else { 1e-4 };
        for (name, got, want) in [("out", out, &case.out), ("lse", lse, &case.lse)] {
            let want = want.as_ref().unwrap();
            assert_eq!(got.len(), want.len());
            for (at, (got, want)) in got.into_iter().zip(want).enumerate() {
                let want = f64::from(*want);
                let close = got == want || (got - want).abs() <= size * (1.0 + want.abs());
                if !close {
                    wrong.push(format!("{}: {name}[{at}] is {got}, recorded {want}", file.display()));
                    break;
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn golden_files_survive_a_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    for file in golden() {
        let case = Case::load(&file).unwrap();
        let copy = folder.path().join("copy.safetensors");
        case.save(&copy).unwrap();
        // Bytes, because NaN poison equals nothing.
        assert!(Case::load(&copy).unwrap().to_bytes().unwrap() == case.to_bytes().unwrap(), "{}", file.display());
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.len() <= 1, "temporary files are left: {left:?}");
}

const GQA: AttentionKind = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 8, value_dim: 6 };
const MLA: AttentionKind = AttentionKind::Mla { query_heads: 4, latent_dim: 12, rope_dim: 4 };

#[test]
fn random_cases_survive_a_round_trip() {
    let sequences = [(3, 20), (0, 7), (1, 1), (0, 0), (5, 5)];
    for kind in [GQA, MLA] {
        for kv_dtype in KvDType::ALL {
            for mask in [Mask::Causal, Mask::Bidirectional, Mask::Tree] {
                let spec = Spec {
                    kv_dtype,
                    mask,
                    window: Some(Window { left: Some(9), right: None }),
                    softcap: Some(20.0),
                    sinks: true,
                    alibi: true,
                    per_sequence_causal: mask == Mask::Bidirectional,
                    prefix_spans: mask == Mask::Causal,
                    page_size: 5,
                    ..Spec::new(kind, DType::BF16, &sequences)
                };
                let mut case = random::case(7, &spec);
                case.validate().unwrap();
                let (out, lse) = reference::attention_f64(&case).unwrap();
                assert!(out.iter().all(|value| value.is_finite()), "{kv_dtype} {mask:?}: poison was read");
                case.out = Some(out.iter().map(|value| *value as f32).collect());
                case.lse = Some(lse.iter().map(|value| *value as f32).collect());
                let copy = Case::from_bytes("copy", &case.to_bytes().unwrap()).unwrap();
                assert_eq!(copy.problem.layer.as_ref(), "replay");
                // The layer's name is no part of the format, and NaN poison equals nothing.
                assert_eq!(copy.to_bytes().unwrap(), case.to_bytes().unwrap());
                assert_eq!((&copy.batch, &copy.out, &copy.k_cache), (&case.batch, &case.out, &case.k_cache));
                case.problem.layer = "replay".into();
                assert_eq!(copy.problem, case.problem);
            }
        }
    }
}

#[test]
fn the_phase_follows_from_the_rows() {
    for (sequences, phase) in [
        (vec![(1, 9), (0, 4)], Phase::Decode),
        (vec![(1, 9), (2, 4)], Phase::Verify),
        (vec![(64, 64)], Phase::Verify),
        (vec![(1, 9), (65, 80)], Phase::Prefill),
    ] {
        assert_eq!(random::case(1, &Spec::new(GQA, DType::F32, &sequences)).problem.phase, phase);
    }
}

#[test]
fn comparisons_count_every_element() {
    let mut case = random::case(3, &Spec { sinks: true, ..Spec::new(GQA, DType::F32, &[(2, 9)]) });
    let (out, lse) = reference::attention_f64(&case).unwrap();
    let narrow = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<_>>();
    let outcome = Outcome::new(narrow(&out), Some(narrow(&lse)), 0.0);
    let good = Comparison::of(&case, &outcome).unwrap();
    assert!(good.within_tolerance && good.max_abs_err < 1e-6 && good.rel_l2 < 1e-6, "{good:?}");
    assert!(good.lse_max_abs_err.unwrap() < 1e-6);

    case.out = Some(outcome.out.clone());
    case.lse = outcome.lse.clone();
    let exact = Comparison::of(&case, &outcome).unwrap();
    assert_eq!((exact.max_abs_err, exact.rel_l2, exact.lse_max_abs_err), (0.0, 0.0, Some(0.0)));

    let mut far = outcome.clone();
    far.out[5] += 0.5;
    let far = Comparison::of(&case, &far).unwrap();
    assert!(!far.within_tolerance && (far.max_abs_err - 0.5).abs() < 1e-6);
    let mut nan = outcome.clone();
    nan.out[5] = f32::NAN;
    let nan = Comparison::of(&case, &nan).unwrap();
    assert!(!nan.within_tolerance && nan.max_abs_err.is_nan());

    let mut empty = (case.clone(), outcome.clone());
    empty.0.lse.as_mut().unwrap()[0] = f32::NEG_INFINITY;
    assert!(!Comparison::of(&empty.0, &empty.1).unwrap().within_tolerance);
    empty.1.lse.as_mut().unwrap()[0] = f32::NEG_INFINITY;
    let empty = Comparison::of(&empty.0, &empty.1).unwrap();
    assert!(empty.within_tolerance && empty.lse_max_abs_err == Some(0.0));

    let without = Outcome::new(outcome.out.clone(), None, 0.0);
    assert_eq!(Comparison::of(&case, &without).unwrap().lse_max_abs_err, None);
    assert!(matches!(Comparison::of(&case, &Outcome::new(vec![0.0], None, 0.0)), Err(ReplayError::Case(_))));
}

#[test]
fn outcomes_are_written() {
    let case = random::case(3, &Spec::new(GQA, DType::F32, &[(2, 9)]));
    let outcome = Outcome::new(vec![0.5; case.out_elements()], Some(vec![1.5; case.lse_elements()]), 1.0);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("out.safetensors");
    outcome.save(&case, &file).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("out").unwrap().shape(), [2, 4, 6]);
    assert_eq!(tensors.tensor("lse").unwrap().shape(), [2, 4]);
    assert!(Outcome::new(vec![0.5], None, 1.0).save(&case, &file).is_err());
    let missing = folder.path().join("no/such/folder.safetensors");
    assert!(outcome.save(&case, &missing).unwrap_err().to_string().contains("no/such/folder.safetensors"));
}

/// A file taken apart, to be broken and put together again.
struct Parts {
    document: serde_json::Value,
    tensors: HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn of(case: &Case) -> Self {
        let bytes = case.to_bytes().unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let document = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["polyattn.problem"]).unwrap();
        let tensors = SafeTensors::deserialize(&bytes)
            .unwrap()
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
            .collect();
        Self { document, tensors }
    }

    fn load(&self) -> Result<Case, ReplayError> {
        let metadata = HashMap::from([("polyattn.problem".to_owned(), self.document.to_string())]);
        let mut views: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()))
            .collect();
        views.sort_by_key(|(name, _)| *name);
        Case::from_bytes("call.safetensors", &safetensors::serialize(views, Some(metadata)).unwrap())
    }

    fn put(&mut self, name: &str, dtype: Dtype, shape: &[usize], words: &[i32]) {
        self.tensors.insert(name.into(), (dtype, shape.to_vec(), bytemuck::cast_slice(words).to_vec()));
    }

    fn set(&mut self, pointer: &str, value: serde_json::Value) {
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        self.document.pointer_mut(parent).unwrap().as_object_mut().unwrap().insert(field.into(), value);
    }
}

#[test]
fn malformed_files_name_what_is_wrong() {
    use serde_json::json;
    type Break = fn(&mut Parts);
    let gqa: &[(Break, &str)] = &[
        (|p| p.set("/format", json!(2)), "format is 2, this version reads 1"),
        (|p| p.set("/format", json!("1")), "format: invalid type: string \"1\""),
        (|p| p.set("/extra", json!(2)), "unknown field `extra`"),
        (|p| p.set("/attention/heads", json!(2)), "unknown field `heads`"),
        (|p| p.set("/attention/window", json!({"lft": 2})), "attention.window.lft: unknown field `lft`"),
        (|p| p.set("/attention/mask", json!("diagonal")), "attention.mask: unknown variant `diagonal`"),
        (|p| p.set("/attention/kind", json!("mha")), "attention.kind: unknown variant `mha`"),
        (|p| p.set("/attention/kv_dtype", json!("q4")), "attention.kv_dtype: unknown variant `q4`"),
        (|p| p.set("/attention/query_heads", json!(-4)), "attention.query_heads: invalid value: integer `-4`"),
        (|p| p.set("/attention/query_heads", json!(0)), "attention.query_heads is 0"),
        (|p| p.set("/attention/query_heads", json!(3)), "query_heads 3 is no multiple of kv_heads 2"),
        (|p| p.set("/attention/query_heads", json!(4_000_000_000u32)), "exceed 32 bits"),
        (|p| p.set("/attention/latent_dim", json!(8)), "attention.latent_dim is 8, kind gqa has no such field"),
        (|p| p.set("/attention/kind", json!("mla")), "attention.head_dim is 8, kind mla has no such field"),
        (|p| p.set("/attention/head_dim", json!(null)), "attention.head_dim is missing"),
        (|p| p.set("/attention/scale", json!(1e300)), "attention.scale is 1e300"),
        (|p| p.set("/attention/softcap", json!(0)), "attention.softcap is 0"),
        (|p| p.set("/attention/page_size", json!(0)), "attention.page_size is 0"),
        (|p| p.set("/attention/page_size", json!(8)), "tensor k_cache has shape [5, 16, 2, 8], expected [pages, page_"),
        (|p| p.set("/attention/dtype", json!("f16")), "tensor q is F32, expected F16"),
        (|p| p.set("/attention/mask", json!("tree")), "tensor tree_mask is missing"),
        (|p| p.set("/tolerance/atol", json!(-1)), "tolerance.atol is -1"),
        (|p| drop(p.document.as_object_mut().unwrap().remove("tolerance")), "missing field `tolerance`"),
        (|p| drop(p.tensors.remove("q")), "tensor q is missing"),
        (|p| drop(p.tensors.remove("v_cache")), "tensor v_cache is missing"),
        (|p| drop(p.tensors.remove("kv_len")), "tensor kv_len is missing"),
        (|p| p.put("sink", Dtype::F32, &[4], &[0; 4]), "tensor sink has no place in this problem"),
        (|p| p.put("sinks", Dtype::F32, &[3], &[0; 3]), "tensor sinks has shape [3], expected [query_heads = 4]"),
        (|p| p.put("sinks", Dtype::I32, &[4], &[0; 4]), "tensor sinks is I32, expected F32"),
        (|p| p.put("k_scale", Dtype::F32, &[1], &[0]), "tensor k_scale has no place"),
        (|p| p.put("tree_mask", Dtype::U32, &[3, 1], &[0; 3]), "tensor tree_mask has no place"),
        (|p| p.put("causal", Dtype::I32, &[2], &[1, 2]), "tensor causal has 2 at element 1"),
        (|p| p.put("kv_len", Dtype::I32, &[2], &[20, -7]), "tensor kv_len has -7 at element 1"),
        (|p| p.put("kv_len", Dtype::I32, &[2], &[20, 2_000_000_000]), "sequence 1 has kv_len 2000000000"),
        (|p| p.put("kv_len", Dtype::I32, &[2], &[1, 7]), "sequence 0 has 2 query rows but kv_len 1"),
        (|p| p.put("query_start", Dtype::I32, &[3], &[0, 2, 4]), "tensor query_start ends with 4, tensor q has 3 rows"),
        (|p| p.put("query_start", Dtype::I32, &[3], &[0, 4, 3]), "query_start falls from 4 to 3"),
        (
            |p| p.put("query_start", Dtype::I32, &[2], &[0, 3]),
            "tensor query_start has shape [2], expected [batch + 1 = 3]",
        ),
        (|p| p.put("page_table", Dtype::I32, &[2, 2], &[0, 9, 1, -1]), "page_table[0][1] is 9, the cache has 5 pages"),
        (|p| p.put("page_table", Dtype::I32, &[2, 2], &[0, -1, 1, -1]), "page_table[0][1] is -1"),
        (|p| p.put("prefix_spans", Dtype::I32, &[1, 3], &[1, 3, 7]), "prefix span 3..=7 of sequence 1 with kv_len 7"),
        (|p| p.put("prefix_spans", Dtype::I32, &[1, 3], &[9, 3, 7]), "prefix span 3..=7 of sequence 9"),
        (|p| p.put("prefix_spans", Dtype::I32, &[1, 3], &[-1, 3, 7]), "tensor prefix_spans has -1 at element 0"),
        (|p| p.put("out", Dtype::F32, &[3, 4, 5], &[0; 60]), "tensor out has shape [3, 4, 5]"),
    ];
    let mla: &[(Break, &str)] = &[
        (|p| p.set("/attention/kv_heads", json!(2)), "attention.kv_heads is 2, kind mla has 1"),
        (|p| p.set("/attention/rope_dim", json!(4_294_967_295u32)), "exceed 32 bits"),
        (
            |p| drop(p.document.pointer_mut("/attention").unwrap().as_object_mut().unwrap().remove("rope_dim")),
            "rope_dim is missing",
        ),
        (|p| drop(p.tensors.remove("kv_cache")), "tensor kv_cache is missing"),
        (|p| p.put("k_cache", Dtype::F32, &[1], &[0]), "tensor k_cache has no place"),
    ];
    let q8: &[(Break, &str)] = &[
        (|p| drop(p.tensors.remove("k_scale")), "k_scale is missing"),
        (|p| drop(p.tensors.remove("v_scale")), "v_scale is missing"),
        (|p| p.tensors.get_mut("k_cache").unwrap().0 = Dtype::U8, "tensor k_cache is U8, expected I8"),
    ];
    let sequences = [(2, 20), (1, 7)];
    for (spec, breaks) in [
        (Spec::new(GQA, DType::F32, &sequences), gqa),
        (Spec::new(MLA, DType::F32, &sequences), mla),
        (Spec { kv_dtype: KvDType::Q8, ..Spec::new(GQA, DType::F32, &sequences) }, q8),
    ] {
        let case = random::case(5, &spec);
        Parts::of(&case).load().unwrap();
        for (change, expected) in breaks {
            let mut parts = Parts::of(&case);
            change(&mut parts);
            let error = parts.load().unwrap_err().to_string();
            assert!(
                error.starts_with("call.safetensors: ") && error.contains(expected),
                "{expected}\n  but got: {error}"
            );
        }
    }
}

#[test]
fn sizes_beyond_reason_are_errors() {
    let case = random::case(5, &Spec { mask: Mask::Tree, ..Spec::new(GQA, DType::F32, &[(0, 20)]) });
    let mut parts = Parts::of(&case);
    parts.put("tree_mask", Dtype::U32, &[0, 1 << 60], &[]);
    assert!(parts.load().unwrap_err().to_string().contains("tensor tree_mask has shape [0, 1152921504606846976]"));
    let mut case = case;
    case.batch.tree.as_mut().unwrap().words = usize::MAX;
    case.validate().unwrap();
}

#[test]
fn any_bytes_give_an_error() {
    let bytes = random::case(5, &Spec::new(GQA, DType::F32, &[(2, 20)])).to_bytes().unwrap();
    assert!(Case::from_bytes("x", b"").is_err());
    assert!(Case::from_bytes("x", b"{}").unwrap_err().to_string().contains("no safetensors file"));
    for end in (0..bytes.len()).step_by(7) {
        assert!(Case::from_bytes("x", &bytes[..end]).is_err());
    }
    let plain = safetensors::serialize([("q", TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap())], None).unwrap();
    assert!(
        Case::from_bytes("x", &plain).unwrap_err().to_string().contains("metadata key polyattn.problem is missing")
    );
    // Any change of one byte of the header: an error or another case, never a panic.
    for at in 0..bytes.len().min(1500) {
        for flip in [1, 0x10, 0x80] {
            let mut changed = bytes.clone();
            changed[at] ^= flip;
            if let Ok(case) = Case::from_bytes("x", &changed) {
                case.validate().unwrap();
            }
        }
    }
    let missing = Case::load("no-such-file.safetensors").unwrap_err();
    assert!(missing.to_string().starts_with("no-such-file.safetensors: "), "{missing}");
}

#[test]
fn cases_built_by_hand_are_checked() {
    let mut case = random::case(5, &Spec::new(GQA, DType::F32, &[(2, 20)]));
    case.q.pop();
    assert!(matches!(reference::attention_f64(&case), Err(ReplayError::Case(_))));
    assert!(case.to_bytes().unwrap_err().to_string().contains("q has 255 bytes, the problem needs 256"));
    let error = ReplayError::from(BackendError::Declined(vec![polyattn_api::Decline::Gqa]));
    assert_eq!(error.to_string(), "declined: GQA not supported");
}
