//! Small drafters for tests (feature `test-support`).

use std::{io, path::Path};

use polyattn_api::TargetFacts;
use polyattn_nn::drafting::tiny::{CountingTarget, Random, TinyTensor, write_checkpoint};

/// Writes heads of random weights for a target, in the checkpoint format: three heads of one block. The folder is made
/// where it is not there.
///
/// # Errors
/// If a file cannot be written.
pub fn write_random(target: &TargetFacts, folder: &Path) -> io::Result<()> {
    let hidden = target.hidden_size as usize;
    let mut random = Random::new(11);
    let mut tensors = Vec::new();
    for head in 0..3 {
        tensors.push(random.matrix(format!("{head}.0.linear.weight"), hidden, hidden));
        tensors.push(random.vector(format!("{head}.0.linear.bias"), hidden, 0.0));
        tensors.push(random.matrix(format!("{head}.1.weight"), target.vocab_size as usize, hidden));
    }
    write_checkpoint(folder, &config(target), &tensors)
}

/// Writes heads that know what a counting target says next, whose layers add nothing. They look at the hidden state
/// alone, so that one of another row is wrong.
///
/// # Errors
/// A target without a checkpoint; if a file cannot be written.
pub fn write_counting(target: &TargetFacts, folder: &Path) -> io::Result<()> {
    let counting = CountingTarget::open(target)?;
    let hidden = counting.hidden;
    let mut tensors = Vec::new();
    for head in 0..3 {
        let mut tensor = |name, shape, values| tensors.push(TinyTensor { name, shape, values });
        tensor(format!("{head}.0.linear.weight"), vec![hidden, hidden], vec![0.0; hidden * hidden]);
        tensor(format!("{head}.0.linear.bias"), vec![hidden], vec![0.0; hidden]);
        let rows = counting.head_further(head + 1);
        tensor(format!("{head}.1.weight"), vec![target.vocab_size as usize, hidden], rows);
    }
    write_checkpoint(folder, &config(target), &tensors)
}

fn config(target: &TargetFacts) -> serde_json::Value {
    serde_json::json!({
        "medusa_num_heads": 3, "medusa_num_layers": 1,
        "hidden_size": target.hidden_size, "vocab_size": target.vocab_size,
    })
}
