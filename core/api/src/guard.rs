//! What stands between a program and a plugin that misbehaves: its faults are contained and carry its name.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use polyattn_device::{Commands, Device, DeviceFacts};

use crate::{
    AttentionIo, AttentionKernel, AttentionProblem, BackendError, BatchLayout, Decline, Draft, DraftSequence, Drafter,
    LoadContext, Marginals, MoeIo, MoeKernel, MoeProblem, MoveKv, Outcome, Plan, PrefixReuse, Proposal, ProposeContext,
    ProposerError, RegisteredBackend, RegisteredMoeBackend, RegisteredProposer, StoreKv, StoreRotated, TapSpec,
    TreeWish,
};

/// Calls what may panic; its message if it did. A plugin's state is not looked at again after a fault, so nothing is
/// seen half changed.
///
/// # Errors
/// The message of a panic.
pub fn contained<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| said(&*payload))
}

fn said(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

impl RegisteredBackend {
    /// [`AttentionBackend::declines`](crate::AttentionBackend::declines); a panic in it is a reason of its own.
    #[must_use]
    pub fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        contained(|| self.backend.declines(problem, device))
            .unwrap_or_else(|message| vec![Decline::Panicked(message.into())])
    }

    /// [`AttentionBackend::prepare`](crate::AttentionBackend::prepare), and a kernel whose faults carry the backend's
    /// name: a panic, a plan of another batch, a problem that was not declined and is refused all the same.
    ///
    /// # Errors
    /// A problem it declines, a device that fails, or [`BackendError::Plugin`].
    pub fn prepare(
        &self,
        device: &Device,
        problem: &AttentionProblem,
    ) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let fault = |what: String| BackendError::Plugin { backend: self.name(), what };
        let declines = self.declines(problem, device.facts());
        if !declines.is_empty() {
            return Err(BackendError::Declined(declines));
        }
        let kernel = contained(|| self.backend.prepare(device, problem))
            .map_err(|message| fault(format!("it panicked in prepare: {message}")))?
            .map_err(|error| match error {
                BackendError::Declined(_) => fault(format!("it declined nothing, then refused: {error}")),
                error => error,
            })?;
        if kernel.problem() != problem {
            return Err(fault("it prepared another problem than it was given".into()));
        }
        Ok(Arc::new(Guarded { kernel, backend: self.name() }))
    }
}

impl RegisteredMoeBackend {
    /// [`MoeBackend::declines`](crate::MoeBackend::declines); a panic in it is a reason of its own.
    #[must_use]
    pub fn declines(&self, problem: &MoeProblem, device: &DeviceFacts) -> Vec<Decline> {
        contained(|| self.backend.declines(problem, device))
            .unwrap_or_else(|message| vec![Decline::Panicked(message.into())])
    }

    /// [`MoeBackend::prepare`](crate::MoeBackend::prepare), and a kernel whose panics carry the backend's name.
    ///
    /// # Errors
    /// A problem it declines, a device that fails, or [`BackendError::MoePlugin`].
    pub fn prepare(
        &self,
        device: &Device,
        problem: &MoeProblem,
        rows: u32,
    ) -> Result<Arc<dyn MoeKernel>, BackendError> {
        let declines = self.declines(problem, device.facts());
        if !declines.is_empty() {
            return Err(BackendError::Declined(declines));
        }
        let backend = self.name();
        let kernel = contained(|| self.backend.prepare(device, problem, rows)).unwrap_or_else(|message| {
            Err(BackendError::MoePlugin { backend, what: format!("it panicked in prepare: {message}") })
        })?;
        Ok(Arc::new(GuardedMoe { kernel, backend }))
    }
}

/// A kernel whose panics carry its backend's name.
#[derive(Debug)]
struct GuardedMoe {
    kernel: Arc<dyn MoeKernel>,
    backend: &'static str,
}

impl MoeKernel for GuardedMoe {
    fn problem(&self) -> &MoeProblem {
        self.kernel.problem()
    }

