use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, OnceLock},
};

use parking_lot::RwLock;
use serde::Serialize;

use crate::{
    AcceptanceRule, AttentionBackend, ConfigError, LengthPolicy, MoeBackend, Proposer, SelectionError, StrategyConfig,
    StrategyEntry, TreeBuilder, acceptance::ACCEPTANCE_RULES, guard::contained, length::LENGTH_POLICIES,
    tree::TREE_BUILDERS,
};

/// Where a plugin comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Origin {
    /// The crate's name.
    #[serde(rename = "crate")]
    pub crate_name: &'static str,
    /// The crate's version.
    pub version: &'static str,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.crate_name, self.version)
    }
}

/// The version of the interface between plugins and this crate. Within one major version of the crate it rises when a
/// plugin that was built for an older one could misbehave; two major versions in one program are refused by Cargo, since
/// this crate declares `links`.
pub const INTERFACE_VERSION: u32 = 2;

/// What [`register_backend!`](crate::register_backend) submits: const data and a constructor. Made by
/// [`backend_entry!`](crate::backend_entry).
#[derive(Clone, Copy, Debug)]
pub struct BackendEntry {
    /// Where it comes from.
    pub origin: Origin,
    /// The [`INTERFACE_VERSION`] it was built for.
    pub interface: u32,
    /// Automatic selection takes the highest first.
    pub priority: i32,
    /// Makes the descriptor.
    pub make: fn() -> Arc<dyn AttentionBackend>,
}

/// What [`register_proposer!`](crate::register_proposer) submits. Made by [`proposer_entry!`](crate::proposer_entry).
#[derive(Clone, Copy, Debug)]
pub struct ProposerEntry {
    /// Where it comes from.
    pub origin: Origin,
    /// The [`INTERFACE_VERSION`] it was built for.
    pub interface: u32,
    /// Makes the descriptor.
    pub make: fn() -> Arc<dyn Proposer>,
}

/// What [`register_moe_backend!`](crate::register_moe_backend) submits. Made by
/// [`moe_backend_entry!`](crate::moe_backend_entry).
#[derive(Clone, Copy, Debug)]
pub struct MoeBackendEntry {
    /// Where it comes from.
    pub origin: Origin,
    /// The [`INTERFACE_VERSION`] it was built for.
    pub interface: u32,
    /// Automatic selection takes the highest first.
    pub priority: i32,
    /// Makes the descriptor.
    pub make: fn() -> Arc<dyn MoeBackend>,
}

inventory::collect!(BackendEntry);
inventory::collect!(MoeBackendEntry);
inventory::collect!(ProposerEntry);
inventory::collect!(StrategyEntry<dyn TreeBuilder>);
inventory::collect!(StrategyEntry<dyn AcceptanceRule>);
inventory::collect!(StrategyEntry<dyn LengthPolicy>);

