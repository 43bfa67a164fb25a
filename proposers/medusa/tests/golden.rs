//! Every head of two steps against tensors of an independent implementation (`tests/golden/make_drafters.py`).

use std::path::PathBuf;

use polyattn_medusa::{Medusa, MedusaDrafter};
use polyattn_nn::drafting::golden::GoldenCase;
use {polyattn_cpu as _, polyattn_flash as _};

fn check(case: &str, tolerance: f32) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/medusa").join(case);
    GoldenCase {
        proposer: &Medusa,
        folder: &folder,
        layers: 6,
        tolerance,
        load: MedusaDrafter::load,
        stages: |drafter| (None, Some(drafter.stages().logits.clone())),
    }
    .check();
}

#[test]
fn heads_of_one_block() {
    check("one-block", 1e-4);
}

#[test]
fn heads_of_two_blocks_of_16_bits() {
    check("two-blocks-f16", 1e-4);
}
