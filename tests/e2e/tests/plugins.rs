//! An engine among plugins: several backends over one cache, and plugins that misbehave in the middle of a run.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKernel, AttentionProblem, BackendChoice, BackendEntry, BackendError,
    BackendName, BatchLayout, Capabilities, Commands, Device, Drafter, INTERFACE_VERSION, LoadContext, Origin, Outcome,
    Phase, Plan, Proposal, ProposeContext, Proposer, ProposerEntry, ProposerError, ProposerRequirements, Registry,
    TapSpec,
};
use polyattn_e2e::{assert_same_up_to_ties, devices, engine, greedy, margins, tests_folder};
use polyattn_engine::{Engine, EngineOptions, Request, Sampling, SpeculativeOptions};
use polyattn_nn::load::ModelSource;

const PROMPT: [u32; 12] = [5, 9, 17, 33, 5, 9, 17, 40, 41, 42, 5, 9];

fn tiny() -> ModelSource {
    ModelSource::open(&tests_folder("golden/tiny/qwen3")).unwrap()
}

fn origin() -> Origin {
    Origin { crate_name: "stranger", version: "0.1.0" }
}

#[test]
fn phases_run_on_backends_of_their_own_over_one_cache() {
    let source = tiny();
    for device in devices().into_iter().skip(1) {
        let speculative = || Some(SpeculativeOptions { method: "ngram".into(), ..SpeculativeOptions::default() });
        let one = EngineOptions::default().with_context(128).with_speculative(speculative());
        let mut several = one.clone();
        let require = |name| BackendChoice::from(BackendName::parse(name));
        several.attention.backend_per_phase =
            [(Phase::Prefill, "plain"), (Phase::Decode, "plain"), (Phase::Verify, "flash")]
                .map(|(phase, name)| (phase, require(name)))
                .into();
        let mut alone = engine(&source, &device, &one);
        let want = greedy(&mut alone, &PROMPT, 40);
        let margins = margins(&mut alone, &PROMPT, &want.tokens, source.config.vocab_size as usize);
        let got = greedy(&mut engine(&source, &device, &several), &PROMPT, 40);
        assert_same_up_to_ties(&got.tokens, &want.tokens, &margins, "plain and flash together");
        let ran = serde_json::to_value(&got.backends).unwrap();
        assert_eq!(ran["target"]["prefill"], "plain");
        assert_eq!(ran["target"]["verify"], "flash", "{ran}");
        assert!(got.calls["plain"] > 0 && got.calls["flash"] > 0);
    }
}

/// Whether the failing backend fails now.
static FAILS: AtomicBool = AtomicBool::new(false);

/// The CPU's backend, until it fails: it answers NaN, or panics.
#[derive(Debug)]
struct Failing {
    panics: bool,
}

#[derive(Debug)]
struct FailingKernel {
    inner: Arc<dyn AttentionKernel>,
    panics: bool,
}

impl AttentionBackend for Failing {
    fn name(&self) -> &'static str {
        "failing"
    }

    fn capabilities(&self) -> &Capabilities {
        polyattn::cpu::Cpu.capabilities()
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let inner = polyattn::cpu::Cpu.prepare(device, problem)?;
        Ok(Arc::new(FailingKernel { inner, panics: self.panics }))
    }
}

impl AttentionKernel for FailingKernel {
    fn problem(&self) -> &AttentionProblem {
        self.inner.problem()
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        self.inner.plan(batch)
    }

    fn encode(&self, commands: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        self.inner.encode(commands, plan, io)?;
        if FAILS.load(Ordering::Relaxed) {
            assert!(!self.panics, "the kernel is tired");
            io.out.buffer().write::<f32>()?.fill(f32::NAN);
        }
        Ok(())
    }
}

#[test]
fn a_backend_that_fails_is_named_and_the_engine_goes_on() {
    let source = tiny();
    for panics in [false, true] {
        let make: fn() -> Arc<dyn AttentionBackend> =
            if panics { || Arc::new(Failing { panics: true }) } else { || Arc::new(Failing { panics: false }) };
        let entry = BackendEntry { origin: origin(), interface: INTERFACE_VERSION, priority: 1, make };
        let registry = Registry::builder().backend(entry).build().unwrap();
        let options = EngineOptions::default().with_context(64);
        let mut engine = Engine::load(&source, &Device::cpu(), &registry, &options, &mut |_| {}).unwrap();
        for sampling in [Sampling::default(), Sampling { temperature: 0.7, seed: 3, ..Sampling::default() }] {
            let mut request = Request::new(PROMPT.to_vec(), 20);
            (request.stop, request.sampling) = (Some(Vec::new()), sampling);
            FAILS.store(true, Ordering::Relaxed);
            let error = engine.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
            if panics {
                assert!(
                    error.starts_with("attention backend 'failing' is at fault: it panicked in encode: "),
                    "{error}"
                );
            } else {
                let wanted = "logits at position 11 are not finite; its attention is served by prefill 'failing', ";
                assert!(error.contains(wanted), "{error}");
            }
            FAILS.store(false, Ordering::Relaxed);
            let tokens = engine.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap().tokens;
            assert_eq!(tokens.len(), 20, "the engine goes on");
        }
    }
}

/// Drafts the last token again, and panics at its third call.
#[derive(Debug)]
struct Tired;

#[derive(Debug, Default)]
struct TiredDrafter {
    calls: u32,
    taps: TapSpec,
}

impl Proposer for Tired {
    fn name(&self) -> &'static str {
        "tired"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none();
        &NEEDS
    }

    fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Ok(Box::new(TiredDrafter::default()))
    }
}

impl Drafter for TiredDrafter {
    fn taps(&self) -> &TapSpec {
        &self.taps
    }

    fn max_tokens(&self) -> u32 {
        2
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        self.calls += 1;
        assert!(self.calls < 3, "no ideas left");
        Ok(Proposal::Host(
            context.sequences.iter().map(|one| Vec::from_iter(one.tokens.last().copied()).into()).collect(),
        ))
    }

    fn commit(&mut self, _: &mut Outcome<'_>) -> Result<(), ProposerError> {
        Ok(())
    }
}

#[test]
fn a_drafter_that_panics_costs_the_draft_alone() {
    let source = tiny();
    let registry = Registry::builder()
        .backend(polyattn_api::BackendEntry {
            origin: origin(),
            interface: INTERFACE_VERSION,
            priority: 1,
            make: || Arc::new(polyattn::cpu::Cpu),
        })
        .proposer(ProposerEntry { origin: origin(), interface: INTERFACE_VERSION, make: || Arc::new(Tired) })
        .build()
        .unwrap();
    let device = Device::cpu();
    let options = EngineOptions::default().with_context(64);
    let want = greedy(&mut engine(&source, &device, &options), &PROMPT, 20).tokens;
    let speculative = SpeculativeOptions { method: "tired".into(), ..SpeculativeOptions::default() };
    let options = options.with_speculative(Some(speculative));
    let mut drafted = Engine::load(&source, &device, &registry, &options, &mut |_| {}).unwrap();
    let got = greedy(&mut drafted, &PROMPT, 20);
    assert_eq!(got.tokens, want);
    assert_eq!(got.acceptance.unwrap().drafted_steps, 2, "two drafts before the third failed");
}