/// Makes the [`BackendEntry`] of a type with `Default`, without registering it: for [`RegistryBuilder::backend`].
#[macro_export]
macro_rules! backend_entry {
    ($backend:ty, priority = $priority:expr) => {
        $crate::BackendEntry {
            origin: $crate::Origin { crate_name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") },
            interface: $crate::INTERFACE_VERSION,
            priority: $priority,
            make: || ::std::sync::Arc::new(<$backend as ::std::default::Default>::default()),
        }
    };
}

/// Registers an attention backend, a type with `Default`: `register_backend!(Flash, priority = 50);`
///
/// The crate must be named where the program is built (`use my_backend as _;`), or nothing is registered.
#[macro_export]
macro_rules! register_backend {
    ($backend:ty, priority = $priority:expr) => {
        $crate::macros::inventory::submit! { $crate::backend_entry!($backend, priority = $priority) }
    };
}

/// Makes the [`MoeBackendEntry`] of a type with `Default`, without registering it: for [`RegistryBuilder::moe_backend`].
#[macro_export]
macro_rules! moe_backend_entry {
    ($backend:ty, priority = $priority:expr) => {
        $crate::MoeBackendEntry {
            origin: $crate::Origin { crate_name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") },
            interface: $crate::INTERFACE_VERSION,
            priority: $priority,
            make: || ::std::sync::Arc::new(<$backend as ::std::default::Default>::default()),
        }
    };
}

/// Registers a backend for mixtures of experts, a type with `Default`: `register_moe_backend!(Grouped, priority = 50);`
///
/// The crate must be named where the program is built (`use my_backend as _;`), or nothing is registered.
#[macro_export]
macro_rules! register_moe_backend {
    ($backend:ty, priority = $priority:expr) => {
        $crate::macros::inventory::submit! { $crate::moe_backend_entry!($backend, priority = $priority) }
    };
}

/// Makes the [`ProposerEntry`] of a type with `Default`, without registering it: for [`RegistryBuilder::proposer`].
#[macro_export]
macro_rules! proposer_entry {
    ($proposer:ty) => {
        $crate::ProposerEntry {
            origin: $crate::Origin { crate_name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") },
            interface: $crate::INTERFACE_VERSION,
            make: || ::std::sync::Arc::new(<$proposer as ::std::default::Default>::default()),
        }
    };
}

/// Registers a proposer, a type with `Default`: `register_proposer!(DFlash);`
///
/// The crate must be named where the program is built (`use my_proposer as _;`), or nothing is registered.
#[macro_export]
macro_rules! register_proposer {
    ($proposer:ty) => {
        $crate::macros::inventory::submit! { $crate::proposer_entry!($proposer) }
    };
}

/// Makes the [`StrategyEntry`] of a strategy, without registering it.
#[macro_export]
macro_rules! strategy_entry {
    ($name:expr, $make:expr) => {
        $crate::StrategyEntry {
            origin: $crate::Origin { crate_name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") },
            interface: $crate::INTERFACE_VERSION,
            name: $name,
            make: $make,
        }
    };
}

/// Registers a tree builder by name, with a function that makes it from its parameters (a JSON object, or null).
#[macro_export]
macro_rules! register_tree_builder {
    ($name:expr, $make:expr) => {
        $crate::macros::inventory::submit! { $crate::strategy_entry!($name, $make) as $crate::StrategyEntry<dyn $crate::TreeBuilder> }
    };
}

/// Registers an acceptance rule by name, with a function that makes it from its parameters (a JSON object, or null).
#[macro_export]
macro_rules! register_acceptance_rule {
    ($name:expr, $make:expr) => {
        $crate::macros::inventory::submit! { $crate::strategy_entry!($name, $make) as $crate::StrategyEntry<dyn $crate::AcceptanceRule> }
    };
}

/// Registers a length policy by name, with a function that makes it from its parameters (a JSON object, or null).
#[macro_export]
macro_rules! register_length_policy {
    ($name:expr, $make:expr) => {
        $crate::macros::inventory::submit! { $crate::strategy_entry!($name, $make) as $crate::StrategyEntry<dyn $crate::LengthPolicy> }
    };
}

/// A backend in a registry.
#[derive(Clone, Debug)]
pub struct RegisteredBackend {
    /// Where it comes from.
    pub origin: Origin,
    /// Its priority.
    pub priority: i32,
    /// The descriptor.
    pub backend: Arc<dyn AttentionBackend>,
}

impl RegisteredBackend {
    /// The backend's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.backend.name()
    }
}

/// A backend for mixtures of experts in a registry.
#[derive(Clone, Debug)]
pub struct RegisteredMoeBackend {
    /// Where it comes from.
    pub origin: Origin,
    /// Its priority.
    pub priority: i32,
    /// The descriptor.
    pub backend: Arc<dyn MoeBackend>,
}

impl RegisteredMoeBackend {
    /// The backend's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.backend.name()
    }
}

/// A proposer in a registry.
#[derive(Clone, Debug)]
pub struct RegisteredProposer {
    /// Where it comes from.
    pub origin: Origin,
    /// The descriptor.
    pub proposer: Arc<dyn Proposer>,
}

/// Why a registry could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// Two plugins of one name.
    #[error("two {kind}s are called '{name}': one of crate {first}, one of crate {second}")]
    Duplicate {
        /// `attention backend`, `MoE backend` or `proposer`.
        kind: &'static str,
        /// Their name.
        name: String,
        /// Where the first comes from.
        first: Origin,
        /// Where the second comes from.
        second: Origin,
    },
    /// A name that users could not select it by.
    #[error("crate {origin} registers a {kind} called '{name}': {reason}")]
    Name {
        /// `attention backend`, `MoE backend` or `proposer`.
        kind: &'static str,
        /// The name.
        name: String,
        /// Where it comes from.
        origin: Origin,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Built for another version of the interface.
    #[error(
        "crate {origin} registers its {kind} for version {found} of the plugin interface, this program has version \
         {INTERFACE_VERSION}: build both against one version of polyattn-api"
    )]
    Interface {
        /// `attention backend`, `MoE backend` or `proposer`.
        kind: &'static str,
        /// Where it comes from.
        origin: Origin,
        /// The version it was built for.
        found: u32,
    },
    /// A plugin that panics when its descriptor is made, or asked for its name and what it can do or needs.
    #[error("crate {origin} registers a {kind} that panics when it is {when}: {message}")]
    Panicked {
        /// `attention backend`, `MoE backend` or `proposer`.
        kind: &'static str,
        /// Where it comes from.
        origin: Origin,
        /// `made` or `asked about itself`.
        when: &'static str,
        /// What it said.
        message: String,
    },
    /// No backend registered.
    #[error(
        "no attention backend is registered: name each backend crate where the program is built, for example \
         `use polyattn_cpu as _;` (a line in Cargo.toml alone registers nothing)"
    )]
    Empty,
}

