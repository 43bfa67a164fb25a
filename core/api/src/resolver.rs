use std::sync::Arc;

use parking_lot::RwLock;
use polyattn_device::DeviceFacts;

use crate::{EngineConfig, RegisteredBackend, Registry, Resolution, ResolveError, resolve};

/// Answers that are kept; the oldest goes first.
const KEPT: usize = 16;

/// [`resolve`] for one device, remembering its answers: a configuration that was resolved before is looked up by its
/// whole value, so no answer leaks from one role or model to another. Plugins added since make it ask again. Errors are
/// not remembered.
#[derive(Debug)]
pub struct Resolver<'a> {
    registry: &'a Registry,
    device: DeviceFacts,
    known: RwLock<Vec<Known>>,
}

#[derive(Debug)]
struct Known {
    config: EngineConfig,
    /// The plugins it was asked of.
    backends: Arc<[RegisteredBackend]>,
    answer: Arc<Resolution>,
}

impl<'a> Resolver<'a> {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(registry: &'a Registry, device: DeviceFacts) -> Self {
        Self { registry, device, known: RwLock::default() }
    }

    /// Who serves `config`.
    ///
    /// # Errors
    /// As [`resolve`].
    pub fn resolve(&self, config: &EngineConfig) -> Result<Arc<Resolution>, ResolveError> {
        let backends = self.registry.backends();
        let known = self.known.read();
        if let Some(known) =
            known.iter().find(|known| Arc::ptr_eq(&known.backends, &backends) && known.config == *config)
        {
            return Ok(Arc::clone(&known.answer));
        }
        drop(known);
        let answer = Arc::new(resolve(config, &self.device, self.registry)?);
        let mut known = self.known.write();
        if known.len() == KEPT {
            known.remove(0);
        }
        known.push(Known { config: config.clone(), backends, answer: Arc::clone(&answer) });
        Ok(answer)
    }
}
