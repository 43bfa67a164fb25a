//! Plugins that misbehave: contained and named.

use std::{collections::BTreeMap, sync::Arc};

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKernel, AttentionKind, AttentionProblem, BackendEntry, BackendError,
    BatchLayout, Capabilities, Commands, DType, Decline, Device, DeviceFacts, Drafter, INTERFACE_VERSION, LoadContext,
    Origin, Plan, PlanPool, Policy, Proposer, ProposerEntry, ProposerError, ProposerRequirements, RegisteredProposer,
    Registry, Resolver, backend_entry, resolve, select,
};

use crate::mocks::{Causal, CpuCausal, Reference, Wide, big_gpu, engine, layer, registry};

/// What a faulty backend does.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Fault {
    #[default]
    None,
    PanicsInCapabilities,
    PanicsInDeclines,
    PanicsInPrepare,
    RefusesWhatItAdmits,
    PreparesAnother,
    PanicsInPlan,
    PlansAnother,
    PanicsInEncode,
    AnswersAsAnother,
}

/// A backend that does what the test says. Capabilities are those of a CPU backend that serves everything.
#[derive(Debug)]
struct Faulty(Fault);

impl AttentionBackend for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn capabilities(&self) -> &Capabilities {
        assert_ne!(self.0, Fault::PanicsInCapabilities, "nobody knows");
        AttentionBackend::capabilities(&Reference)
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        assert_ne!(self.0, Fault::PanicsInDeclines, "seven is no dimension");
        self.capabilities().declines(problem, device)
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        assert_ne!(self.0, Fault::PanicsInPrepare, "no kernel today");
        let mut problem = problem.clone();
        match self.0 {
            Fault::RefusesWhatItAdmits => return Err(BackendError::Declined(vec![Decline::Sinks])),
            Fault::PreparesAnother => problem.scale *= 2.0,
            _ => {}
        }
        Ok(Arc::new(FaultyKernel { fault: self.0, device: device.clone(), problem, pool: PlanPool::default() }))
    }

    fn configured(&self, config: &serde_json::Value) -> Result<Arc<dyn AttentionBackend>, String> {
        match self.0 {
            Fault::AnswersAsAnother => Ok(Arc::new(Wide)),
            Fault::PanicsInPrepare => panic!("no settings today"),
            _ if config["fault"] == "capabilities" => Ok(Arc::new(Self(Fault::PanicsInCapabilities))),
            _ if config["fault"] == "none" => Ok(Arc::new(Self(Fault::None))),
            _ => Err(format!("fault: {} is unknown, there is: none", config["fault"])),
        }
    }
}

#[derive(Debug)]
struct FaultyKernel {
    fault: Fault,
    device: Device,
    problem: AttentionProblem,
    pool: PlanPool,
}

impl AttentionKernel for FaultyKernel {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        assert_ne!(self.fault, Fault::PanicsInPlan, "no plan today");
        let mut batch = batch.clone();
        if self.fault == Fault::PlansAnother {
            batch.push(0, 0, &[]);
        }
        Plan::new(&self.device, &self.pool, &self.problem, &batch, Vec::new())
    }

    fn encode(&self, _: &mut Commands, _: &Plan, _: &AttentionIo<'_>) -> Result<(), BackendError> {
        assert_ne!(self.fault, Fault::PanicsInEncode, "no words today");
        Ok(())
    }
}

fn with(fault: Fault) -> Registry {
    Registry::builder()
        .backend(backend_entry!(CpuCausal, priority = 1))
        .backend(entry(fault))
        .build()
        .expect("two names")
}

fn entry(fault: Fault) -> BackendEntry {
    let make: fn() -> Arc<dyn AttentionBackend> = match fault {
        Fault::None => || Arc::new(Faulty(Fault::None)),
        Fault::PanicsInCapabilities => || Arc::new(Faulty(Fault::PanicsInCapabilities)),
        Fault::PanicsInDeclines => || Arc::new(Faulty(Fault::PanicsInDeclines)),
        Fault::PanicsInPrepare => || Arc::new(Faulty(Fault::PanicsInPrepare)),
        Fault::RefusesWhatItAdmits => || Arc::new(Faulty(Fault::RefusesWhatItAdmits)),
        Fault::PreparesAnother => || Arc::new(Faulty(Fault::PreparesAnother)),
        Fault::PanicsInPlan => || Arc::new(Faulty(Fault::PanicsInPlan)),
        Fault::PlansAnother => || Arc::new(Faulty(Fault::PlansAnother)),
        Fault::PanicsInEncode => || Arc::new(Faulty(Fault::PanicsInEncode)),
        Fault::AnswersAsAnother => || Arc::new(Faulty(Fault::AnswersAsAnother)),
    };
    let origin = Origin { crate_name: "stranger", version: "0.3.0" };
    BackendEntry { origin, interface: INTERFACE_VERSION, priority: 9, make }
}

fn problem() -> AttentionProblem {
    let kind = AttentionKind::Gqa { query_heads: 2, kv_heads: 1, head_dim: 8, value_dim: 8 };
    AttentionProblem::new(kind, DType::F32).layer("full").page_size(4)
}