/// The plugins there are: backends by falling priority then name, proposers by name.
#[derive(Debug, Default)]
pub struct Registry {
    backends: RwLock<Arc<[RegisteredBackend]>>,
    moe_backends: RwLock<Arc<[RegisteredMoeBackend]>>,
    proposers: RwLock<Arc<[RegisteredProposer]>>,
    strategies: Strategies,
}

/// The strategies of each kind by name; those of this crate are always among them.
#[derive(Clone, Debug)]
struct Strategies {
    trees: Vec<StrategyEntry<dyn TreeBuilder>>,
    rules: Vec<StrategyEntry<dyn AcceptanceRule>>,
    policies: Vec<StrategyEntry<dyn LengthPolicy>>,
}

impl Default for Strategies {
    fn default() -> Self {
        Self { trees: TREE_BUILDERS.to_vec(), rules: ACCEPTANCE_RULES.to_vec(), policies: LENGTH_POLICIES.to_vec() }
    }
}

/// A kind of strategy that a registry holds: sealed, for [`Registry::strategy`].
pub trait StrategyKind: held::Held {
    /// What it is called in messages.
    const KIND: &'static str;
}

mod held {
    use super::{Registry, StrategyEntry};

    #[allow(unnameable_types, reason = "a seal")]
    pub trait Held {
        fn held(registry: &Registry) -> &[StrategyEntry<Self>];
        fn held_mut(registry: &mut Registry) -> &mut Vec<StrategyEntry<Self>>;
    }
}

macro_rules! kinds {
    ($($kind:ty, $list:ident, $name:literal;)*) => {$(
        impl StrategyKind for $kind {
            const KIND: &'static str = $name;
        }

        impl held::Held for $kind {
            fn held(registry: &Registry) -> &[StrategyEntry<Self>] {
                &registry.strategies.$list
            }

            fn held_mut(registry: &mut Registry) -> &mut Vec<StrategyEntry<Self>> {
                &mut registry.strategies.$list
            }
        }
    )*};
}

kinds! {
    dyn TreeBuilder, trees, "tree builder";
    dyn AcceptanceRule, rules, "acceptance rule";
    dyn LengthPolicy, policies, "length policy";
}

