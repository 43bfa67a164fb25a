//! The sample against loops of its own: attention in f64, and the same text without a drafter.

use own_engine::{Layer, generate};
use polyattn_api::{AttentionKind, AttentionProblem, BatchLayout, DType, Device, EngineConfig, device::DeviceChoice};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const ROW: usize = 2 * KV_HEADS * DIM;

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    devices
}

/// Numbers from -1 to 1.
fn numbers(seed: &mut u32, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| {
            *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// The query rows behind `history` rows of keys and values, each row seeing those up to its own.
fn naive(q: &[f32], history: &[f32]) -> Vec<f64> {
    let (queries, length) = (q.len() / (HEADS * DIM), history.len() / ROW);
    let mut out = Vec::new();
    for row in 0..queries {
        let seen = length - queries + row + 1;
        for head in 0..HEADS {
            let query = &q[(row * HEADS + head) * DIM..][..DIM];
            let place = head / (HEADS / KV_HEADS) * DIM;
            let key = |j: usize| &history[j * ROW + place..][..DIM];
            let value = |j: usize| &history[j * ROW + KV_HEADS * DIM + place..][..DIM];
            let logit = |j: usize| {
                query.iter().zip(key(j)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / (DIM as f64).sqrt()
            };
            let weights: Vec<f64> = (0..seen).map(|j| logit(j).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..DIM).map(|d| {
                weights.iter().enumerate().map(|(j, weight)| weight * f64::from(value(j)[d])).sum::<f64>() / total
            }));
        }
    }
    out
}

#[test]
fn a_layer_on_buffers_of_its_own() {
    let kind = AttentionKind::Gqa {
        query_heads: HEADS as u32,
        kv_heads: KV_HEADS as u32,
        head_dim: DIM as u32,
        value_dim: DIM as u32,
    };
    for device in devices() {
        let layer = Layer::new(&device, &AttentionProblem::new(kind, DType::F32), 8, 4).unwrap();
        let expected = if device.is_cpu() { "cpu" } else { "flash" };
        assert_eq!(layer.backend(), expected);

        // Two sequences on pages that interleave: prompts of 5 and 9 tokens, then three steps of one token each.
        let pages = [[6, 1, 3], [0, 7, 2]];
        let mut history = [Vec::new(), Vec::new()];
        let mut seed = 7;
        for (step, new) in [[5, 9], [1, 1], [1, 1], [2, 0]].into_iter().enumerate() {
            let mut batch = BatchLayout::new(4, 8);
            let (mut q, mut kv, mut want) = (Vec::new(), Vec::new(), Vec::new());
            for (sequence, rows) in new.into_iter().enumerate() {
                let (queries, cached) = (numbers(&mut seed, rows * HEADS * DIM), numbers(&mut seed, rows * ROW));
                history[sequence].extend_from_slice(&cached);
                want.extend(naive(&queries, &history[sequence]));
                q.extend(queries);
                kv.extend(cached);
                batch.push(rows as u32, (history[sequence].len() / ROW) as u32, &pages[sequence]);
            }
            let got = layer.attend(&batch, &q, &kv).unwrap();
            assert_eq!(got.len(), want.len());
            for (place, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((f64::from(*got) - want).abs() < 1e-5, "step {step}, element {place}: {got} instead of {want}");
            }
        }
    }
}

#[test]
fn a_loop_that_speculates_says_what_the_target_says() {
    // A text that goes round in circles of 7, and one that a drafter rarely foresees.
    let circle = |tokens: &[u32]| (tokens.len() % 7) as u32;
    let chaos = |tokens: &[u32]| {
        tokens.iter().fold(1u32, |x, token| (x ^ token).wrapping_mul(0x9e37_79b1).rotate_left(13)) >> 27
    };
    let config = config();
    let prompt = [3, 1, 4, 1, 5];
    for proposer in ["ngram", "bigram"] {
        let plain = |target: &dyn Fn(&[u32]) -> u32| {
            let mut tokens = prompt.to_vec();
            while tokens.len() < prompt.len() + 100 {
                tokens.push(target(&tokens));
            }
            tokens
        };
        let easy = generate(proposer, &config, &prompt, 100, circle).unwrap();
        assert_eq!(easy.tokens, plain(&circle), "{proposer}");
        assert!(easy.passes < 40, "{proposer} drafts in vain: {} passes", easy.passes);
        let hard = generate(proposer, &config, &prompt, 100, chaos).unwrap();
        assert_eq!(hard.tokens, plain(&chaos), "{proposer}");
        assert!(hard.passes <= 100 && hard.passes > easy.passes, "{proposer}: {} passes", hard.passes);
    }
    let error = generate("oracle", &config, &prompt, 1, circle).unwrap_err().to_string();
    assert_eq!(error, "no proposer 'oracle'; there are: bigram, ngram");
}

fn config() -> EngineConfig {
    serde_json::from_str(
        r#"{ "target": { "dtype": "f32", "layers": [
            { "name": "full", "kind": "gqa", "query_heads": 4, "kv_heads": 2, "head_dim": 16 } ] } }"#,
    )
    .unwrap()
}
