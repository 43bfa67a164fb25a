//! Many requests in one engine: each has the tokens that it has alone, whatever drafts, in chains and in trees.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use polyattn_api::{
    AcceptanceRule, Accepted, Draft, Drafter, INTERFACE_VERSION, LengthPolicy, LengthWish, LoadContext, Marginals,
    Origin, Outcome, Proposal, ProposeContext, Proposer, ProposerEntry, ProposerError, ProposerRequirements, Registry,
    StepObserved, StrategyConfig, TapSpec, TargetFacts, TreeBuilder, TreeGrowth, Verification,
};
use polyattn_device::{Buffer, Device};
use polyattn_e2e::{Margin, assert_same_up_to_ties, devices, engine, greedy, margins, tests_folder};
use polyattn_engine::{
    Engine, EngineOptions, Generation, Happened, Request, RequestId, Sampling, SpeculativeOptions, StopReason,
};
use polyattn_nn::load::ModelSource;

fn tiny() -> ModelSource {
    ModelSource::open(&tests_folder("golden/tiny/qwen3")).unwrap()
}

/// Prompts of unequal lengths that repeat themselves in part.
fn prompts() -> Vec<Vec<u32>> {
    vec![
        vec![5, 9, 17, 33, 5, 9, 17, 40, 41, 42, 5, 9, 17, 33, 70, 5, 9, 17],
        vec![7],
        (0..45).map(|place| 11 + place * place % 23).collect(),
        vec![3, 4, 3, 4, 3, 4, 3],
    ]
}

fn request(prompt: &[u32], tokens: usize) -> Request {
    let mut request = Request::new(prompt.to_vec(), tokens);
    request.stop = Some(Vec::new());
    request
}

/// Runs all to their ends.
fn run_all(engine: &mut Engine, requests: Vec<Request>) -> Vec<Generation> {
    let ids: Vec<RequestId> = requests.into_iter().map(|request| engine.add_request(request).unwrap()).collect();
    let mut done: BTreeMap<RequestId, Generation> = BTreeMap::new();
    let mut told: BTreeMap<RequestId, Vec<u32>> = BTreeMap::new();
    while !engine.is_idle() {
        for event in engine.step() {
            match event.what {
                Happened::Tokens(tokens) => told.entry(event.request).or_default().extend(tokens),
                Happened::Finished(generation) => drop(done.insert(event.request, *generation)),
                Happened::Failed(error) => panic!("{error}"),
                _ => unreachable!(),
            }
        }
    }
    ids.iter()
        .map(|id| {
            let generation = done.remove(id).unwrap();
            assert_eq!(told.remove(id).unwrap_or_default(), generation.tokens, "told as they came");
            generation
        })
        .collect()
}

fn dflash(source: &ModelSource, folder: &Path) -> PathBuf {
    let model = &source.config;
    let facts = TargetFacts::new(model.layers, model.hidden_size, model.vocab_size, model.context_length);
    polyattn_dflash::tiny::write_random(&facts, folder, false).unwrap();
    folder.to_owned()
}

fn options(method: &str, model: Option<PathBuf>, tree: Option<&str>) -> EngineOptions {
    EngineOptions::default().with_context(128).with_sequences(4).with_speculative(Some(SpeculativeOptions {
        method: method.into(),
        model,
        tree: tree.map(StrategyConfig::new),
        tree_nodes: tree.map(|_| 12),
        ..SpeculativeOptions::default()
    }))
}

/// Drafts the target's own tokens, known beforehand, and beside them wrong ones: whole trees are accepted.
#[derive(Debug)]
struct Knowing;

static KNOWN: parking_lot::RwLock<Vec<Vec<u32>>> = parking_lot::RwLock::new(Vec::new());

#[derive(Debug, Default)]
struct Oracle {
    taps: TapSpec,
}

impl Proposer for Knowing {
    fn name(&self) -> &'static str {
        "knowing"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none().drafts_trees();
        &NEEDS
    }

    fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(Oracle::default()))
    }
}

impl Drafter for Oracle {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        5
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        let known = KNOWN.read();
        let drafts = context.sequences.iter().map(|sequence| {
            let text = known.iter().find(|text| text.starts_with(sequence.tokens));
            let next: &[u32] = text.map_or(&[], |text| &text[sequence.tokens.len()..]);
            let mut tree = Draft::default();
            let mut parent = None;
            for token in next.iter().take(sequence.width as usize) {
                // In a tree, a wrong sibling before the right one, and one behind it.
                let siblings = match context.tree {
                    Some(_) => vec![(token + 1) % 100, *token, (token + 2) % 100],
                    None => vec![*token],
                };
                let right = tree.tokens.len() as u32 + u32::from(siblings.len() > 1);
                tree.parents.extend(siblings.iter().map(|_| parent));
                tree.tokens.extend(siblings);
                parent = Some(right);
                if context.tree.is_some_and(|wish| tree.len() + 3 > wish.nodes as usize) {
                    break;
                }
            }
            tree
        });
        Ok(Proposal::Host(drafts.collect()))
    }

    fn commit(&mut self, _: &mut Outcome<'_>) -> Result<(), ProposerError> {
        Ok(())
    }
}

