//! Every proposer × every backend that admits it × chains and trees × each device × one request and four unequal ones:
//! greedy tokens are those of plain decoding. The report names what ran and why the rest was declined.
//!
//! A proposer joins by registration; one that needs a checkpoint has a line in [`polyattn_e2e::TINY_DRAFTERS`].

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use polyattn_api::{BackendName, Phase, Registry, StrategyConfig};
use polyattn_device::Device;
use polyattn_e2e::{
    Drafted, Margin, TINY_DRAFTERS, assert_same_up_to_ties, devices, engine, greedy, margins, tests_folder,
};
use polyattn_engine::{Engine, EngineOptions, Happened, Request, SpeculativeOptions};
use polyattn_nn::load::ModelSource;

const TOKENS: usize = 16;

fn prompts() -> [Vec<u32>; 4] {
    [
        vec![5, 9, 17, 33, 5, 9, 17, 40, 41, 42, 5, 9, 17, 33, 70, 5, 9, 17],
        vec![7],
        (0..35).map(|place| 11 + place * place % 23).collect(),
        vec![3, 4, 3, 4, 3, 4, 3],
    ]
}

/// Tokens of each request, all run at once.
fn run(engine: &mut Engine, prompts: &[Vec<u32>]) -> Result<Vec<(Vec<u32>, u64)>, String> {
    let mut ids = Vec::new();
    for prompt in prompts {
        let mut request = Request::new(prompt.clone(), TOKENS);
        request.stop = Some(Vec::new());
        ids.push(engine.add_request(request).map_err(|error| error.to_string())?);
    }
    let mut done = vec![(Vec::new(), 0); ids.len()];
    while !engine.is_idle() {
        for event in engine.step() {
            let place = ids.iter().position(|id| *id == event.request).unwrap();
            match event.what {
                Happened::Finished(generation) => {
                    assert!(!generation.drafter_lost, "the drafter was lost");
                    let drafted = generation.acceptance.as_ref().map_or(0, |acceptance| acceptance.drafted);
                    done[place] = (generation.tokens, drafted);
                }
                Happened::Failed(error) => return Err(error.to_string()),
                _ => {}
            }
        }
    }
    Ok(done)
}

/// Who is asked for by name: one backend for the target, or for the draft.
#[derive(Clone, Copy)]
enum Asked {
    Target,
    Draft,
}

struct Report {
    ran: usize,
    declined: usize,
}

impl Report {
    #[expect(clippy::too_many_arguments, reason = "the matrix has as many dimensions")]
    fn check(
        &mut self,
        device: &Device,
        source: &ModelSource,
        proposer: &str,
        checkpoint: Option<&std::path::Path>,
        backend: &str,
        asked: Asked,
        tree: bool,
        want: &[(Vec<u32>, Vec<Margin>)],
    ) -> bool {
        let name = BackendName::parse(backend);
        let mut speculative = SpeculativeOptions {
            method: proposer.into(),
            model: checkpoint.map(Into::into),
            tree: tree.then(|| StrategyConfig::new("top-k")),
            tree_nodes: tree.then_some(10),
            ..SpeculativeOptions::default()
        };
        let role = match asked {
            Asked::Target => "target",
            Asked::Draft => "draft",
        };
        if matches!(asked, Asked::Draft) {
            speculative.attention_backend = name.clone();
        }
        let mut options =
            EngineOptions::default().with_context(64).with_sequences(4).with_speculative(Some(speculative));
        if matches!(asked, Asked::Target) {
            // Who serves prompts is another matter: split-KV attention does not.
            let phases = [Phase::Decode, Phase::Verify];
            options.attention.backend_per_phase = phases.map(|phase| (phase, name.clone().into())).into();
        }
        let shape = if tree { "tree" } else { "chain" };
        let what = format!("{proposer}, {role} on {backend}, {shape}, {}", device.facts().name);
        let mut engine = match Engine::load(source, device, Registry::global().unwrap(), &options, &mut |_| {}) {
            Ok(engine) => engine,
            Err(error) => {
                let text = error.to_string();
                // Whatever is declined is declined with its reason, never for another fault.
                assert!(text.contains("cannot serve") || text.contains("no KV layout suits"), "{what}: {text}");
                eprintln!("declined  {what}: {text}");
                self.declined += 1;
                return false;
            }
        };
        for batch in [1, want.len()] {
            let got = run(&mut engine, &prompts()[..batch]).unwrap_or_else(|error| panic!("{what} × {batch}: {error}"));
            let mut compared = 0;
            for ((got, _), (want, margins)) in got.iter().zip(want) {
                compared += assert_same_up_to_ties(got, want, margins, &format!("{what} × {batch}"));
            }
            let (least, all) = (if device.is_cpu() { 1.0 } else { 0.75 }, batch * TOKENS);
            assert!(compared as f64 >= least * all as f64, "{what} × {batch}: {compared} of {all} tokens are the same");
            let drafted: u64 = got.iter().map(|(_, drafted)| drafted).sum();
            assert!(drafted > 0 || batch == 1, "{what}: nothing was drafted");
            eprintln!("ran       {what} × {batch}: {drafted} tokens drafted");
            self.ran += 1;
        }
        true
    }
}

#[test]
fn every_proposer_on_every_backend() {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::global().unwrap();
    let mut report = Report { ran: 0, declined: 0 };
    for device in devices() {
        for entry in registry.proposers().iter() {
            let proposer = entry.proposer.name();
            let needs = entry.proposer.requirements();
            let path = folder.path().join(proposer);
            std::fs::create_dir_all(&path).unwrap();
            let maker = TINY_DRAFTERS.iter().find(|(name, _)| *name == proposer);
            let Drafted { target, checkpoint } = match maker {
                Some((_, make)) => make(&tests_folder("golden/tiny/qwen3"), &path).unwrap(),
                None if needs.checkpoint => {
                    panic!("proposer '{proposer}' needs a checkpoint: give it a line in TINY_DRAFTERS")
                }
                None => Drafted::default(),
            };
            let target = target.unwrap_or_else(|| tests_folder("golden/tiny/qwen3"));
            let source = ModelSource::open(&target).unwrap();
            let mut plain = engine(&source, &device, &EngineOptions::default().with_context(64));
            let want: Vec<(Vec<u32>, Vec<Margin>)> = prompts()
                .iter()
                .map(|prompt| {
                    let tokens = greedy(&mut plain, prompt, TOKENS).tokens;
                    let margins = margins(&mut plain, prompt, &tokens, source.config.vocab_size as usize);
                    (tokens, margins)
                })
                .collect();
            let mut admitted = 0;
            for backend in registry.backends().iter() {
                for tree in [false, true] {
                    let roles: &[Asked] =
                        if needs.draft_attention { &[Asked::Target, Asked::Draft] } else { &[Asked::Target] };
                    for asked in roles {
                        let checkpoint = checkpoint.as_deref();
                        let name = backend.name();
                        let ran = report.check(&device, &source, proposer, checkpoint, name, *asked, tree, &want);
                        admitted += usize::from(ran);
                    }
                }
            }
            assert!(admitted > 0, "no backend admits {proposer} on {}", device.facts().name);
        }
    }
    eprintln!("{} combinations ran, {} were declined", report.ran, report.declined);
    assert!(report.ran >= 8 && report.declined > 0);
}