    fn encode(&self, commands: &mut Commands, io: &MoeIo<'_>) -> Result<(), BackendError> {
        contained(|| self.kernel.encode(commands, io)).unwrap_or_else(|message| {
            let what = format!("it panicked in encode: {message}");
            Err(BackendError::MoePlugin { backend: self.backend, what })
        })
    }
}

impl RegisteredProposer {
    /// [`Proposer::load`](crate::Proposer::load), and a drafter whose panics are errors that carry the proposer's name.
    ///
    /// # Errors
    /// A checkpoint that is missing, broken or of another target, or [`ProposerError::Plugin`].
    pub fn load(&self, context: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        let proposer = self.proposer.name();
        let drafter = contained(|| self.proposer.load(context)).unwrap_or_else(|message| {
            Err(ProposerError::Plugin { proposer, what: format!("it panicked in load: {message}") })
        })?;
        Ok(Box::new(GuardedDrafter { drafter, proposer }))
    }
}

/// A drafter whose panics carry its proposer's name.
#[derive(Debug)]
struct GuardedDrafter {
    drafter: Box<dyn Drafter>,
    proposer: &'static str,
}

impl GuardedDrafter {
    fn call<T>(
        &mut self,
        name: &str,
        call: impl FnOnce(&mut dyn Drafter) -> Result<T, ProposerError>,
    ) -> Result<T, ProposerError> {
        let Self { drafter, proposer } = self;
        contained(|| call(&mut **drafter)).unwrap_or_else(|message| {
            Err(ProposerError::Plugin { proposer, what: format!("it panicked in {name}: {message}") })
        })
    }
}

impl Drafter for GuardedDrafter {
    fn taps(&self) -> &TapSpec {
        self.drafter.taps()
    }

    fn max_tokens(&self) -> u32 {
        self.drafter.max_tokens()
    }

    fn default_tokens(&self) -> u32 {
        self.drafter.default_tokens()
    }

    fn reuse(&self) -> PrefixReuse {
        self.drafter.reuse()
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        let proposal = self.call("propose", |drafter| drafter.propose(context))?;
        match misshapen(&proposal, context.sequences, context.tree.map(|tree| tree.nodes)) {
            Some(what) => Err(ProposerError::Plugin { proposer: self.proposer, what }),
            None => Ok(proposal),
        }
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        self.call("commit", |drafter| drafter.commit(outcome))
    }

    fn forget(&mut self, sequence: u64) {
        if let Err(error) = self.call("forget", |drafter| {
            drafter.forget(sequence);
            Ok(())
        }) {
            tracing::warn!("{error}");
        }
    }
}

impl TreeWish<'_> {
    /// The builder's tree of these marginals, of up to `depth` levels; a panic in it, or a draft of another shape, is an
    /// error that carries its name.
    ///
    /// # Errors
    /// [`ProposerError::Strategy`].
    pub fn build(&self, marginals: &Marginals, depth: u32) -> Result<Draft, ProposerError> {
        let fault =
            |what: String| ProposerError::Strategy { kind: "tree builder", name: self.builder.name().to_owned(), what };
        let draft = contained(|| self.builder.build(marginals, self.nodes, depth))
            .map_err(|message| fault(format!("it panicked in build: {message}")))?;
        if let Some(what) = draft.fault() {
            return Err(fault(format!("it built {what}")));
        }
        let levels = draft.depths().into_iter().max().unwrap_or(0);
        if draft.len() > self.nodes as usize || levels > depth {
            let (built, nodes) = (draft.len(), self.nodes);
            return Err(fault(format!(
                "it built {built} nodes in {levels} levels, where {nodes} in {depth} were wanted"
            )));
        }
        Ok(draft)
    }
}