fn batch() -> BatchLayout {
    let mut batch = BatchLayout::new(4, 2);
    batch.push(1, 3, &[1]);
    batch
}

/// What comes of a backend with this fault, up to its first encoding.
fn run(fault: Fault) -> Result<(), BackendError> {
    let device = Device::cpu();
    let entry = with(fault).backend("faulty").expect("registered");
    let kernel = entry.prepare(&device, &problem())?;
    let plan = kernel.plan(&batch())?;
    let buffer = device.alloc(1024, "all")?;
    let mut commands = device.commands()?;
    kernel.encode(&mut commands, &plan, &AttentionIo::new(&buffer, &buffer, &buffer, &buffer))
}

#[test]
fn a_panic_in_declines_is_a_reason() {
    let selection = select(&problem(), &DeviceFacts::cpu(), &with(Fault::PanicsInDeclines), &Policy::Auto);
    let selection = selection.expect("the other serves");
    assert_eq!(selection.backend.name(), "cpu-causal");
    let reasons: Vec<_> = selection.declined[0].reasons.iter().map(ToString::to_string).collect();
    assert_eq!(reasons.len(), 1);
    assert!(reasons[0].starts_with("panicked when asked: ") && reasons[0].contains("seven is no dimension"));
}

#[test]
fn faults_carry_the_backends_name() {
    run(Fault::None).expect("nothing is wrong");
    for (fault, what) in [
        (Fault::PanicsInPrepare, "it panicked in prepare: "),
        (Fault::RefusesWhatItAdmits, "it declined nothing, then refused: cannot serve the problem: attention sinks"),
        (Fault::PreparesAnother, "it prepared another problem than it was given"),
        (Fault::PanicsInPlan, "it panicked in plan: "),
        (Fault::PlansAnother, "its plan is of 2 sequences and 1 rows, the batch has 1 and 1"),
        (Fault::PanicsInEncode, "it panicked in encode: "),
    ] {
        let error = run(fault).expect_err("a fault").to_string();
        assert!(error.starts_with(&format!("attention backend 'faulty' is at fault: {what}")), "{fault:?}: {error}");
    }
}

#[test]
fn a_declined_problem_is_not_prepared() {
    let entry = with(Fault::PanicsInPrepare).backend("cpu-causal").expect("registered");
    let error = entry.prepare(&Device::cpu(), &problem().mask(polyattn_api::Mask::Tree)).expect_err("declined");
    assert_eq!(error, BackendError::Declined(vec![Decline::Tree]));
}

#[test]
fn another_version_of_the_interface_is_refused() {
    let old = BackendEntry { interface: INTERFACE_VERSION + 1, ..entry(Fault::None) };
    let error = Registry::builder().backend(old).build().expect_err("another version").to_string();
    assert_eq!(
        error,
        format!(
            "crate stranger 0.3.0 registers its attention backend for version {} of the plugin interface, this program \
             has version {INTERFACE_VERSION}: build both against one version of polyattn-api",
            INTERFACE_VERSION + 1
        )
    );
}

#[test]
fn a_plugin_that_panics_when_made_is_named() {
    let origin = Origin { crate_name: "stranger", version: "0.3.0" };
    let made =
        |make| Registry::builder().proposer(ProposerEntry { origin, interface: INTERFACE_VERSION, make }).build();
    let error = made(|| panic!("out of paper")).expect_err("it panics").to_string();
    assert_eq!(error, "crate stranger 0.3.0 registers a proposer that panics when it is made: out of paper");
}

#[test]
fn a_backend_that_panics_about_what_it_can_do_is_not_registered() {
    let refused = |error: String| {
        let wanted = "crate stranger 0.3.0 registers a attention backend that panics when it is asked about itself: ";
        assert!(error.starts_with(wanted) && error.contains("nobody knows"), "{error}");
    };
    let built = Registry::builder().backend(entry(Fault::PanicsInCapabilities)).build();
    refused(built.expect_err("it panics").to_string());
    let registry = registry();
    let before = registry.backend_names();
    refused(registry.register_backend(entry(Fault::PanicsInCapabilities)).expect_err("it panics").to_string());
    assert_eq!(registry.backend_names(), before);

    let mut config = engine(vec![layer("full")]);
    config.backend_config = BTreeMap::from([("faulty".to_owned(), serde_json::json!({ "fault": "capabilities" }))]);
    let error = resolve(&config, &DeviceFacts::cpu(), &with(Fault::None)).expect_err("it panics").to_string();
    assert!(error.starts_with("backend_config.faulty: the backend panicked: "), "{error}");
}

/// A proposer that does not know what it needs.
#[derive(Debug)]
struct Clueless;

impl Proposer for Clueless {
    fn name(&self) -> &'static str {
        "clueless"
    }

    fn requirements(&self) -> &ProposerRequirements {
        panic!("no clue")
    }

    fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Err(ProposerError::Unsupported("it has no clue".into()))
    }
}

