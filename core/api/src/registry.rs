use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, OnceLock},
};

use parking_lot::RwLock;
use serde::Serialize;

use crate::{AttentionBackend, ConfigError, Proposer, SelectionError, guard::contained};

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
pub const INTERFACE_VERSION: u32 = 1;

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

inventory::collect!(BackendEntry);
inventory::collect!(ProposerEntry);

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

/// A backend in a registry.
#[derive(Clone, Debug)]
pub struct RegisteredBackend {
    /// Where it comes from.
    pub origin: Origin,
    /// Its priority, unless it names another for a problem
    /// ([`AttentionBackend::priority`](crate::AttentionBackend::priority)).
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
        /// `attention backend` or `proposer`.
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
        /// `attention backend` or `proposer`.
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
        /// `attention backend` or `proposer`.
        kind: &'static str,
        /// Where it comes from.
        origin: Origin,
        /// The version it was built for.
        found: u32,
    },
    /// A plugin that panics when its descriptor is made.
    #[error("crate {origin} registers a {kind} that panics when it is made: {message}")]
    Panicked {
        /// `attention backend` or `proposer`.
        kind: &'static str,
        /// Where it comes from.
        origin: Origin,
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
    proposers: RwLock<Arc<[RegisteredProposer]>>,
}

impl Registry {
    /// Everything that the crates of this program registered.
    ///
    /// # Errors
    /// Two plugins of one name, a name that cannot be selected, or no backend at all.
    pub fn global() -> Result<&'static Self, RegistryError> {
        static GLOBAL: OnceLock<Result<Registry, RegistryError>> = OnceLock::new();
        GLOBAL
            .get_or_init(|| {
                let mut builder = Self::builder();
                for entry in inventory::iter::<BackendEntry> {
                    builder = builder.backend(*entry);
                }
                for entry in inventory::iter::<ProposerEntry> {
                    builder = builder.proposer(*entry);
                }
                let registry = builder.build()?;
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

    /// The names of all proposers as one line, for messages: `none` where there are none.
    #[must_use]
    pub fn proposer_names(&self) -> String {
        one_line(&self.proposers().iter().map(|entry| entry.proposer.name()).collect::<Vec<_>>())
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
            let configured = contained(|| entry.backend.configured(value))
                .unwrap_or_else(|message| Err(format!("the backend panicked: {message}")))
                .map_err(|message| fail(name, message))?;
            if configured.name() != entry.name() {
                let message = format!("the backend answers with another one, '{}'", configured.name());
                return Err(fail(name, message));
            }
            entry.backend = configured;
        }
        Ok(Self { backends: RwLock::new(backends.into()), proposers: RwLock::new(self.proposers()) })
    }

    /// The same plugins and this proposer, in the place of one of its name.
    ///
    /// # Errors
    /// Its name cannot be selected.
    pub fn with_proposer(&self, proposer: RegisteredProposer) -> Result<Self, RegistryError> {
        let name = proposer.proposer.name();
        check_name("proposer", name, proposer.origin)?;
        let others = self.proposers();
        let mut all: Vec<_> = others.iter().filter(|other| other.proposer.name() != name).cloned().collect();
        all.push(proposer);
        all.sort_by(|a, b| a.proposer.name().cmp(b.proposer.name()));
        Ok(Self { backends: RwLock::new(self.backends()), proposers: RwLock::new(all.into()) })
    }

    /// Adds a backend at run time.
    ///
    /// # Errors
    /// Its name is taken or cannot be selected.
    pub fn register_backend(&self, entry: BackendEntry) -> Result<(), RegistryError> {
        const KIND: &str = "attention backend";
        check_interface(KIND, entry.interface, entry.origin)?;
        let backend = make(KIND, entry.make, entry.origin)?;
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

    /// Adds a proposer at run time.
    ///
    /// # Errors
    /// Its name is taken or cannot be selected.
    pub fn register_proposer(&self, entry: ProposerEntry) -> Result<(), RegistryError> {
        const KIND: &str = "proposer";
        check_interface(KIND, entry.interface, entry.origin)?;
        let proposer = RegisteredProposer { origin: entry.origin, proposer: make(KIND, entry.make, entry.origin)? };
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

fn make<T: ?Sized>(kind: &'static str, make: fn() -> Arc<T>, origin: Origin) -> Result<Arc<T>, RegistryError> {
    contained(make).map_err(|message| RegistryError::Panicked { kind, origin, message })
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
    proposers: Vec<ProposerEntry>,
}

impl RegistryBuilder {
    /// With this backend.
    #[must_use]
    pub fn backend(mut self, entry: BackendEntry) -> Self {
        self.backends.push(entry);
        self
    }

    /// With this proposer.
    #[must_use]
    pub fn proposer(mut self, entry: ProposerEntry) -> Self {
        self.proposers.push(entry);
        self
    }

    /// The registry.
    ///
    /// # Errors
    /// Two plugins of one name, or a name that cannot be selected.
    pub fn build(self) -> Result<Registry, RegistryError> {
        let registry = Registry::default();
        for entry in self.backends {
            registry.register_backend(entry)?;
        }
        for entry in self.proposers {
            registry.register_proposer(entry)?;
        }
        Ok(registry)
    }
}
