//! Every pass of two steps against tensors of an independent implementation (`tests/golden/make_drafters.py`): the
//! layer's output, logits and ids of each token of a chain, behind a prompt and behind rows of a tree.

use std::path::PathBuf;

use polyattn_api::{LoadContext, Proposer, ProposerError};
use polyattn_eagle::{Eagle, Eagle3, Version, load};
use polyattn_nn::drafting::{FeatureDrafter, golden::GoldenCase};
use {polyattn_cpu as _, polyattn_flash as _};

fn check(
    proposer: &dyn Proposer,
    case: &str,
    load: fn(&LoadContext<'_>) -> Result<FeatureDrafter, ProposerError>,
    tolerance: f32,
) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/eagle").join(case);
    let stages = |drafter: &FeatureDrafter| {
        let stages = drafter.stages();
        (Some(stages.hidden.clone()), stages.logits.cloned())
    };
    GoldenCase { proposer, folder: &folder, layers: 6, tolerance, load, stages }.check();
}

#[test]
fn eagle_with_a_bias() {
    check(&Eagle, "eagle1", |context| load(context, Version::Eagle1), 1e-4);
}

#[test]
fn eagle_of_16_bits() {
    check(&Eagle, "eagle1-bf16", |context| load(context, Version::Eagle1), 0.03);
}

#[test]
fn eagle3_with_a_vocabulary_of_its_own() {
    check(&Eagle3, "eagle3", |context| load(context, Version::Eagle3), 1e-4);
}

#[test]
fn eagle3_with_a_normed_residual() {
    check(&Eagle3, "eagle3-f16", |context| load(context, Version::Eagle3), 0.03);
}