fn registry() -> Registry {
    let origin = Origin { crate_name: "stranger", version: "0.1.0" };
    let all = Registry::global().unwrap();
    all.with_proposer(polyattn_api::RegisteredProposer { origin, proposer: Arc::new(Knowing) }).unwrap()
}

/// The tokens of each prompt by plain decoding, one after the other, and the margins.
fn plain(source: &ModelSource, device: &Device, tokens: usize) -> Vec<(Vec<u32>, Vec<Margin>)> {
    let mut plain = engine(source, device, &EngineOptions::default().with_context(128));
    prompts()
        .iter()
        .map(|prompt| {
            let got = greedy(&mut plain, prompt, tokens).tokens;
            let margins = margins(&mut plain, prompt, &got, source.config.vocab_size as usize);
            (got, margins)
        })
        .collect()
}

#[test]
fn a_batch_is_as_each_alone() {
    let source = tiny();
    let folder = tempfile::tempdir().unwrap();
    let model = dflash(&source, folder.path());
    let device = Device::cpu();
    let want = plain(&source, &device, 30);
    let check = |options: &EngineOptions, what: &str| {
        let mut engine = engine(&source, &device, options);
        let all = prompts().iter().map(|prompt| request(prompt, 30)).collect();
        for (got, (want, margins)) in run_all(&mut engine, all).iter().zip(&want) {
            assert_same_up_to_ties(&got.tokens, want, margins, what);
            if options.speculative.is_some() {
                let acceptance = got.acceptance.as_ref().unwrap();
                assert_eq!(got.tokens.len() as u64, 1 + got.steps + acceptance.accepted, "{what}");
                assert!(!got.drafter_lost, "{what}");
            }
        }
    };
    check(&EngineOptions::default().with_context(128).with_sequences(4), "without drafts");
    // Fewer at once than there are: the rest waits.
    check(&EngineOptions::default().with_context(128).with_sequences(2), "two at once");
    for (method, model) in [("ngram", None), ("dflash", Some(model))] {
        for tree in [None, Some("top-k"), Some("best-first"), Some("static"), Some("chain")] {
            check(&options(method, model.clone(), tree), &format!("{method} {tree:?}"));
        }
    }
}

/// Paths through the middle of a tree are accepted, and their keys and values stand where a chain's would.
#[test]
fn accepted_paths_leave_the_cache_of_a_chain() {
    let source = tiny();
    let device = Device::cpu();
    let want = plain(&source, &device, 40);
    KNOWN.write().extend(prompts().iter().zip(&want).map(|(prompt, (tokens, _))| [&prompt[..], tokens].concat()));
    let registry = registry();
    for tree in [None, Some("top-k")] {
        for sequences in [1, 4] {
            let options = options("knowing", None, tree).with_sequences(sequences);
            let mut engine = Engine::load(&source, &device, &registry, &options, &mut |_| {}).unwrap();
            let all = prompts().iter().map(|prompt| request(prompt, 40)).collect();
            for (got, (want, margins)) in run_all(&mut engine, all).iter().zip(&want) {
                assert_same_up_to_ties(&got.tokens, want, margins, &format!("{tree:?} × {sequences}"));
                let acceptance = got.acceptance.as_ref().unwrap();
                assert!(acceptance.mean_length > 3.0, "{tree:?}: {acceptance:?}");
                assert_eq!(acceptance.wasted > acceptance.accepted, tree.is_some(), "{acceptance:?}");
            }
        }
    }
}

/// Each of many requests at once has drafts as long as were asked for.
#[test]
fn a_full_batch_has_whole_drafts() {
    let source = tiny();
    let device = Device::cpu();
    let prompts: Vec<Vec<u32>> = (0..30).map(|first| vec![first, 7, 3]).collect();
    let mut alone = engine(&source, &device, &EngineOptions::default().with_context(64));
    let want: Vec<Vec<u32>> = prompts.iter().map(|prompt| greedy(&mut alone, prompt, 20).tokens).collect();
    KNOWN.write().extend(prompts.iter().zip(&want).map(|(prompt, tokens)| [&prompt[..], tokens].concat()));
    let mut options = options("knowing", None, None).with_context(64).with_sequences(30);
    // 30 × 6 rows are more than the 128 that a pass has in any case.
    options.prefill_chunk = 16;
    let mut engine = Engine::load(&source, &device, &registry(), &options, &mut |_| {}).unwrap();
    assert_eq!(engine.full_batch_width(), Some(5));
    let got = run_all(&mut engine, prompts.iter().map(|prompt| request(prompt, 20)).collect());
    let whole = got.iter().filter(|one| one.acceptance.as_ref().unwrap().per_position.len() == 5).count();
    assert_eq!(whole, 30);
}

