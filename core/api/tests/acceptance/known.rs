//! Known answers. Noise is the one of the request, so a table says what must follow from it.

use polyattn_api::{
    AcceptanceRule, Accepted, Block, Distribution, Draft, Greedy, Match, Purpose, Registry, Rejection, Sampling,
    StrategyConfig, TargetRows, Typical, Verification,
};
use serde_json::json;

fn sampled(seed: u64) -> Sampling {
    Sampling { temperature: 1.0, seed, ..Sampling::default() }
}

fn logits(rows: &[&[f64]]) -> Vec<f32> {
    rows.iter().flat_map(|row| row.iter().map(|p| p.ln() as f32)).collect()
}

fn of(probabilities: &[f64]) -> Distribution {
    Distribution::from_weights((0..).zip(probabilities.iter().copied())).unwrap()
}

fn judge(rule: &dyn AcceptanceRule, draft: &Draft, sampling: &Sampling, rows: &[&[f64]]) -> Accepted {
    let logits = logits(rows);
    let target = TargetRows::Logits { logits: &logits, vocab: rows[0].len() };
    rule.accept(&Verification::new(draft, &[9, 9, 9], sampling, target))
}

fn rule(config: &StrategyConfig) -> Box<dyn AcceptanceRule> {
    Registry::default().strategy(config).unwrap()
}

#[test]
fn greedy_chains() {
    let check = |drafted: &[u32], target: &[u32], accepted: usize, bonus| {
        let draft = Draft::from(drafted.to_vec());
        let greedy = Sampling::default();
        for rule in [&Match as &dyn AcceptanceRule, &Greedy, &Rejection, &Block, &Typical::default()] {
            let verification = Verification::new(&draft, &[1], &greedy, TargetRows::Best(target));
            let got = rule.accept(&verification);
            assert_eq!((got.nodes.len(), got.bonus), (accepted, bonus), "{}: {drafted:?} {target:?}", rule.name());
        }
    };
    check(&[], &[4], 0, 4);
    check(&[1, 2, 3], &[1, 2, 3, 9], 3, 9);
    check(&[1, 2, 3], &[1, 5, 3, 9], 1, 5);
    check(&[7, 2], &[1, 2, 3], 0, 1);
}

#[test]
fn greedy_trees() {
    // Behind the anchor 10 and 11; behind 10 12 and 13; behind 11 12.
    let tree = Draft::tree(vec![10, 11, 12, 13, 12], vec![None, None, Some(0), Some(0), Some(1)]);
    let greedy = Sampling::default();
    let cases: [([u32; 6], &[u32], u32); 4] = [
        ([10, 13, 0, 0, 5, 0], &[0, 3], 5),
        ([11, 0, 12, 0, 0, 7], &[1, 4], 7),
        ([10, 14, 0, 0, 0, 0], &[0], 14),
        ([15, 0, 0, 0, 0, 0], &[], 15),
    ];
    for (best, nodes, bonus) in cases {
        for rule in [&Match as &dyn AcceptanceRule, &Rejection, &Block, &Typical::default()] {
            let got = rule.accept(&Verification::new(&tree, &[1], &greedy, TargetRows::Best(&best)));
            assert_eq!((got.nodes.as_slice(), got.bonus), (nodes, bonus), "{}", rule.name());
        }
    }
}

