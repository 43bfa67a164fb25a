//! The kernels of an engine: prepared once, counted as they serve.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionProblem, BackendError, BatchLayout, Mask, MoveKv, Phase, Plan,
    ResolvedLayer, Role, StoreKv, StoreRotated,
};
use polyattn_device::{Commands, Device};

use crate::{EngineError, record::Recorder, report::Backends};

/// A kernel that counts its calls and shows them to the recorder.
#[derive(Debug)]
pub(crate) struct Served {
    kernel: Arc<dyn AttentionKernel>,
    backend: &'static str,
    calls: AtomicU64,
    recorder: Option<Arc<Recorder>>,
}

impl AttentionKernel for Served {
    fn problem(&self) -> &AttentionProblem {
        self.kernel.problem()
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        self.kernel.plan(batch)
    }

    fn store_kv(&self, commands: &mut Commands, plan: &Plan, io: &StoreKv<'_>) -> Result<(), BackendError> {
        self.kernel.store_kv(commands, plan, io)
    }

    fn store_rotated(&self, commands: &mut Commands, plan: &Plan, io: &StoreRotated<'_>) -> Result<bool, BackendError> {
        self.kernel.store_rotated(commands, plan, io)
    }

    fn move_kv(&self, commands: &mut Commands, io: &MoveKv<'_>) -> Result<(), BackendError> {
        self.kernel.move_kv(commands, io)
    }

    fn encode(&self, commands: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        self.kernel.encode(commands, plan, io)?;
        self.calls.fetch_add(1, Ordering::Relaxed);
        if let Some(recorder) = &self.recorder {
            recorder.call(self.problem(), commands, plan, io)?;
        }
        Ok(())
    }
}

/// All kernels of an engine.
#[derive(Debug, Default)]
pub(crate) struct Kernels {
    served: Vec<Arc<Served>>,
}

impl Kernels {
    /// Compiles the kernels of `layers`; they serve pages of `page_size` tokens.
    pub(crate) fn prepare(
        &mut self,
        device: &Device,
        layers: &[ResolvedLayer],
        page_size: u32,
        recorder: Option<&Arc<Recorder>>,
    ) -> Result<(), EngineError> {
        for layer in layers {
            let problem = layer.problem.clone().page_size(page_size);
            let kernel = layer.backend.prepare(device, &problem)?;
            self.served.push(Arc::new(Served {
                kernel,
                backend: layer.backend.name(),
                calls: AtomicU64::new(0),
                recorder: recorder.cloned(),
            }));
        }
        Ok(())
    }

    /// The kernels of a role and phase, over trees or not, in the order of its layer kinds.
    pub(crate) fn of(&self, role: Role, phase: Phase, tree: bool) -> impl Iterator<Item = &Arc<Served>> {
        self.served.iter().filter(move |served| {
            let problem = served.problem();
            problem.role == role && problem.phase == phase && (problem.mask == Mask::Tree) == tree
        })
    }

    /// The backends of a role by phase, for messages.
    pub(crate) fn names(&self, role: Role) -> String {
        let mut names: Vec<_> = self
            .served
            .iter()
            .filter(|served| served.problem().role == role)
            .map(|served| format!("{} '{}'", served.problem().phase, served.backend))
            .collect();
        names.dedup();
        names.join(", ")
    }

    /// What ran since the last call.
    pub(crate) fn take_counts(&self) -> (Backends, BTreeMap<&'static str, u64>) {
        let mut backends = Backends::default();
        let mut calls = BTreeMap::new();
        for served in &self.served {
            let count = served.calls.swap(0, Ordering::Relaxed);
            if count > 0 {
                backends.ran(served.problem().role, served.problem().phase, served.backend);
                *calls.entry(served.backend).or_default() += count;
            }
        }
        (backends, calls)
    }
}