#[test]
fn sampled_tokens_do_not_depend_on_the_batch() {
    let source = tiny();
    let device = Device::cpu();
    let sampled = |prompt: &Vec<u32>| {
        let mut request = request(prompt, 20);
        request.sampling =
            Sampling { temperature: 0.9, top_k: Some(30), repetition_penalty: 1.2, seed: 5, ..Sampling::default() };
        request
    };
    let folder = tempfile::tempdir().unwrap();
    let model = dflash(&source, folder.path());
    let mut alone = engine(&source, &device, &EngineOptions::default().with_context(128));
    let want: Vec<Vec<u32>> = prompts()
        .iter()
        .map(|prompt| alone.generate(&sampled(prompt), &mut |_| ControlFlow::Continue(())).unwrap().tokens)
        .collect();
    for (method, model) in [("ngram", None), ("dflash", Some(model.clone()))] {
        for tree in [None, Some("top-k")] {
            let mut engine = engine(&source, &device, &options(method, model.clone(), tree));
            let got = run_all(&mut engine, prompts().iter().map(sampled).collect());
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(&got.tokens, want, "{method} {tree:?}");
            }
        }
    }
    // Drawn drafts: other tokens of the same distribution, the same in a batch as alone.
    for rule in ["rejection", "block"] {
        let mut options = options("dflash", Some(model.clone()), None);
        options.speculative.as_mut().unwrap().acceptance = Some(StrategyConfig::new(rule));
        let mut several = engine(&source, &device, &options);
        let together = run_all(&mut several, prompts().iter().map(sampled).collect());
        let mut one = engine(&source, &device, &options.with_sequences(1));
        for (prompt, together) in prompts().iter().zip(together) {
            let alone = one.generate(&sampled(prompt), &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(alone.tokens, together.tokens, "{rule}");
            assert!(alone.lossless && alone.acceptance.unwrap().drafted > 0);
        }
    }
}

