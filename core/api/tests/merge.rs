//! Merging of partial results, against f64, on the CPU and on a GPU.
#![allow(clippy::unwrap_used, reason = "a test's help may fail the test")]

use polyattn_api::{AttentionState, BackendError, Device, MergeStates, merge_states};
use polyattn_device::DeviceChoice;

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    devices
}

/// States `[states, dim]` and their LSEs.
#[derive(Clone, Debug, PartialEq)]
struct States {
    out: Vec<f32>,
    lse: Vec<f32>,
}

/// Numbers in −1..1, the same for the same seed.
fn noise(seed: u32) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 * 2.0 - 1.0
    }
}

/// Softmax over `parts` sets of `keys` logits each, set by set and all at once; logits reach far apart.
fn split(seed: u32, states: usize, dim: usize, parts: usize) -> (Vec<States>, Vec<f64>, Vec<f64>) {
    let mut noise = noise(seed);
    let mut split = vec![States { out: Vec::new(), lse: Vec::new() }; parts];
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for _ in 0..states {
        let (mut sums, mut total, mut top) = (vec![0.0; dim], 0.0, f64::NEG_INFINITY);
        let mut all = Vec::new();
        for part in &mut split {
            let height = f64::from(noise()) * 60.0;
            // Some sets are empty, sometimes all of them.
            let keys = if noise() < -0.4 { 0 } else { 3 };
            let logits: Vec<f64> = (0..keys).map(|_| height + f64::from(noise()) * 4.0).collect();
            let values: Vec<Vec<f64>> =
                (0..keys).map(|_| (0..dim).map(|_| f64::from(noise()) * 3.0).collect()).collect();
            let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let denominator: f64 = logits.iter().map(|logit| (logit - most).exp()).sum();
            for i in 0..dim {
                let sum: f64 = logits.iter().zip(&values).map(|(x, v)| (x - most).exp() * v[i]).sum();
                // What a part that saw nothing wrote must not matter.
                part.out.push(if keys == 0 { f32::NAN } else { (sum / denominator) as f32 });
            }
            part.lse.push(if keys == 0 { f32::NEG_INFINITY } else { (most + denominator.ln()) as f32 });
            top = top.max(most);
            all.extend(logits.into_iter().zip(values));
        }
        for (logit, value) in &all {
            let weight = (logit - top).exp();
            total += weight;
            sums.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight * value);
        }
        out.extend(sums.iter().map(|sum| if all.is_empty() { f64::NAN } else { sum / total }));
        lse.push(if all.is_empty() { f64::NEG_INFINITY } else { top + total.ln() });
    }
    (split, out, lse)
}