impl Registry {
    /// Everything that the crates of this program registered.
    ///
    /// # Errors
    /// Two plugins of one name, a name that cannot be selected, one built for another interface or one that panics; no
    /// backend at all.
    pub fn global() -> Result<&'static Self, RegistryError> {
        static GLOBAL: OnceLock<Result<Registry, RegistryError>> = OnceLock::new();
        GLOBAL
            .get_or_init(|| {
                let mut builder = Self::builder();
                for entry in inventory::iter::<BackendEntry> {
                    builder = builder.backend(*entry);
                }
                for entry in inventory::iter::<MoeBackendEntry> {
                    builder = builder.moe_backend(*entry);
                }
                for entry in inventory::iter::<ProposerEntry> {
                    builder = builder.proposer(*entry);
                }
                let registry = builder
                    .strategies(inventory::iter::<StrategyEntry<dyn TreeBuilder>>.into_iter().copied())
                    .strategies(inventory::iter::<StrategyEntry<dyn AcceptanceRule>>.into_iter().copied())
                    .strategies(inventory::iter::<StrategyEntry<dyn LengthPolicy>>.into_iter().copied())
                    .build()?;
                if registry.backends().is_empty() { Err(RegistryError::Empty) } else { Ok(registry) }
            })
            .as_ref()
            .map_err(Clone::clone)
    }

    /// A registry composed by hand, apart from everything global.
    #[must_use]
    pub fn builder() -> RegistryBuilder {
        RegistryBuilder::default()
    }

    /// The backends, best first.
    #[must_use]
    pub fn backends(&self) -> Arc<[RegisteredBackend]> {
        Arc::clone(&self.backends.read())
    }

    /// The backends for mixtures of experts, best first.
    #[must_use]
    pub fn moe_backends(&self) -> Arc<[RegisteredMoeBackend]> {
        Arc::clone(&self.moe_backends.read())
    }

    /// The proposers by name.
    #[must_use]
    pub fn proposers(&self) -> Arc<[RegisteredProposer]> {
        Arc::clone(&self.proposers.read())
    }

    /// The backend of this name, in any case.
    #[must_use]
    pub fn backend(&self, name: &str) -> Option<RegisteredBackend> {
        self.backends().iter().find(|backend| backend.name().eq_ignore_ascii_case(name)).cloned()
    }

    /// The proposer of this name, in any case.
    #[must_use]
    pub fn proposer(&self, name: &str) -> Option<RegisteredProposer> {
        self.proposers().iter().find(|entry| entry.proposer.name().eq_ignore_ascii_case(name)).cloned()
    }

    /// The names of all backends as one line, for messages: `none` where there are none.
    #[must_use]
    pub fn backend_names(&self) -> String {
        let mut names: Vec<_> = self.backends().iter().map(RegisteredBackend::name).collect();
        names.sort_unstable();
        one_line(&names)
    }

    /// The names of all backends for mixtures of experts as one line, for messages: `none` where there are none.
    #[must_use]
    pub fn moe_backend_names(&self) -> String {
        let mut names: Vec<_> = self.moe_backends().iter().map(RegisteredMoeBackend::name).collect();
        names.sort_unstable();
        one_line(&names)
    }

    /// The names of all proposers as one line, for messages: `none` where there are none.
    #[must_use]
    pub fn proposer_names(&self) -> String {
        one_line(&self.proposers().iter().map(|entry| entry.proposer.name()).collect::<Vec<_>>())
    }

    /// The names of all strategies of a kind.
    #[must_use]
    pub fn strategy_names<T: ?Sized + StrategyKind>(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = T::held(self).iter().map(|entry| entry.name).collect();
        names.sort_unstable();
        names
    }

    /// Makes the strategy that `config` names: `registry.strategy::<dyn TreeBuilder>(&config)`.
    ///
    /// # Errors
    /// A sentence: a name that nobody registered, with the names there are, or parameters that it refuses.
    pub fn strategy<T: ?Sized + StrategyKind>(&self, config: &StrategyConfig) -> Result<Box<T>, String> {
        let StrategyConfig { name, parameters } = config;
        let entry = T::held(self).iter().find(|entry| entry.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
            format!("unknown {} '{name}'; registered are: {}", T::KIND, one_line(&self.strategy_names::<T>()))
        })?;
        contained(|| (entry.make)(parameters))
            .unwrap_or_else(|message| Err(format!("it panicked when it was made: {message}")))
            .map_err(|message| format!("{} '{}': {message}", T::KIND, entry.name))
    }

    /// The same plugins, those backends configured that `config` names (`backend_config` of a configuration).
    ///
    /// # Errors
    /// A name that nobody registered, or a configuration that its backend refuses.
    pub fn configured(&self, config: &BTreeMap<String, serde_json::Value>) -> Result<Self, ConfigError> {
        let fail = |name: &str, message: String| ConfigError { field: format!("backend_config.{name}"), message };
        let mut backends = self.backends().to_vec();
        for (name, value) in config {
            let entry = backends.iter_mut().find(|entry| entry.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
                let registered = self.backend_names();
                fail(name, SelectionError::Unknown { name: name.clone(), registered }.to_string())
            })?;
            let configured = contained(|| entry.backend.configured(value).inspect(|backend| asked_backend(&**backend)))
                .unwrap_or_else(|message| Err(format!("the backend panicked: {message}")))
                .map_err(|message| fail(name, message))?;
            if configured.name() != entry.name() {
                let message = format!("the backend answers with another one, '{}'", configured.name());
                return Err(fail(name, message));
            }
            entry.backend = configured;
        }
        Ok(Self {
            backends: RwLock::new(backends.into()),
            moe_backends: RwLock::new(self.moe_backends()),
            proposers: RwLock::new(self.proposers()),
            strategies: self.strategies.clone(),
        })
    }

    /// The same plugins and this proposer, in the place of one of its name.
    ///
    /// # Errors
    /// Its name cannot be selected, or it panics when it is asked about itself.
    pub fn with_proposer(&self, proposer: RegisteredProposer) -> Result<Self, RegistryError> {
        const KIND: &str = "proposer";
        ask(KIND, &*proposer.proposer, proposer.origin, asked_proposer)?;
        let name = proposer.proposer.name();
        check_name(KIND, name, proposer.origin)?;
        let others = self.proposers();
        let mut all: Vec<_> = others.iter().filter(|other| other.proposer.name() != name).cloned().collect();
        all.push(proposer);
        all.sort_by(|a, b| a.proposer.name().cmp(b.proposer.name()));
        Ok(Self {
            backends: RwLock::new(self.backends()),
            moe_backends: RwLock::new(self.moe_backends()),
            proposers: RwLock::new(all.into()),
            strategies: self.strategies.clone(),
        })
    }

    /// Adds a backend at run time.
    ///
    /// # Errors
    /// Its name is taken or cannot be selected, it was built for another interface, or it panics.
    pub fn register_backend(&self, entry: BackendEntry) -> Result<(), RegistryError> {
        const KIND: &str = "attention backend";
        check_interface(KIND, entry.interface, entry.origin)?;
        let backend = make(KIND, entry.make, entry.origin, asked_backend)?;
        let backend = RegisteredBackend { origin: entry.origin, priority: entry.priority, backend };
        check_name(KIND, backend.name(), entry.origin)?;
        let mut backends = self.backends.write();
        if let Some(other) = backends.iter().find(|other| other.name() == backend.name()) {
            return Err(duplicate(KIND, backend.name(), other.origin, entry.origin));
        }
        let mut all: Vec<_> = backends.iter().cloned().chain([backend]).collect();
        all.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name().cmp(b.name())));
        *backends = all.into();
        Ok(())
    }

    /// Adds a backend for mixtures of experts at run time.
    ///
    /// # Errors
    /// Its name is taken or cannot be selected, it was built for another interface, or it panics.
    pub fn register_moe_backend(&self, entry: MoeBackendEntry) -> Result<(), RegistryError> {
        const KIND: &str = "MoE backend";
        check_interface(KIND, entry.interface, entry.origin)?;
        let backend = make(KIND, entry.make, entry.origin, asked_moe_backend)?;
        let backend = RegisteredMoeBackend { origin: entry.origin, priority: entry.priority, backend };
        check_name(KIND, backend.name(), entry.origin)?;
        let mut backends = self.moe_backends.write();
        if let Some(other) = backends.iter().find(|other| other.name() == backend.name()) {
            return Err(duplicate(KIND, backend.name(), other.origin, entry.origin));
        }
        let mut all: Vec<_> = backends.iter().cloned().chain([backend]).collect();
        all.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name().cmp(b.name())));
        *backends = all.into();
        Ok(())
    }

    /// Adds a proposer at run time.
    ///
    /// # Errors
    /// Its name is taken or cannot be selected, it was built for another interface, or it panics.
    pub fn register_proposer(&self, entry: ProposerEntry) -> Result<(), RegistryError> {
        const KIND: &str = "proposer";
        check_interface(KIND, entry.interface, entry.origin)?;
        let proposer = make(KIND, entry.make, entry.origin, asked_proposer)?;
        let proposer = RegisteredProposer { origin: entry.origin, proposer };
        let name = proposer.proposer.name();
        check_name(KIND, name, entry.origin)?;
        let mut proposers = self.proposers.write();
        if let Some(other) = proposers.iter().find(|other| other.proposer.name() == name) {
            return Err(duplicate(KIND, name, other.origin, entry.origin));
        }
        let mut all: Vec<_> = proposers.iter().cloned().chain([proposer]).collect();
        all.sort_by(|a, b| a.proposer.name().cmp(b.proposer.name()));
        *proposers = all.into();
        Ok(())
    }
}