/// Pages run out in the middle: requests wait and go on, with the tokens that they have alone.
#[test]
fn nothing_is_lost_when_pages_run_out() {
    let source = tiny();
    let device = Device::cpu();
    let want = plain(&source, &device, 60);
    for method in [None, Some("ngram")] {
        for prefix_cache in [false, true] {
            let mut options = match method {
                None => EngineOptions::default().with_context(128).with_sequences(4),
                Some(method) => options(method, None, None),
            };
            // 8 pages of 16: one request alone needs 7 in the end.
            (options.pool_pages, options.prefix_cache) = (Some(8), prefix_cache);
            let mut engine = engine(&source, &device, &options);
            let got = run_all(&mut engine, prompts().iter().map(|prompt| request(prompt, 60)).collect());
            for (got, (want, margins)) in got.iter().zip(&want) {
                assert_eq!(got.stop, StopReason::Length);
                assert_same_up_to_ties(&got.tokens, want, margins, &format!("{method:?}, few pages"));
                assert_eq!(got.cached_tokens, 0, "no other request filled a page of it");
            }
            assert!(got.iter().any(|generation| generation.preemptions > 0), "{method:?}: nobody waited");
        }
    }
    // A cache that is too small for one: what was said until then is there.
    let mut options = EngineOptions::default().with_context(128);
    options.pool_pages = Some(3);
    let mut engine = engine(&source, &device, &options);
    let got = engine.generate(&request(&prompts()[0], 60), &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((got.stop, got.tokens.len()), (StopReason::OutOfPages, 48 - 18 + 1));
    assert_same_up_to_ties(&got.tokens, &want[0].0[..31], &want[0].1, "until the pages ran out");
    let long = engine.add_request(request(&[1; 60], 4)).unwrap_err().to_string();
    assert!(long.contains("60 tokens, which need 4 pages, the cache has 3"), "{long}");
}

#[test]
fn requests_come_and_go() {
    let source = tiny();
    let device = Device::cpu();
    let want = plain(&source, &device, 30);
    let mut engine = engine(&source, &device, &options("ngram", None, None));
    let heard = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&heard);
    let callback = Box::new(move |tokens: &[u32]| {
        let all = counting.fetch_add(tokens.len(), Ordering::Relaxed) + tokens.len();
        if all >= 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let prompts = prompts();
    let streamed = engine.add_streaming_request(request(&prompts[0], 30), callback).unwrap();
    let cancelled = engine.add_request(request(&prompts[2], 30)).unwrap();
    let mut plainly = request(&prompts[3], 30);
    plainly.speculative = false;
    let plainly = engine.add_request(plainly).unwrap();
    let mut done = BTreeMap::new();
    let mut late = None;
    for step in 0.. {
        if step == 3 {
            assert!(engine.cancel(cancelled));
            late = Some(engine.add_request(request(&prompts[1], 30)).unwrap());
        }
        for event in engine.step() {
            if let Happened::Finished(generation) = event.what {
                done.insert(event.request, *generation);
            }
        }
        if engine.is_idle() {
            break;
        }
    }
    assert!(!engine.cancel(cancelled), "it has ended");
    assert_eq!(done[&streamed].stop, StopReason::Cancelled);
    assert_eq!(done[&streamed].tokens.len(), heard.load(Ordering::Relaxed));
    assert_eq!(done[&cancelled].stop, StopReason::Cancelled);
    let so_far = &done[&cancelled].tokens;
    assert_same_up_to_ties(so_far, &want[2].0[..so_far.len()], &want[2].1, "cancelled");
    assert_same_up_to_ties(&done[&plainly].tokens, &want[3].0, &want[3].1, "without drafts");
    assert_eq!(done[&plainly].acceptance.as_ref().unwrap().drafted, 0);
    assert_same_up_to_ties(&done[&late.unwrap()].tokens, &want[1].0, &want[1].1, "late");
}

/// A beginning that was run before is not run again, the drafter's part included.
#[test]
fn a_common_beginning_is_shared() {
    let source = tiny();
    let device = Device::cpu();
    let folder = tempfile::tempdir().unwrap();
    let model = dflash(&source, folder.path());
    let system: Vec<u32> = (0..50).map(|place| 20 + place * 7 % 31).collect();
    let texts: Vec<Vec<u32>> =
        [[1, 2, 3], [4, 5, 6], [1, 2, 3]].iter().map(|end| [&system[..], end].concat()).collect();
    let mut alone = engine(&source, &device, &EngineOptions::default().with_context(128));
    for (method, model) in [(None, None), (Some("ngram"), None), (Some("dflash"), Some(model))] {
        let mut options = match method {
            None => EngineOptions::default().with_context(128).with_sequences(4),
            Some(method) => options(method, model, None),
        };
        options.prefix_cache = true;
        let mut sharing = engine(&source, &device, &options);
        for (number, text) in texts.iter().enumerate() {
            let want = greedy(&mut alone, text, 20).tokens;
            let margins = margins(&mut alone, text, &want, source.config.vocab_size as usize);
            let got = greedy(&mut sharing, text, 20);
            assert_same_up_to_ties(&got.tokens, &want, &margins, &format!("{method:?}, text {number}"));
            // Of 53 tokens 3 pages of 16.
            assert_eq!(got.cached_tokens, if number == 0 { 0 } else { 48 }, "{method:?}, text {number}");
        }
        // Two at once, beside each other.
        let both = run_all(&mut sharing, texts[..2].iter().map(|text| request(text, 20)).collect());
        for (got, text) in both.iter().zip(&texts) {
            let want = greedy(&mut alone, text, 20).tokens;
            let margins = margins(&mut alone, text, &want, source.config.vocab_size as usize);
            assert_same_up_to_ties(&got.tokens, &want, &margins, "beside each other");
            assert_eq!(got.cached_tokens, 48);
        }
    }
    // A drafter that does not say what of it stays is given the whole text.
    let mut silent = options("knowing", None, None);
    silent.prefix_cache = true;
    let mut silent = Engine::load(&source, &device, &registry(), &silent, &mut |_| {}).unwrap();
    for _ in 0..2 {
        assert_eq!(greedy(&mut silent, &texts[0], 4).cached_tokens, 0);
    }
}

/// What strategies cannot serve is refused when the engine is made, or the request added.
#[test]
fn strategies_that_do_not_fit_are_refused() {
    let source = tiny();
    let device = Device::cpu();
    let load = |change: &dyn Fn(&mut SpeculativeOptions)| {
        let mut options = options("ngram", None, None);
        change(options.speculative.as_mut().unwrap());
        Engine::load(&source, &device, Registry::global().unwrap(), &options, &mut |_| {})
    };
    let error = |change: &dyn Fn(&mut SpeculativeOptions)| load(change).unwrap_err().to_string();
    let text = error(&|options| options.tree = Some(StrategyConfig::new("oak")));
    assert!(
        text.contains("speculative.tree: unknown tree builder 'oak'") && text.contains("best-first, chain"),
        "{text}"
    );
    let text = error(&|options| options.acceptance = Some(StrategyConfig::new("always")));
    assert!(text.contains("speculative.acceptance") && text.contains("rejection"), "{text}");
    let text = error(&|options| options.length = Some(StrategyConfig::new("long")));
    assert!(text.contains("speculative.length") && text.contains("adaptive"), "{text}");
    let text = error(&|options| (options.tree, options.tree_nodes) = (Some(StrategyConfig::new("top-k")), Some(0)));
    assert!(text.contains("speculative.tree_nodes: 0"), "{text}");
    let top_k = StrategyConfig::new("top-k").with(serde_json::json!({"k": 65}));
    let text = error(&|options| options.tree = Some(top_k.clone()));
    assert!(text.contains("k: 65 candidates, at most 64"), "{text}");
    let paths = StrategyConfig::new("static").with(serde_json::json!({"paths": [[0], [64]]}));
    let text = error(&|options| options.tree = Some(paths.clone()));
    assert!(text.contains("rank 64, 0 to 63"), "{text}");
    let text = error(&|options| options.tree_nodes = Some(4));
    assert!(text.contains("4 is given, but no tree"), "{text}");
    let text = error(&|options| options.num_speculative_tokens = Some(4_000_000_000));
    assert!(text.contains("4000000000") && text.contains("1 to 32"), "{text}");
    let mut greedy_only = load(&|options| options.acceptance = Some(StrategyConfig::new("greedy"))).unwrap();
    let mut warm = request(&[1, 2], 4);
    warm.sampling.temperature = 1.0;
    let text = greedy_only.add_request(warm.clone()).unwrap_err().to_string();
    assert!(text.contains("temperature 0, the request's is 1"), "{text}");
    warm.speculative = false;
    greedy_only.add_request(warm).unwrap();
    let mut lossy = load(&|options| options.acceptance = Some(StrategyConfig::new("typical"))).unwrap();
    let got = greedy(&mut lossy, &prompts()[0], 10);
    assert!(!got.lossless, "it says so");
}

/// Synthetic acceptance has the length that was asked for, whatever is drafted.
#[test]
fn synthetic_acceptance_has_its_length() {
    let source = tiny();
    let folder = tempfile::tempdir().unwrap();
    let mut options = options("dflash", Some(dflash(&source, folder.path())), None);
    let speculative = options.speculative.as_mut().unwrap();
    speculative.acceptance = Some(StrategyConfig::new("synthetic").with(serde_json::json!({"length": 4})));
    speculative.num_speculative_tokens = Some(7);
    let mut engine = engine(&source, &Device::cpu(), &options);
    let got = greedy(&mut engine, &prompts()[0], 81);
    assert_eq!((got.steps, got.lossless), (20, false));
    assert_eq!(got.acceptance.unwrap().histogram, [0, 0, 0, 20]);
}

/// A length policy that says 0 decodes plainly.
#[test]
fn policies_are_asked() {
    let source = tiny();
    let device = Device::cpu();
    let want = plain(&source, &device, 30);
    let policy = |name: &str, parameters: serde_json::Value| {
        let mut options = options("ngram", None, None);
        options.speculative.as_mut().unwrap().length = Some(StrategyConfig::new(name).with(parameters));
        let mut engine = engine(&source, &device, &options);
        let got = run_all(&mut engine, prompts().iter().map(|prompt| request(prompt, 30)).collect());
        for (got, (want, margins)) in got.iter().zip(&want) {
            assert_same_up_to_ties(&got.tokens, want, margins, name);
        }
        got.into_iter()
            .filter_map(|one| one.acceptance)
            .fold((0, 0), |(steps, most), one| (steps + one.drafted_steps, most.max(one.per_position.len())))
    };
    assert_eq!(policy("fixed", serde_json::json!({"tokens": 0})), (0, 0));
    assert_eq!(policy("fixed", serde_json::json!({"tokens": 2})).1, 2);
    assert!(policy("per-batch-size", serde_json::json!({"table": [[1, 3], [3, 1]]})).1 <= 3);
    policy("adaptive", serde_json::Value::Null);
}

/// A stranger's strategies take part like any other.
#[test]
fn strategies_can_be_registered() {
    let entry = polyattn_api::strategy_entry!("mine", |parameters| {
        polyattn_api::strategy::none(parameters).map(|()| Box::new(polyattn_api::BestFirst) as _)
    });
    let registry = Registry::builder()
        .backend(polyattn_api::BackendEntry {
            origin: entry.origin,
            interface: INTERFACE_VERSION,
            priority: 1,
            make: || Arc::new(polyattn::cpu::Cpu),
        })
        .proposer(ProposerEntry { origin: entry.origin, interface: INTERFACE_VERSION, make: || Arc::new(Knowing) })
        .strategies::<dyn polyattn_api::TreeBuilder>([entry])
        .build()
        .unwrap();
    let loaded = Engine::load(&tiny(), &Device::cpu(), &registry, &options("knowing", None, Some("MINE")), &mut |_| {});
    assert_eq!(loaded.unwrap().strategies().unwrap(), ("best-first", "match", "fixed"));
    let twice = Registry::builder().strategies::<dyn polyattn_api::TreeBuilder>([entry, entry]).build().unwrap_err();
    assert!(twice.to_string().contains("two tree builders are called 'mine'"), "{twice}");
}

/// Drafts the last token again, and fails in its third call.
#[derive(Debug)]
struct Failing;

#[derive(Debug, Default)]
struct FailingDrafter {
    calls: u32,
    taps: TapSpec,
}

impl Proposer for Failing {
    fn name(&self) -> &'static str {
        "failing"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none();
        &NEEDS
    }

    fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(FailingDrafter::default()))
    }
}

