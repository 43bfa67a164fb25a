//! Every stage of two steps against tensors of an independent implementation (`tests/golden/make_dflash.py`), on random
//! weights: features into context, keys and values of every layer, the block, the drafted ids.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{path::PathBuf, sync::Arc};

use half::{bf16, f16};
use polyattn_api::{
    Buffer, CommittedRows, DType, Device, DraftAttention, DraftSequence, Drafter, EngineConfig, LoadContext, Outcome,
    Phase, Proposal, ProposeContext, Proposer, Registry, Role, TargetFacts, default_draft_config, resolve,
};
use polyattn_dflash::{DFlash, DFlashDrafter};
use polyattn_nn::drafting::golden::{Embedding, Golden, PAGES, assert_close, devices};
use {polyattn_cpu as _, polyattn_flash as _};

/// What a cache holds.
fn floats_of(device: &Device, cache: &Buffer, dtype: DType) -> Vec<f32> {
    let bytes: Vec<u8> = device.download(cache).unwrap();
    match dtype {
        DType::F32 => bytemuck::pod_collect_to_vec(&bytes),
        DType::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(&bytes).into_iter().map(f16::to_f32).collect(),
        DType::BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes).into_iter().map(bf16::to_f32).collect(),
        other => panic!("no cache of {other}"),
    }
}

fn check(case: &str, target_layers: u32, tolerance: f32) {
    for device in devices() {
        check_on(&device, case, target_layers, tolerance);
    }
}

fn check_on(device: &Device, case: &str, target_layers: u32, tolerance: f32) {
    let what = format!("{case} on {}", device.facts().name);
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/dflash").join(case);
    let golden = Golden::open(&folder);
    let shape = golden.shape("embed");
    let (vocab, hidden) = (shape[0] as u32, shape[1] as u32);
    let target = TargetFacts::new(target_layers, hidden, vocab, 512);

    // The configuration that an engine would make, resolved for this device.
    let model = DFlash.describe(&folder, &target).unwrap().unwrap();
    let config: EngineConfig = serde_json::from_value(serde_json::json!({
        "target": model,
        "kv_cache": { "page_size": 4 },
        "speculative": { "method": "dflash", "draft": model },
    }))
    .unwrap();
    let resolution = resolve(&config, device.facts(), Registry::global().unwrap()).unwrap();
    let draft_config = resolution.draft_config.as_ref().unwrap();
    assert!(draft_config.attention.use_non_causal && !default_draft_config(&config).attention.use_non_causal);
    let attention: Vec<DraftAttention> = resolution
        .draft
        .iter()
        .map(|layer| {
            assert_eq!((layer.problem.role, layer.problem.phase), (Role::Draft, Phase::Draft));
            let kernel = layer.backend.prepare(device, &layer.problem).unwrap();
            DraftAttention::new(Arc::clone(&layer.problem.layer), kernel)
        })
        .collect();
    let layout = attention[0].kernel.problem().kv_layout;
    let mut context = LoadContext::new(device, &target, draft_config);
    context.checkpoint = Some(&folder);
    context.attention = &attention;
    context.pool_pages = 8;
    context.page_size = 4;
    context.kv_dtype = draft_config.model.dtype.into();
    context.max_rows = 16;
    let mut drafter = DFlashDrafter::load(&context).unwrap();
    let block = drafter.config().block_size;
    let (kv_heads, head_dim) = (drafter.config().kv_heads as usize, drafter.config().head_dim as usize);
    let layers = drafter.config().layers.len();

    let lender = Embedding::of(&golden, device, block);
    for step in ["step1", "step2"] {
        let name = |tensor: &str| format!("{step}.{tensor}");
        let features = golden.of::<f32>(&name("features"));
        let rows = golden.shape(&name("features"))[0];
        let first = golden.of::<u32>(&name("first"))[0];
        let position = first + rows as u32;
        // The rows lie behind others, as rows of a batch do.
        let pad = if step == "step2" { features.len() / rows } else { 0 };
        let taps = device.upload(&[vec![f32::NAN; pad], features].concat(), "taps").unwrap();
        let first_row = u32::from(pad > 0);
        let mut commands = device.commands().unwrap();
        let mut tokens = vec![0; position as usize];
        tokens.push(golden.of::<u32>(&name("anchor"))[0]);
        let places: Vec<u32> = (first_row..first_row + rows as u32).collect();
        let committed = [CommittedRows::new(0, &places, first, &tokens, &PAGES)];
        drafter.commit(&mut Outcome::new(&mut commands, &committed, Some(&taps), &lender)).unwrap();
        let _ = commands.submit().unwrap();

        for layer in 0..layers {
            for (part, cache) in ["k_ctx", "v_ctx"].into_iter().zip(drafter.stages().caches[layer]) {
                let cache = floats_of(device, cache, draft_config.model.dtype);
                let got: Vec<f32> = (first as usize..position as usize)
                    .flat_map(|position| {
                        let slot = PAGES[position / 4] as usize * 4 + position % 4;
                        (0..kv_heads).map(move |head| layout.row(slot, head, kv_heads, 4) * head_dim)
                    })
                    .flat_map(|place| cache[place..][..head_dim].to_vec())
                    .collect();
                let want = golden.of::<f32>(&name(&format!("{part}.{layer}")));
                assert_close(&got, &want, tolerance, &format!("{what}: {step} {part}.{layer}"));
            }
        }

        let mut commands = device.commands().unwrap();
        let sequences = [DraftSequence::new(0, &tokens, block - 1, &PAGES)];
        let proposal = drafter.propose(&mut ProposeContext::new(&mut commands, &sequences, &lender)).unwrap();
        let _ = commands.submit().unwrap();
        let Proposal::Device { ids, counts, .. } = proposal else { panic!("not on the device") };
        assert_eq!(counts, [block - 1]);
        let normed: Vec<f32> = device.download(drafter.stages().normed).unwrap();
        assert_close(&normed, &golden.of::<f32>(&name("hidden")), tolerance, &format!("{what}: {step} hidden"));
        let logits: Vec<f32> = device.download(&lender.logits).unwrap();
        let want = golden.of::<f32>(&name("logits"));
        assert_close(&logits, &want, tolerance, &format!("{what}: {step} logits"));
        let ids: Vec<u32> = device.download(&ids).unwrap();
        assert_eq!(ids[0], tokens[position as usize], "{what}: the anchor stays in front");
        for (row, (got, wanted)) in ids[1..].iter().zip(golden.of::<u32>(&name("drafts"))).enumerate() {
            let logits = &want[(row + 1) * vocab as usize..][..vocab as usize];
            let gap = logits[wanted as usize] - logits[*got as usize];
            assert!(gap.abs() <= 2.0 * tolerance * 10.0, "{what}: {step} drafts {got} for {wanted}, {gap} apart");
        }
    }
}

#[test]
fn full_layers() {
    check("full", 6, 1e-4);
}

#[test]
fn a_sliding_and_a_full_layer() {
    check("sliding-bf16", 8, 0.02);
}

#[test]
fn causal_layers_with_biases() {
    check("causal-bias-f16", 4, 0.02);
}