fn check_interface(kind: &'static str, found: u32, origin: Origin) -> Result<(), RegistryError> {
    if found == INTERFACE_VERSION { Ok(()) } else { Err(RegistryError::Interface { kind, origin, found }) }
}

/// Makes a descriptor and asks it once about itself, so that it panics here or, being constant, nowhere.
fn make<T: ?Sized>(
    kind: &'static str,
    make: fn() -> Arc<T>,
    origin: Origin,
    asked: fn(&T),
) -> Result<Arc<T>, RegistryError> {
    let panicked = |message| RegistryError::Panicked { kind, origin, when: "made", message };
    let made = contained(make).map_err(panicked)?;
    ask(kind, &*made, origin, asked)?;
    Ok(made)
}

fn ask<T: ?Sized>(kind: &'static str, plugin: &T, origin: Origin, asked: fn(&T)) -> Result<(), RegistryError> {
    let panicked = |message| RegistryError::Panicked { kind, origin, when: "asked about itself", message };
    contained(|| asked(plugin)).map_err(panicked)
}

fn asked_backend(backend: &dyn AttentionBackend) {
    let _ = (backend.name(), backend.capabilities());
}

fn asked_moe_backend(backend: &dyn MoeBackend) {
    let _ = backend.name();
}

fn asked_proposer(proposer: &dyn Proposer) {
    let _ = (proposer.name(), proposer.requirements());
}