impl Drafter for FailingDrafter {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        2
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        self.calls += 1;
        if self.calls == 3 {
            return Err(ProposerError::Unsupported("no ideas left".into()));
        }
        Ok(Proposal::Host(
            context.sequences.iter().map(|one| one.tokens[one.tokens.len() - 1..].to_vec().into()).collect(),
        ))
    }

    fn commit(&mut self, _: &mut Outcome<'_>) -> Result<(), ProposerError> {
        Ok(())
    }
}

/// Counts what is counted.
#[derive(Clone, Debug, Default)]
struct Counts(Arc<parking_lot::Mutex<BTreeMap<String, Arc<std::sync::atomic::AtomicU64>>>>);

impl metrics::Recorder for Counts {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        let count = Arc::clone(self.0.lock().entry(key.name().to_owned()).or_default());
        metrics::Counter::from_arc(count)
    }

    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::noop()
    }

    fn register_histogram(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::noop()
    }
}

/// A drafter that is lost on the way costs drafts alone: it is counted, the tokens are the same, and later requests have
/// it again.
#[test]
fn a_lost_drafter_is_counted() {
    let source = tiny();
    let device = Device::cpu();
    let want = plain(&source, &device, 20);
    let origin = Origin { crate_name: "stranger", version: "0.1.0" };
    let all = Registry::global().unwrap();
    let failing = polyattn_api::RegisteredProposer { origin, proposer: Arc::new(Failing) };
    let registry = all.with_proposer(failing).unwrap();
    let counts = Counts::default();
    metrics::with_local_recorder(&counts, || {
        let mut engine =
            Engine::load(&source, &device, &registry, &options("failing", None, None), &mut |_| {}).unwrap();
        let got = run_all(&mut engine, prompts().iter().map(|prompt| request(prompt, 20)).collect());
        for (got, (want, margins)) in got.iter().zip(&want) {
            assert_same_up_to_ties(&got.tokens, want, margins, "without a drafter in the end");
            assert!(got.drafter_lost);
        }
        let later = greedy(&mut engine, &prompts()[0], 20);
        assert!(!later.drafter_lost && later.acceptance.unwrap().drafted > 0);
    });
    let count = |name: &str| counts.0.lock()[name].load(Ordering::Relaxed);
    assert_eq!(count("polyattn_drafters_lost_total"), 4);
    assert_eq!(count("polyattn_requests_total"), 5);
    assert_eq!(count("polyattn_tokens_total"), 5 * 20);
    assert_eq!(
        count("polyattn_drafted_tokens_total"),
        count("polyattn_accepted_tokens_total") + count("polyattn_wasted_tokens_total")
    );
}