#[test]
fn rejection_of_one_token() {
    let (p, q) = ([0.5, 0.2, 0.3], [0.2, 0.8, 0.0]);
    for seed in 0..400 {
        let sampling = sampled(seed);
        let accept = sampling.noise(3, Purpose::Accept);
        let residual = sampling.noise(3, Purpose::Residual);
        // Drawn from q: min(1, p ÷ q) is 1 for token 0 and ¼ for token 1. What p has beyond q: 0.3 of 0 and of 2.
        for (token, ratio) in [(0, 1.0), (1, 0.25)] {
            let draft = Draft { drawn_from: vec![of(&q)], ..vec![token].into() };
            let got = judge(&Rejection, &draft, &sampling, &[&p, &[0.0, 0.0, 1.0]]);
            let want = if accept < ratio { (1, 2) } else { (0, if residual < 0.5 { 0 } else { 2 }) };
            assert_eq!((got.nodes.len(), got.bonus), want);
        }
        // Chosen without chance: p itself, and p without the token.
        let got = judge(&Rejection, &vec![1].into(), &sampling, &[&p, &[0.0, 1.0, 0.0]]);
        let want = if accept < 0.2 { (1, 1) } else { (0, if residual < 0.625 { 0 } else { 2 }) };
        assert_eq!((got.nodes.len(), got.bonus), want);
        // A token that the drafter says it cannot draw is never accepted, nor one that the target never says.
        let never = Draft { drawn_from: vec![of(&q)], ..vec![2].into() };
        assert!(judge(&Rejection, &never, &sampling, &[&p, &p]).nodes.is_empty());
        assert!(judge(&Rejection, &vec![2].into(), &sampling, &[&[0.5, 0.5, 0.0], &p]).nodes.is_empty());
    }
}

#[test]
fn siblings_are_judged_by_what_is_left() {
    let p = [0.5, 0.2, 0.3];
    let tree = Draft::tree(vec![0, 2], vec![None, None]);
    for seed in 0..400 {
        let sampling = sampled(seed);
        let [first, second] = [0, 1].map(|place| sampling.noise_of(3, place, Purpose::Accept));
        let got = judge(&Rejection, &tree, &sampling, &[&p, &[1.0, 0.0, 0.0], &[0.0, 1.0, 0.0]]);
        // Without token 0 the rest is 0.4 and 0.6; without both, token 1.
        let want = match () {
            () if first < 0.5 => (vec![0], 0),
            () if second < 0.6 => (vec![1], 1),
            () => (vec![], 1),
        };
        assert_eq!((got.nodes, got.bonus), want);
    }
}

/// Slot 1: d = 0 of q (½, ½), p (¼, ¾), so r₁ = ½. Slot 2: q (0.2, 0.8), p (0.6, 0.4), so S₁ = 0.1 and h₁ = ⅙.
#[test]
fn block_of_two_tokens() {
    let (p, q) = ([[0.25, 0.75], [0.6, 0.4]], [of(&[0.5, 0.5]), of(&[0.2, 0.8])]);
    let mut seen = [0; 3];
    for seed in 0..600 {
        let sampling = sampled(seed);
        let noise = [0, 1].map(|node| sampling.noise_of(3, node, Purpose::Accept));
        // r₂ = min(1, ½ · 0.6 ÷ 0.2) = 1, or min(1, ½ · 0.4 ÷ 0.8) = ¼: the last is h₂.
        for (token, last) in [(0, 1.0), (1, 0.25)] {
            let draft = Draft { drawn_from: q.to_vec(), ..vec![0, token].into() };
            let got = judge(&Block, &draft, &sampling, &[&p[0], &p[1], &[0.0, 1.0]]);
            let want = match () {
                () if noise[1] < last => (2, 1),
                // ½ p − q has 0.1 of token 0 alone.
                () if noise[0] < 1.0 / 6.0 => (1, 0),
                // p − q has token 1 alone.
                () => (0, 1),
            };
            assert_eq!((got.nodes.len(), got.bonus), want, "seed {seed}");
            seen[got.nodes.len()] += 1;
        }
    }
    assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
    // Without chance, S = r · (1 − p(d)).
    for seed in 0..200 {
        let sampling = sampled(seed);
        let noise = [0, 1].map(|node| sampling.noise_of(3, node, Purpose::Accept));
        let got = judge(&Block, &vec![0, 1].into(), &sampling, &[&p[0], &p[1], &[1.0, 0.0]]);
        let h = [0.25 * 0.6 / (0.25 * 0.6 + 0.75), 0.25 * 0.4];
        let want = (0..2).rev().find(|place| noise[*place] < h[*place]).map_or(0, |place| place + 1);
        assert_eq!(got.nodes.len(), want);
    }
}

