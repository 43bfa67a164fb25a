use polyattn_device::DeviceFacts;
use serde::Serialize;

use crate::{AttentionProblem, BackendName, Decline, RegisteredBackend, Registry, backend::join};

/// How free the selector is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// The registered backend of highest priority that can serve.
    #[default]
    Auto,
    /// This one if it can serve, otherwise as `Auto`.
    Prefer(BackendName),
    /// This one or an error; never another.
    Require(BackendName),
}

impl Policy {
    /// `auto`, `prefer` or `require`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Prefer(_) => "prefer",
            Self::Require(_) => "require",
        }
    }
}

/// A backend that was not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Declined {
    /// Its name.
    pub backend: &'static str,
    /// Every reason why it cannot serve; none if it could and was outranked.
    pub reasons: Vec<Decline>,
}

/// The answer to one problem.
#[derive(Clone, Debug)]
pub struct Selection {
    /// The backend that serves.
    pub backend: RegisteredBackend,
    /// All others, in the registry's order.
    pub declined: Vec<Declined>,
    /// Its place in the registry's order.
    pub(crate) rank: usize,
}

/// Why nobody serves a problem.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectionError {
    /// An explicit choice cannot serve.
    #[error("backend '{backend}' cannot serve {problem}: {}", join(.reasons))]
    Required {
        /// The backend's name.
        backend: String,
        /// Role, phase and layer, in words.
        problem: String,
        /// Every reason.
        reasons: Vec<Decline>,
    },
    /// Nobody can.
    #[error("no attention backend can serve {problem}: {}", list(.declined))]
    Nobody {
        /// Role, phase and layer, in words.
        problem: String,
        /// Everybody, with every reason.
        declined: Vec<Declined>,
    },
    /// A name that nobody registered.
    #[error("unknown attention backend '{name}'; registered are: {registered}")]
    Unknown {
        /// The name.
        name: String,
        /// The names there are.
        registered: String,
    },
}

fn list(declined: &[Declined]) -> String {
    if declined.is_empty() {
        return "none is registered; name each backend crate where the program is built".into();
    }
    declined.iter().map(|one| format!("{}: {}", one.backend, join(&one.reasons))).collect::<Vec<_>>().join(" | ")
}

/// Chooses a backend for `problem` on `device`. A pure function: it reads nothing but its arguments.
///
/// # Errors
/// An unknown name, an explicit choice that cannot serve (it never falls back), or nobody who can.
pub fn select(
    problem: &AttentionProblem,
    device: &DeviceFacts,
    registry: &Registry,
    policy: &Policy,
) -> Result<Selection, SelectionError> {
    let backends = registry.backends();
    let named = match policy {
        Policy::Auto => None,
        Policy::Prefer(name) | Policy::Require(name) => {
            let place = backends.iter().position(|backend| backend.name() == name.as_str());
            Some(place.ok_or_else(|| SelectionError::Unknown {
                name: name.to_string(),
                registered: registry.backend_names(),
            })?)
        }
    };
    let reasons: Vec<_> = backends.iter().map(|entry| entry.declines(problem, device)).collect();
    let able = |place: &usize| reasons[*place].is_empty();
    let chosen = match (policy, named) {
        (Policy::Require(_), Some(place)) if !able(&place) => {
            return Err(SelectionError::Required {
                backend: backends[place].name().to_owned(),
                problem: problem.described(),
                reasons: reasons.into_iter().nth(place).unwrap_or_default(),
            });
        }
        (_, named) => named.filter(able).or_else(|| (0..backends.len()).find(able)),
    };
    let declined = |except: Option<usize>| {
        backends
            .iter()
            .zip(&reasons)
            .enumerate()
            .filter(|(place, _)| Some(*place) != except)
            .map(|(_, (backend, reasons))| Declined { backend: backend.name(), reasons: reasons.clone() })
            .collect()
    };
    match chosen {
        Some(place) => Ok(Selection { backend: backends[place].clone(), declined: declined(Some(place)), rank: place }),
        None => Err(SelectionError::Nobody { problem: problem.described(), declined: declined(None) }),
    }
}