/// A cache that no kernel can bind is refused before any weight is read, with the numbers.
#[test]
fn a_cache_that_one_binding_does_not_hold_is_refused() {
    let Ok(device) = Device::open(&polyattn_device::DeviceChoice::Gpu) else {
        eprintln!("skipped: there is no GPU");
        return;
    };
    let source = tiny();
    let limits = &device.facts().limits;
    let allowed = limits.binding_bytes.min(limits.buffer_bytes);
    // 2 heads of 32 elements in f16, pages of 16 tokens.
    let page = 2 * 32 * 2 * 16;
    let (whole, refused) = (allowed / page, allowed / page + 1);
    let mut options = EngineOptions::default().with_context(64);
    options.pool_pages = Some(u32::try_from(refused).unwrap());
    let mut read = 0;
    let error = Engine::load(&source, &device, Registry::global().unwrap(), &options, &mut |bytes| read = bytes)
        .unwrap_err()
        .to_string();
    assert_eq!(read, 0, "no weights");
    let (bytes, tokens, most) = (refused * page, refused * 16, whole * 16);
    for part in [
        format!("{bytes} bytes ({refused} pages, {tokens} tokens)"),
        format!("one binding holds {allowed} ({most} tokens)"),
        device.facts().name.clone(),
    ] {
        assert!(error.contains(&part), "{part}: {error}");
    }
    // As many sequences as take more pages than that.
    let mut options = EngineOptions::default().with_sequences(u32::try_from(refused).unwrap());
    options.context = Some(64);
    let error = Engine::load(&source, &device, Registry::global().unwrap(), &options, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("fewer sequences at once"), "{error}");
}

/// Every token is counted, whichever way it came, and the time of the passes that run ahead is the models'.
#[test]
fn plain_tokens_are_counted_and_timed() {
    let counts = Counts::default();
    metrics::with_local_recorder(&counts, || {
        let mut engine = engine(&tiny(), &Device::cpu(), &EngineOptions::default().with_context(128));
        let id = engine.add_request(request(&[7], 60)).unwrap();
        while !engine.step().iter().any(|event| matches!(event.what, Happened::Tokens(_))) {}
        // What comes now is decoded alone.
        engine.take_times();
        assert!(!engine.is_idle(), "{id} goes on");
        while !engine.is_idle() {
            engine.step();
        }
        let times = engine.take_times();
        assert!(times.efficiency() > 0.5, "{times:?}");
    });
    assert_eq!(counts.0.lock()["polyattn_tokens_total"].load(Ordering::Relaxed), 60);
}

/// Each text begins with the whole of the one before, and finds all of its pages.
#[test]
fn a_growing_text_is_shared() {
    let source = tiny();
    for method in [None, Some("ngram")] {
        let mut options = match method {
            None => EngineOptions::default(),
            Some(method) => options(method, None, None),
        };
        options = options.with_context(128);
        options.prefix_cache = true;
        let mut engine = engine(&source, &Device::cpu(), &options);
        for (length, cached) in [(33, 0), (65, 32), (97, 64), (113, 96)] {
            let text: Vec<u32> = (0..length).map(|place| 20 + place * 7 % 31).collect();
            let mut request = request(&text, 4);
            request.speculative = false;
            let got = engine.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(got.cached_tokens, cached, "{method:?}, {length} tokens");
        }
    }
}

/// Marks on the device each time it is told of a sequence, and looks for the marks in its proposals. Fails in its first.
#[derive(Debug)]
struct Marking;

/// What the drafter found, proposal by proposal, for each time it was told of the sequence.
static MARKS: parking_lot::Mutex<Vec<u32>> = parking_lot::Mutex::new(Vec::new());

#[derive(Debug)]
struct MarkingDrafter {
    taps: TapSpec,
    ones: Buffer,
    /// 256 bytes for each time it was told.
    marks: Buffer,
    /// The sequences it was told of.
    told: Vec<u64>,
    calls: u32,
}

impl Proposer for Marking {
    fn name(&self) -> &'static str {
        "marking"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none();
        &NEEDS
    }

    fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(MarkingDrafter {
            taps: TapSpec::default(),
            ones: context.device.upload(&[1u32; 64], "ones")?,
            marks: context.device.upload(&[0u32; 64 * 32], "marks")?,
            told: Vec::new(),
            calls: 0,
        }))
    }
}