/// Block verification accepts no less than rejection sampling does, and more on the whole.
#[test]
fn block_accepts_more() {
    let (p, q) = ([0.7, 0.2, 0.1], of(&[0.2, 0.5, 0.3]));
    let (mut block, mut token) = (0, 0);
    for seed in 0..4000 {
        let sampling = sampled(seed);
        let tokens: Vec<u32> = (0..4).map(|node| q.draw(sampling.noise_of(3, node, Purpose::Draft))).collect();
        let draft = Draft { drawn_from: vec![q.clone(); 4], ..tokens.into() };
        block += judge(&Block, &draft, &sampling, &[&p[..]; 5]).nodes.len();
        token += judge(&Rejection, &draft, &sampling, &[&p[..]; 5]).nodes.len();
    }
    assert!(block > token, "{block} against {token}");
}

#[test]
fn typical_by_entropy() {
    // Entropy 0.8018: the threshold is min(0.09, 0.3 · 0.4485) = 0.09.
    let p = [0.7, 0.2, 0.08, 0.02];
    let row = |token: u32| judge(&Typical::default(), &vec![token].into(), &sampled(1), &[&p, &p]).nodes.len();
    assert_eq!([0, 1, 2, 3].map(row), [1, 1, 0, 0]);
    // δ 0.1: 0.045.
    let strict = rule(&StrategyConfig::new("typical").with(json!({"delta": 0.1})));
    let row = |token: u32| judge(&*strict, &vec![token].into(), &sampled(1), &[&p, &p]).nodes.len();
    assert_eq!([0, 1, 2, 3].map(row), [1, 1, 1, 0]);
    // The longest path of a tree, not the first.
    let tree = Draft::tree(vec![0, 1, 0, 3], vec![None, None, Some(1), Some(0)]);
    assert_eq!(judge(&Typical::default(), &tree, &sampled(1), &[&p[..]; 5]).nodes, [1, 2]);
    assert!(!strict.lossless() && Rejection.lossless());
}

#[test]
fn synthetic_rates() {
    let p = [0.25; 4];
    let mean = |parameters| {
        let rule = rule(&StrategyConfig::new("synthetic").with(parameters));
        assert!(!rule.lossless());
        let mut reached = [0; 5];
        for seed in 0..4000 {
            let got = judge(&*rule, &vec![3, 3, 3, 3].into(), &sampled(seed), &[&p[..]; 5]).nodes.len();
            reached.iter_mut().take(got + 1).for_each(|count| *count += 1);
        }
        reached.map(|count| f64::from(count) / 4000.0)
    };
    assert_eq!(mean(json!({"length": 3.0}))[1..], [1.0, 1.0, 0.0, 0.0]);
    assert_eq!(mean(json!({"length": 1.0}))[1..], [0.0; 4]);
    assert_eq!(mean(json!({"length": 99.0}))[1..], [1.0; 4]);
    let half = mean(json!({"length": 2.5}));
    assert!(half[1] == 1.0 && (half[2] - 0.5).abs() < 0.03 && half[3] == 0.0, "{half:?}");
    let rates = mean(json!({"rates": [0.8, 0.4, 0.4]}));
    for (got, want) in rates[1..].iter().zip([0.8, 0.4, 0.4, 0.0]) {
        assert!((got - want).abs() < 0.03, "{rates:?}");
    }
}

#[test]
fn drafted_tokens_are_part_of_the_text() {
    // With a penalty of 4, behind [1] token 0 is the likelier, behind the drafted 0 token 2 is.
    let sampling = Sampling { repetition_penalty: 4.0, ..Sampling::default() };
    let rows = [2.0f32, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0];
    let target = TargetRows::Logits { logits: &rows, vocab: 3 };
    let draft = Draft::from(vec![0, 2]);
    for rule in [&Match as &dyn AcceptanceRule, &Rejection, &Block] {
        let got = rule.accept(&Verification::new(&draft, &[1], &sampling, target));
        assert_eq!((got.nodes.len(), got.bonus), (2, 1), "{}", rule.name());
    }
}

