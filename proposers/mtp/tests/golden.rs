//! Every pass of two steps against tensors of an independent implementation (`tests/golden/make_drafters.py`): the
//! layer's output, logits and ids of each token of a chain, behind a prompt and behind rows of a tree.

use std::path::PathBuf;

use polyattn_mtp::{Form, Mtp, load};
use polyattn_nn::drafting::{FeatureDrafter, golden::GoldenCase};
use {polyattn_cpu as _, polyattn_flash as _};

fn check(form: Form, tolerance: f32) {
    let case = if form == Form::Qwen { "qwen" } else { "deepseek" };
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/mtp").join(case);
    let stages = |drafter: &FeatureDrafter| (Some(drafter.stages().hidden.clone()), None);
    GoldenCase { proposer: &Mtp, folder: &folder, layers: 6, tolerance, load, stages }.check();
}

#[test]
fn deepseek_form() {
    check(Form::DeepSeek, 1e-4);
}

#[test]
fn qwen_form_of_16_bits() {
    check(Form::Qwen, 0.03);
}