/// What is wrong with the shape of a proposal: another number of drafts than of sequences, more tokens than were wanted,
/// a tree that is none or was not asked for, or a buffer that does not hold the tokens.
fn misshapen(proposal: &Proposal, sequences: &[DraftSequence<'_>], nodes: Option<u32>) -> Option<String> {
    // Levels of each draft.
    let counts: Vec<usize> = match proposal {
        Proposal::Host(drafts) => {
            if let Some(fault) = drafts.iter().find_map(Draft::fault) {
                return Some(format!("it drafted {fault}"));
            }
            drafts.iter().map(|draft| draft.depths().into_iter().max().unwrap_or(0) as usize).collect()
        }
        Proposal::Device { counts, .. } => counts.iter().map(|count| *count as usize).collect(),
        Proposal::Marginals(all) => all.iter().map(|marginals| marginals.slots.len()).collect(),
    };
    if counts.len() != sequences.len() {
        return Some(format!("it gave {} drafts for {} sequences", counts.len(), sequences.len()));
    }
    for (count, sequence) in counts.iter().zip(sequences) {
        if *count > sequence.width as usize {
            let DraftSequence { id, width, .. } = sequence;
            return Some(format!("it drafted {count} tokens for sequence {id}, where {width} were wanted"));
        }
    }
    match (proposal, nodes) {
        (Proposal::Host(drafts), None) if drafts.iter().any(|draft| !draft.is_chain()) => {
            Some("it drafted a tree where a chain was wanted".into())
        }
        (Proposal::Host(drafts), Some(nodes)) => {
            // A chain may be as long as was wanted.
            let large = drafts.iter().find(|draft| !draft.is_chain() && draft.len() > nodes as usize);
            large.map(|tree| format!("it drafted a tree of {} nodes, where {nodes} were wanted", tree.len()))
        }
        (Proposal::Marginals(_), None) => Some("it gave marginals where a chain was wanted".into()),
        (Proposal::Device { ids, stride, .. }, _) => (0u64..).zip(&counts).find_map(|(place, count)| {
            let (end, held) = (place * u64::from(*stride) + 1 + *count as u64, ids.bytes() / 4);
            (end > held).then(|| format!("its draft {place} ends at element {end} of a buffer of {held}"))
        }),
        _ => None,
    }
}

/// A kernel whose faults carry its backend's name.
#[derive(Debug)]
struct Guarded {
    kernel: Arc<dyn AttentionKernel>,
    backend: &'static str,
}

impl Guarded {
    fn call<T>(&self, name: &str, call: impl FnOnce() -> Result<T, BackendError>) -> Result<T, BackendError> {
        contained(call).unwrap_or_else(|message| {
            Err(BackendError::Plugin { backend: self.backend, what: format!("it panicked in {name}: {message}") })
        })
    }
}

impl AttentionKernel for Guarded {
    fn problem(&self) -> &AttentionProblem {
        self.kernel.problem()
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        let plan = self.call("plan", || self.kernel.plan(batch))?;
        if plan.batch() != batch {
            let what = format!(
                "its plan is of {} sequences and {} rows, the batch has {} and {}",
                plan.batch().sequences(),
                plan.batch().rows(),
                batch.sequences(),
                batch.rows()
            );
            return Err(BackendError::Plugin { backend: self.backend, what });
        }
        Ok(plan)
    }

    fn store_kv(&self, commands: &mut Commands, plan: &Plan, io: &StoreKv<'_>) -> Result<(), BackendError> {
        self.call("store_kv", || self.kernel.store_kv(commands, plan, io))
    }

    fn store_rotated(&self, commands: &mut Commands, plan: &Plan, io: &StoreRotated<'_>) -> Result<bool, BackendError> {
        self.call("store_rotated", || self.kernel.store_rotated(commands, plan, io))
    }

    fn move_kv(&self, commands: &mut Commands, io: &MoveKv<'_>) -> Result<(), BackendError> {
        self.call("move_kv", || self.kernel.move_kv(commands, io))
    }

    fn encode(&self, commands: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        self.call("encode", || self.kernel.encode(commands, plan, io))
    }
}