impl Drafter for MarkingDrafter {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        2
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        self.calls += 1;
        if self.calls == 1 {
            return Err(ProposerError::Unsupported("no ideas yet".into()));
        }
        let marks = context.commands.read_back(self.marks.whole())?;
        context.commands.flush()?;
        let marks = marks.wait_as::<u32>()?;
        let wanted = |id: &u64| context.sequences.iter().any(|one| one.id == *id);
        MARKS.lock().extend(marks.chunks(64).zip(&self.told).filter(|(_, id)| wanted(id)).map(|(mark, _)| mark[0]));
        Ok(Proposal::Host(context.sequences.iter().map(|_| vec![1].into()).collect()))
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        for one in outcome.sequences {
            let place = self.marks.slice(256 * self.told.len() as u64, 256)?;
            self.told.push(one.id);
            outcome.commands.copy(self.ones.whole(), place)?;
        }
        Ok(())
    }
}

/// Wants no drafts of the second request in its first step.
#[derive(Debug, Default)]
struct Later {
    asked: bool,
}

impl LengthPolicy for Later {
    fn name(&self) -> &'static str {
        "later"
    }

    fn width(&mut self, wish: &LengthWish) -> u32 {
        if wish.sequence == 1 && !std::mem::replace(&mut self.asked, true) { 0 } else { 1 }
    }

    fn observe(&mut self, step: &StepObserved<'_>) {
        TIMED.lock().push(step.time.is_some());
    }
}

polyattn_api::register_length_policy!("later", |parameters| {
    polyattn_api::strategy::none(parameters).map(|()| Box::new(Later::default()) as Box<dyn LengthPolicy>)
});

/// Whether each observed step had a time.
static TIMED: parking_lot::Mutex<Vec<bool>> = parking_lot::Mutex::new(Vec::new());

/// A drafter that fails for one request takes nothing away that it was told of another. Steps are timed where no prompt
/// stands before them.
#[test]
fn commits_survive_a_failed_proposal() {
    let source = tiny();
    let origin = Origin { crate_name: "stranger", version: "0.1.0" };
    let marking = polyattn_api::RegisteredProposer { origin, proposer: Arc::new(Marking) };
    let registry = Registry::global().unwrap().with_proposer(marking).unwrap();
    for device in devices() {
        MARKS.lock().clear();
        TIMED.lock().clear();
        let mut options = options("marking", None, None);
        options.speculative.as_mut().unwrap().length = Some(StrategyConfig::new("later"));
        let mut engine = Engine::load(&source, &device, &registry, &options, &mut |_| {}).unwrap();
        let got = run_all(&mut engine, vec![request(&[5, 9, 17], 8), request(&[3, 4, 3], 8)]);
        assert!(got[0].drafter_lost && !got[1].drafter_lost);
        let marks = MARKS.lock();
        assert!(!marks.is_empty() && marks.iter().all(|mark| *mark == 1), "{device:?}: {marks:?}");
        let timed = TIMED.lock();
        assert!(!timed[0] && timed.len() > 1 && timed[1..].iter().all(|timed| *timed), "{timed:?}");
    }
}

/// A stranger's strategy: what it does wrong is in its name.
#[derive(Debug)]
struct Odd(&'static str);

impl TreeBuilder for Odd {
    fn name(&self) -> &'static str {
        self.0
    }

    fn grow(&self, nodes: u32, depth: u32) -> Box<dyn TreeGrowth> {
        polyattn_api::BestFirst.grow(nodes, depth)
    }

    fn build(&self, marginals: &Marginals, nodes: u32, depth: u32) -> Draft {
        let several = |count: u32| Draft::tree((0..count).collect(), vec![None; count as usize]);
        match self.0 {
            "panicking" => panic!("no wood"),
            "rootless" => Draft::tree(vec![1, 2], vec![Some(1), None]),
            "large" => several(nodes + 1),
            "deep" => vec![1; depth as usize + 1].into(),
            _ => polyattn_api::BestFirst.build(marginals, nodes, depth),
        }
    }
}

impl LengthPolicy for Odd {
    fn name(&self) -> &'static str {
        self.0
    }

    fn width(&mut self, wish: &LengthWish) -> u32 {
        assert!(self.0 != "unmeasured" || wish.sequence != 1, "no ruler");
        2
    }

    fn observe(&mut self, _: &StepObserved<'_>) {
        assert_ne!(self.0, "unobserved", "no eyes");
    }

    fn forget(&mut self, _: u64) {
        panic!("never");
    }
}

impl AcceptanceRule for Odd {
    fn name(&self) -> &'static str {
        self.0
    }

    fn accept(&self, verification: &Verification<'_>) -> Accepted {
        assert!(verification.text[0] != 5, "no verdict");
        polyattn_api::Match.accept(verification)
    }
}