fn merged(device: &Device, into: &States, other: &States, states: std::ops::Range<u32>, dim: u32) -> States {
    let upload = |data: &[f32]| device.upload(data, "state").unwrap();
    let (out, lse, other_out, other_lse) =
        (upload(&into.out), upload(&into.lse), upload(&other.out), upload(&other.lse));
    let (into, other) = (AttentionState::new(&out, &lse), AttentionState::new(&other_out, &other_lse));
    let mut commands = device.commands().unwrap();
    merge_states(&mut commands, &MergeStates::new(into, other, states, dim)).unwrap();
    let _ = commands.submit().unwrap();
    States { out: device.download(&out).unwrap(), lse: device.download(&lse).unwrap() }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn parts_become_the_whole_in_any_order() {
    for device in devices() {
        for (seed, (states, dim)) in [(1, 1), (7, 64), (300, 24), (5, 200), (66_000, 1)].into_iter().enumerate() {
            let (parts, out, lse) = split(seed as u32 + 1, states, dim, 4);
            let all = 0..states as u32;
            let merge = |a: &States, b: &States| merged(&device, a, b, all.clone(), dim as u32);
            let [a, b, c, d] = &parts[..] else { panic!("four parts") };
            let orders = [
                merge(&merge(&merge(a, b), c), d),
                merge(a, &merge(b, &merge(c, d))),
                merge(&merge(d, b), &merge(c, a)),
            ];
            for got in orders {
                for (at, (got, want)) in got.lse.iter().zip(&lse).enumerate() {
                    let near = (f64::from(*got) - want).abs() <= 1e-5 * (1.0 + want.abs());
                    assert!(near || f64::from(*got) == *want, "lse {at}: {got} for {want} on {device:?}");
                }
                for (at, (got, want)) in got.out.iter().zip(&out).enumerate() {
                    // A state that saw nothing keeps what it held.
                    let empty = lse[at / dim] == f64::NEG_INFINITY;
                    let near = (f64::from(*got) - want).abs() <= 2e-5 * (1.0 + want.abs());
                    assert!(near || (empty && got.is_nan()), "out {at}: {got} for {want} on {device:?}");
                }
            }
            assert!(lse.contains(&f64::NEG_INFINITY) || states < 100, "some states saw nothing");
        }
    }
}

#[test]
fn nothing_is_neutral_to_the_bit() {
    let dim = 70;
    for device in devices() {
        let (parts, ..) = split(9, 40, dim, 1);
        let some = &parts[0];
        let nothing = States { out: vec![f32::NAN; 40 * dim], lse: vec![f32::NEG_INFINITY; 40] };
        let zeros = States { out: vec![0.0; 40 * dim], ..nothing.clone() };
        for (a, b) in [(some, &nothing), (&nothing, some), (some, &zeros), (&zeros, some)] {
            let got = merged(&device, a, b, 0..40, dim as u32);
            assert_eq!(bits(&got.lse), bits(&some.lse), "{device:?}");
            for (state, lse) in some.lse.iter().enumerate().filter(|(_, lse)| lse.is_finite()) {
                let place = state * dim..(state + 1) * dim;
                assert_eq!(bits(&got.out[place.clone()]), bits(&some.out[place]), "{device:?} {lse}");
            }
        }
        // Nothing and nothing: zeros stay zeros, and no NaN comes of −∞ − −∞.
        assert_eq!(merged(&device, &zeros, &nothing, 0..40, dim as u32), zeros, "{device:?}");
    }
}

#[test]
fn a_state_outweighed_by_far_adds_nothing() {
    for device in devices() {
        let high = States { out: vec![1.5, -2.0], lse: vec![3.0e38] };
        let low = States { out: vec![7.0, 7.0], lse: vec![-3.0e38] };
        for (a, b) in [(&high, &low), (&low, &high)] {
            assert_eq!(merged(&device, a, b, 0..1, 2), high, "{device:?}");
        }
        // A wrong result is not swallowed.
        let broken = States { out: vec![0.0, 0.0], lse: vec![f32::NAN] };
        assert!(merged(&device, &high, &broken, 0..1, 2).out.iter().all(|x| x.is_nan()), "{device:?}");
    }
}

#[test]
fn states_outside_the_range_are_left_alone() {
    let dim = 24;
    for device in devices() {
        let (mut parts, ..) = split(3, 20, dim, 2);
        parts.iter_mut().for_each(|part| part.lse.fill(0.5));
        let poisoned = f32::from_bits(0x7fc1_2345);
        let into = States { out: vec![poisoned; 20 * dim], ..parts[0].clone() };
        let got = merged(&device, &into, &parts[1], 6..13, dim as u32);
        for state in 0..20 {
            let outside = !(6..13).contains(&state);
            let same = got.lse[state].to_bits() == into.lse[state].to_bits();
            assert_eq!(same, outside, "lse {state} on {device:?}");
            let untouched = got.out[state * dim..][..dim].iter().all(|x| x.to_bits() == poisoned.to_bits());
            assert!(untouched || !outside, "out {state} on {device:?}");
        }
        assert_eq!(bits(&merged(&device, &into, &parts[1], 4..4, dim as u32).out), bits(&into.out));
    }
}

#[test]
fn mistakes_are_typed_errors() {
    for device in devices() {
        let alloc = |bytes: u64| device.alloc(bytes, "state").unwrap();
        let (out, lse, other_out, other_lse, short) = (alloc(1024), alloc(64), alloc(1024), alloc(64), alloc(16));
        let mut commands = device.commands().unwrap();
        let mut refused =
            |into, other, states, dim| match merge_states(&mut commands, &MergeStates::new(into, other, states, dim)) {
                Err(BackendError::Io(message)) => message,
                other => panic!("{other:?}"),
            };
        let (into, other) = (AttentionState::new(&out, &lse), AttentionState::new(&other_out, &other_lse));
        let message = refused(AttentionState::new(&short, &lse), other, 0..16, 16);
        assert_eq!(message, "out has 16 bytes, needs 1024");
        assert_eq!(
            refused(into, AttentionState::new(&other_out, &short), 0..16, 16),
            "the other lse has 16 bytes, needs 64"
        );
        assert!(refused(into, other, 0..u32::MAX, 16).contains("exceed 32 bits"));

        // Merging a state with itself is no merging of disjoint keys.
        let mut commands = device.commands().unwrap();
        let recorded = merge_states(&mut commands, &MergeStates::new(into, into, 0..16, 16));
        assert!(recorded.is_err() || commands.submit().is_err(), "{device:?}");
    }
}