#[test]
fn hostile_input_gives_an_id_and_no_panic() {
    let nan = f32::NAN;
    let rows = [nan, nan, nan, 0.0, f32::INFINITY, nan, f32::NEG_INFINITY, 1.0, 1.0];
    let target = TargetRows::Logits { logits: &rows, vocab: 3 };
    let drafts = [
        Draft::from(vec![7_000, 1]),
        vec![0, 1].into(),
        vec![1, u32::MAX].into(),
        Draft::default(),
        Draft::tree(vec![5, 0, 1], vec![None, None, None]),
        // More nodes than rows.
        vec![0, 1, 2, 0, 1].into(),
        Draft { drawn_from: vec![Distribution::one_hot(2); 2], ..vec![0, 1].into() },
    ];
    let typical = Typical::default();
    for draft in &drafts {
        for seed in 0..20 {
            for rule in [&Match as &dyn AcceptanceRule, &Rejection, &Block, &typical] {
                let got = rule.accept(&Verification::new(draft, &[1], &sampled(seed), target));
                assert!(got.bonus < 3, "{} {got:?}", rule.name());
                assert!(got.nodes.iter().all(|node| draft.tokens[*node as usize] < 3), "{} {got:?}", rule.name());
            }
        }
    }
}

#[test]
fn no_draft_is_plain_sampling() {
    let p = [0.1, 0.2, 0.3, 0.4];
    for seed in 0..50 {
        let sampling = sampled(seed);
        let want = of(&p).draw(sampling.noise(3, Purpose::Token));
        for rule in [&Match as &dyn AcceptanceRule, &Rejection, &Block, &Typical::default()] {
            assert_eq!(judge(rule, &Draft::default(), &sampling, &[&p]).bonus, want, "{}", rule.name());
        }
    }
}

#[test]
fn strategies_are_found_by_name() {
    let registry = Registry::default();
    let error = |name: &str, parameters| {
        let config = StrategyConfig::new(name).with(parameters);
        registry.strategy::<dyn AcceptanceRule>(&config).unwrap_err()
    };
    let unknown = error("psychic", json!(null));
    let names = "block, greedy, match, rejection, synthetic, typical";
    assert_eq!(unknown, format!("unknown acceptance rule 'psychic'; registered are: {names}"));
    assert!(error("typical", json!({"epsilon": -1.0})).contains("epsilon -1"));
    assert!(error("typical", json!({"epsilom": 0.1})).contains("unknown field `epsilom`"));
    assert!(error("typical", json!([0.1])).contains("no JSON object"));
    assert!(error("match", json!({"k": 1})).contains("takes no parameters"));
    assert!(error("synthetic", json!(null)).contains("neither length nor rates"));
    assert!(error("synthetic", json!({"length": 0.5})).contains("0.5"));
    assert!(error("synthetic", json!({"rates": [0.5, 0.6]})).contains("0.6"));
    assert!(registry.strategy::<dyn AcceptanceRule>(&StrategyConfig::new(" ReJection")).is_ok());
    assert!(Greedy.refuses(&sampled(1)).unwrap().contains("temperature 0, the request's is 1"));
    let tree = |text: &str| {
        let config: StrategyConfig = serde_json::from_str(text).unwrap();
        registry.strategy::<dyn polyattn_api::TreeBuilder>(&config).map(|_| ())
    };
    assert_eq!(tree(r#""TOP-K""#), Ok(()));
    assert_eq!(tree(r#"{"name": "top-k", "parameters": {"k": 8}}"#), Ok(()));
    assert!(tree(r#"{"name": "top-k", "parameters": {"k": 0}}"#).unwrap_err().contains("k: 0"));
    let odd = serde_json::from_str::<StrategyConfig>(r#"{"nom": "top-k"}"#).unwrap_err().to_string();
    assert!(odd.contains("unknown field `nom`"), "{odd}");
    let length = StrategyConfig::new("adaptive").with(json!({"rate": 2}));
    assert!(registry.strategy::<dyn polyattn_api::LengthPolicy>(&length).unwrap_err().contains("rate: 2"));
}
