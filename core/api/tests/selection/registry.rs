//! Names, duplicates and order.

use std::sync::Arc;

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionProblem, BackendEntry, BackendError, Capabilities, Device, Drafter,
    INTERFACE_VERSION, LoadContext, Origin, Proposer, ProposerEntry, ProposerError, ProposerRequirements, Registry,
    RegistryError, backend_entry, proposer_entry,
};

use crate::mocks::{Block, Causal, Chain, Lookup, Reference, Wide, registry};

/// A backend called whatever a test wants.
#[derive(Debug)]
struct Called(&'static str);

impl AttentionBackend for Called {
    fn name(&self) -> &'static str {
        self.0
    }

    fn capabilities(&self) -> &Capabilities {
        const NONE: Capabilities = Capabilities::none(polyattn_api::DeviceNeed::Any);
        &NONE
    }

    fn prepare(&self, _: &Device, _: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        Err(BackendError::Declined(Vec::new()))
    }
}

impl Proposer for Called {
    fn name(&self) -> &'static str {
        self.0
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NONE: ProposerRequirements = ProposerRequirements::none();
        &NONE
    }

    fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Err(ProposerError::Unsupported(String::new()))
    }
}

const fn origin(crate_name: &'static str, version: &'static str) -> Origin {
    Origin { crate_name, version }
}

#[test]
fn backends_come_by_falling_priority_then_name() {
    let names: Vec<_> = registry().backends().iter().map(|entry| entry.name()).collect();
    assert_eq!(names, ["latent", "causal", "wide", "reference", "cpu-causal"]);
    let names: Vec<_> = registry().proposers().iter().map(|entry| entry.proposer.name()).collect();
    assert_eq!(names, ["block", "chain", "forgetful", "lookup", "mixed"]);

    let tied = Registry::builder()
        .backend(backend_entry!(Wide, priority = 0))
        .backend(backend_entry!(Reference, priority = 0))
        .backend(backend_entry!(Causal, priority = 0))
        .build()
        .expect("the names differ");
    let names: Vec<_> = tied.backends().iter().map(|entry| entry.name()).collect();
    assert_eq!(names, ["causal", "reference", "wide"], "not the order of registration");
}

#[test]
fn an_entry_knows_its_crate() {
    let causal = registry().backend("causal").expect("registered");
    assert_eq!(causal.origin.crate_name, env!("CARGO_PKG_NAME"));
    assert_eq!(causal.origin.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(causal.priority, 30);
}

#[test]
fn duplicates_are_named_with_both_origins() {
    let entry =
        |origin| BackendEntry { origin, interface: INTERFACE_VERSION, priority: 0, make: || Arc::new(Called("twin")) };
    let (first, second) = (origin("abacus", "1.2.3"), origin("zebra", "0.9.0"));
    for (a, b) in [(first, second), (second, first)] {
        let error = Registry::builder().backend(entry(a)).backend(entry(b)).build().expect_err("refused");
        assert_eq!(error, RegistryError::Duplicate { kind: "attention backend", name: "twin".into(), first, second });
        assert_eq!(
            error.to_string(),
            "two attention backends are called 'twin': one of crate abacus 1.2.3, one of crate zebra 0.9.0",
            "whatever the order the linker chose"
        );
    }

    let entry = |origin| ProposerEntry { origin, interface: INTERFACE_VERSION, make: || Arc::new(Called("twin")) };
    let error = Registry::builder().proposer(entry(second)).proposer(entry(first)).build().expect_err("refused");
    assert_eq!(
        error.to_string(),
        "two proposers are called 'twin': one of crate abacus 1.2.3, one of crate zebra 0.9.0"
    );
    // A backend and a proposer of one name do not get in each other's way.
    let both = Registry::builder()
        .backend(BackendEntry {
            origin: first,
            interface: INTERFACE_VERSION,
            priority: 0,
            make: || Arc::new(Called("twin")),
        })
        .proposer(entry(second));
    assert!(both.build().is_ok());
}

#[test]
fn names_that_cannot_be_selected_are_refused() {
    fn backend(make: fn() -> Arc<dyn AttentionBackend>) -> Result<Registry, RegistryError> {
        Registry::builder()
            .backend(BackendEntry { origin: origin("odd", "0.1.0"), interface: INTERFACE_VERSION, priority: 0, make })
            .build()
    }
    let refused = |made: Result<Registry, RegistryError>| made.expect_err("refused").to_string();
    assert!(refused(backend(|| Arc::new(Called("")))).contains("crate odd 0.1.0"));
    assert!(refused(backend(|| Arc::new(Called("")))).contains("must not be empty"));
    for make in [
        (|| Arc::new(Called("auto"))) as fn() -> Arc<dyn AttentionBackend>,
        || Arc::new(Called("none")),
        || Arc::new(Called("all")),
    ] {
        assert!(refused(backend(make)).contains("reserved"));
    }
    for make in [
        (|| Arc::new(Called("Flash"))) as fn() -> Arc<dyn AttentionBackend>,
        || Arc::new(Called("AUTO")),
        || Arc::new(Called("two words")),
        || Arc::new(Called(" flash")),
        || Arc::new(Called("flásh")),
        || Arc::new(Called("a/b")),
    ] {
        assert!(refused(backend(make)).contains("lower-case letters, digits"));
    }
    assert!(backend(|| Arc::new(Called("flash-2_b"))).is_ok());
    let error = Registry::builder()
        .proposer(ProposerEntry {
            origin: origin("odd", "0.1.0"),
            interface: INTERFACE_VERSION,
            make: || Arc::new(Called("none")),
        })
        .build()
        .expect_err("refused");
    assert!(error.to_string().contains("proposer called 'none'"), "{error}");
}

#[test]
fn plugins_can_be_added_at_run_time() {
    let registry = Registry::builder().backend(backend_entry!(Causal, priority = 5)).build().expect("one name");
    let held = registry.backends();
    registry.register_backend(backend_entry!(Wide, priority = 9)).expect("a new name");
    registry.register_proposer(proposer_entry!(Lookup)).expect("a new name");
    registry.register_proposer(proposer_entry!(Block)).expect("a new name");
    registry.register_proposer(proposer_entry!(Chain)).expect("a new name");
    let names: Vec<_> = registry.backends().iter().map(|entry| entry.name()).collect();
    assert_eq!(names, ["wide", "causal"]);
    assert_eq!(registry.proposer_names(), "block, chain, lookup");
    assert_eq!(held.len(), 1, "a list that was handed out does not change");
    assert!(matches!(
        registry.register_backend(backend_entry!(Wide, priority = 1)),
        Err(RegistryError::Duplicate { .. })
    ));
    assert_eq!(registry.backends().len(), 2, "what is refused leaves no trace");
}

#[test]
fn an_empty_registry_tells_the_fix() {
    // Nothing in this test program registers itself, so the global registry is empty.
    let error = Registry::global().expect_err("nothing is registered").to_string();
    assert!(error.contains("no attention backend is registered"), "{error}");
    assert!(error.contains("use polyattn_cpu as _;"), "{error}");
    let none = Registry::builder().build().expect("by hand it may be empty");
    assert_eq!(none.backend_names(), "none");
    assert_eq!(none.proposer_names(), "none");
}

/// Two majors of this crate in one program would have two registries. Cargo refuses to build them by the `links` key.
#[test]
fn a_second_copy_of_the_interface_cannot_be_linked() {
    assert!(include_str!("../../Cargo.toml").contains("\nlinks = \"polyattn-api\"\n"));
}