polyattn_api::register_tree_builder!("panicking", |_| Ok(Box::new(Odd("panicking")) as Box<dyn TreeBuilder>));
polyattn_api::register_tree_builder!("rootless", |_| Ok(Box::new(Odd("rootless")) as Box<dyn TreeBuilder>));
polyattn_api::register_tree_builder!("large", |_| Ok(Box::new(Odd("large")) as Box<dyn TreeBuilder>));
polyattn_api::register_tree_builder!("deep", |_| Ok(Box::new(Odd("deep")) as Box<dyn TreeBuilder>));
polyattn_api::register_length_policy!("unmeasured", |_| Ok(Box::new(Odd("unmeasured")) as Box<dyn LengthPolicy>));
polyattn_api::register_length_policy!("unobserved", |_| Ok(Box::new(Odd("unobserved")) as Box<dyn LengthPolicy>));
polyattn_api::register_acceptance_rule!("undecided", |_| Ok(Box::new(Odd("undecided")) as Box<dyn AcceptanceRule>));

/// A strategy that panics, or builds what is no tree, costs drafts, or the request that it was asked about; nobody
/// else's tokens.
#[test]
fn faults_of_strategies_are_contained() {
    let source = tiny();
    let device = Device::cpu();
    let want = plain(&source, &device, 20);
    let folder = tempfile::tempdir().unwrap();
    let model = dflash(&source, folder.path());
    let run = |change: &dyn Fn(&mut SpeculativeOptions)| {
        let mut options = options("dflash", Some(model.clone()), None);
        change(options.speculative.as_mut().unwrap());
        run_all(&mut engine(&source, &device, &options), prompts().iter().map(|one| request(one, 20)).collect())
    };
    let same = |got: &[Generation], what: &str| {
        for (got, (want, margins)) in got.iter().zip(&want) {
            assert_same_up_to_ties(&got.tokens, want, margins, what);
        }
    };
    for tree in ["panicking", "rootless", "large", "deep"] {
        let got = run(&|options| options.tree = Some(StrategyConfig::new(tree)));
        same(&got, tree);
        assert!(got.iter().all(|one| one.drafter_lost), "{tree}");
    }
    for (policy, lost) in [("unmeasured", [false, true, false, false]), ("unobserved", [true; 4])] {
        let got = run(&|options| options.length = Some(StrategyConfig::new(policy)));
        same(&got, policy);
        assert_eq!(got.iter().map(|one| one.drafter_lost).collect::<Vec<_>>(), lost, "{policy}");
    }
    // A verdict is part of the output: that request has none.
    let mut options = options("dflash", Some(model.clone()), None);
    options.speculative.as_mut().unwrap().acceptance = Some(StrategyConfig::new("undecided"));
    let mut engine = engine(&source, &device, &options);
    let ids: Vec<_> = prompts().iter().map(|one| engine.add_request(request(one, 20)).unwrap()).collect();
    let (mut done, mut failed) = (BTreeMap::new(), Vec::new());
    while !engine.is_idle() {
        for event in engine.step() {
            match event.what {
                Happened::Finished(generation) => drop(done.insert(event.request, *generation)),
                Happened::Failed(error) => failed.push((event.request, error.to_string())),
                _ => {}
            }
        }
    }
    let fault = "acceptance rule 'undecided' is at fault: it panicked in accept: no verdict";
    assert_eq!(failed, [(ids[0], fault.to_owned())]);
    for (id, (want, margins)) in ids.iter().zip(&want).skip(1) {
        assert_same_up_to_ties(&done[id].tokens, want, margins, "undecided about another");
    }
}

/// Notes how many candidates it was asked for.
#[derive(Debug)]
struct Asked;

#[derive(Debug)]
struct AskedDrafter {
    taps: TapSpec,
}

static TOLD: AtomicUsize = AtomicUsize::new(0);

impl Proposer for Asked {
    fn name(&self) -> &'static str {
        "asked"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none().drafts_trees();
        &NEEDS
    }

    fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(AskedDrafter { taps: TapSpec::default() }))
    }
}

impl Drafter for AskedDrafter {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        2
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        TOLD.store(context.tree.map_or(0, |tree| tree.candidates as usize), Ordering::Relaxed);
        Ok(Proposal::Host(context.sequences.iter().map(|_| Draft::default()).collect()))
    }

    fn commit(&mut self, _: &mut Outcome<'_>) -> Result<(), ProposerError> {
        Ok(())
    }
}

/// A drafter is asked for as many candidates as the tree can use.
#[test]
fn trees_have_the_candidates_they_need() {
    let source = tiny();
    let origin = Origin { crate_name: "stranger", version: "0.1.0" };
    let asked = polyattn_api::RegisteredProposer { origin, proposer: Arc::new(Asked) };
    let registry = Registry::global().unwrap().with_proposer(asked).unwrap();
    let top_k = StrategyConfig::new("top-k").with(serde_json::json!({"k": 20}));
    let paths = StrategyConfig::new("static").with(serde_json::json!({"paths": [[0, 30], [11]]}));
    let best = StrategyConfig::new("best-first");
    for (tree, nodes, candidates) in [(top_k, 8, 20), (paths, 8, 31), (best.clone(), 24, 24), (best, 100, 64)] {
        let mut options = options("asked", None, None);
        let speculative = options.speculative.as_mut().unwrap();
        (speculative.tree, speculative.tree_nodes) = (Some(tree.clone()), Some(nodes));
        let mut engine = Engine::load(&source, &Device::cpu(), &registry, &options, &mut |_| {}).unwrap();
        let _ = greedy(&mut engine, &[5, 9, 17], 4);
        assert_eq!(TOLD.load(Ordering::Relaxed), candidates, "{tree} of {nodes}");
    }
}