#[test]
fn a_proposer_that_panics_about_what_it_needs_is_not_registered() {
    let origin = Origin { crate_name: "stranger", version: "0.3.0" };
    let entry = ProposerEntry { origin, interface: INTERFACE_VERSION, make: || Arc::new(Clueless) };
    let wanted = "crate stranger 0.3.0 registers a proposer that panics when it is asked about itself: no clue";
    assert_eq!(Registry::builder().proposer(entry).build().expect_err("it panics").to_string(), wanted);
    let clueless = RegisteredProposer { origin, proposer: Arc::new(Clueless) };
    assert_eq!(registry().with_proposer(clueless).expect_err("it panics").to_string(), wanted);
}

#[test]
fn a_configuration_is_read_by_its_backend() {
    let configured = |fault, name: &str, value| {
        let mut config = engine(vec![layer("full")]);
        config.backend_config = BTreeMap::from([(name.to_owned(), value)]);
        resolve(&config, &DeviceFacts::cpu(), &with(fault)).map_err(|error| error.to_string())
    };
    let good = serde_json::json!({ "fault": "none" });
    let resolution = configured(Fault::PanicsInDeclines, "Faulty", good.clone()).expect("it panics no more");
    assert_eq!(resolution.target[0].backend.name(), "faulty");
    let error = |fault, name, value| configured(fault, name, value).expect_err("refused");
    assert_eq!(
        error(Fault::None, "faulty", serde_json::json!({ "fault": "all" })),
        "backend_config.faulty: fault: \"all\" is unknown, there is: none"
    );
    assert_eq!(
        error(Fault::None, "cpu-causal", good.clone()),
        "backend_config.cpu-causal: {\"fault\":\"none\"} is given, but backend 'cpu-causal' takes no configuration"
    );
    assert_eq!(
        error(Fault::None, "fast", good.clone()),
        "backend_config.fast: unknown attention backend 'fast'; registered are: cpu-causal, faulty"
    );
    assert_eq!(
        error(Fault::AnswersAsAnother, "faulty", good.clone()),
        "backend_config.faulty: the backend answers with another one, 'wide'"
    );
    assert_eq!(
        error(Fault::PanicsInPrepare, "faulty", good),
        "backend_config.faulty: the backend panicked: no settings today"
    );
}

#[test]
fn answers_are_remembered_by_the_whole_configuration() {
    let registry = registry();
    let resolver = Resolver::new(&registry, big_gpu());
    let mut config = engine(vec![layer("full")]);
    let first = resolver.resolve(&config).expect("served");
    assert!(Arc::ptr_eq(&first, &resolver.resolve(&config).expect("served")));
    config.attention.use_non_causal = true;
    let second = resolver.resolve(&config).expect("served");
    assert_eq!((first.target[0].backend.name(), second.target[0].backend.name()), ("causal", "wide"));
    config.attention.use_non_causal = false;
    assert!(Arc::ptr_eq(&first, &resolver.resolve(&config).expect("served")));
    registry.register_backend(entry(Fault::PanicsInDeclines)).expect("a new name");
    let third = resolver.resolve(&config).expect("served");
    assert!(!Arc::ptr_eq(&first, &third), "somebody else may serve now");
    assert!(third.target[0].declined.iter().any(|one| one.backend == "faulty"));
    for pages in 1..40 {
        config.kv_cache.page_size = Some(pages);
        resolver.resolve(&config).expect("served");
    }
}

#[test]
fn what_would_let_a_declined_backend_in_lets_it_in() {
    let registry = registry();
    let remedy = |name: &str, problem: &AttentionProblem, device: &DeviceFacts| {
        let entry = registry.backend(name).expect("registered");
        entry.remedy(&entry.declines(problem, device))
    };
    let kind = |head_dim| AttentionKind::Gqa { query_heads: 2, kv_heads: 1, head_dim, value_dim: head_dim };
    let base = AttentionProblem::new(kind(128), DType::F16);
    let gpu = big_gpu();
    let said = |name, problem: &AttentionProblem| remedy(name, problem, &gpu);
    assert_eq!(said("wide", &base.clone().page_size(24)).as_deref(), Some("kv_cache.page_size 16"));
    assert!(Wide.declines(&base.clone().page_size(16), &gpu).is_empty());
    assert_eq!(said("causal", &AttentionProblem::new(kind(100), DType::F16)).as_deref(), Some("head_dim 96"));
    assert_eq!(said("causal", &AttentionProblem::new(kind(1000), DType::F16)).as_deref(), Some("head_dim 256"));
    assert!(Causal.declines(&AttentionProblem::new(kind(96), DType::F16), &gpu).is_empty());
    let open = base.clone().mask(polyattn_api::Mask::Bidirectional);
    assert_eq!(said("causal", &open).as_deref(), Some("causal attention"));
    assert_eq!(said("reference", &base).as_deref(), Some("--device cpu"));
    assert_eq!(said("causal", &open.page_size(24).mask(polyattn_api::Mask::Causal)), None, "nothing is declined");
    let two = AttentionProblem::new(kind(100), DType::F16).mask(polyattn_api::Mask::Bidirectional);
    assert_eq!(said("causal", &two), None, "one change is not enough");
}