fn one_line(names: &[&str]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn duplicate(kind: &'static str, name: &str, a: Origin, b: Origin) -> RegistryError {
    // Registration order is the linker's, the message should not be.
    let (first, second) = if (a.crate_name, a.version) <= (b.crate_name, b.version) { (a, b) } else { (b, a) };
    RegistryError::Duplicate { kind, name: name.to_owned(), first, second }
}

fn check_name(kind: &'static str, name: &str, origin: Origin) -> Result<(), RegistryError> {
    let reason = if name.is_empty() {
        "a name must not be empty"
    } else if ["auto", "none", "all"].contains(&name) {
        "the name is reserved"
    } else if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_') {
        "a name is made of lower-case letters, digits, '-' and '_'"
    } else {
        return Ok(());
    };
    Err(RegistryError::Name { kind, name: name.to_owned(), origin, reason })
}

/// Composes a [`Registry`] by hand.
#[derive(Debug, Default)]
pub struct RegistryBuilder {
    backends: Vec<BackendEntry>,
    moe_backends: Vec<MoeBackendEntry>,
    proposers: Vec<ProposerEntry>,
    strategies: Registry,
    fault: Option<RegistryError>,
}

impl RegistryBuilder {
    /// With this backend.
    #[must_use]
    pub fn backend(mut self, entry: BackendEntry) -> Self {
        self.backends.push(entry);
        self
    }

    /// With this backend for mixtures of experts.
    #[must_use]
    pub fn moe_backend(mut self, entry: MoeBackendEntry) -> Self {
        self.moe_backends.push(entry);
        self
    }

    /// With this proposer.
    #[must_use]
    pub fn proposer(mut self, entry: ProposerEntry) -> Self {
        self.proposers.push(entry);
        self
    }

    /// With these strategies, beside those that are always there.
    #[must_use]
    pub fn strategies<T: ?Sized + StrategyKind>(mut self, entries: impl IntoIterator<Item = StrategyEntry<T>>) -> Self {
        for entry in entries {
            let held = T::held_mut(&mut self.strategies);
            let taken = held.iter().find(|other| other.name == entry.name).map(|other| other.origin);
            let checked = check_interface(T::KIND, entry.interface, entry.origin)
                .and_then(|()| check_name(T::KIND, entry.name, entry.origin))
                .and_then(|()| match taken {
                    Some(other) => Err(duplicate(T::KIND, entry.name, other, entry.origin)),
                    None => Ok(()),
                });
            match checked {
                Ok(()) => held.push(entry),
                Err(error) => self.fault = self.fault.or(Some(error)),
            }
        }
        self
    }

    /// The registry.
    ///
    /// # Errors
    /// Two plugins of one name, a name that cannot be selected, one built for another interface, or one that panics.
    pub fn build(self) -> Result<Registry, RegistryError> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let registry = self.strategies;
        for entry in self.backends {
            registry.register_backend(entry)?;
        }
        for entry in self.moe_backends {
            registry.register_moe_backend(entry)?;
        }
        for entry in self.proposers {
            registry.register_proposer(entry)?;
        }
        Ok(registry)
    }
}
