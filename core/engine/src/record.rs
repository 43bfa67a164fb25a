//! Attention calls of a run, written as replay files.

use std::path::PathBuf;

use parking_lot::Mutex;
use polyattn_api::{AttentionIo, AttentionKind, AttentionProblem, BackendError, BatchLayout, BufferSlice, Plan, Role};
use polyattn_device::{Commands, Readback};
use polyattn_replay::Case;

use crate::EngineError;

/// Which attention calls to write down, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordOptions {
    /// The folder, made if it is missing.
    pub folder: PathBuf,
    /// The layer, counted from 0 in the target and in the draft.
    pub layer: u32,
    /// The step; all where unset. The chunks of the prompt count as steps, from 0.
    pub step: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Recorder {
    options: RecordOptions,
    /// Whether the folder was not there before.
    made: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Steps begun.
    steps: u64,
    written: u64,
    target_layers: u32,
    draft_layers: u32,
    pending: Vec<Pending>,
}

/// A call on its way to the host.
#[derive(Debug)]
struct Pending {
    name: String,
    problem: AttentionProblem,
    batch: BatchLayout,
    q: Readback,
    k_cache: Readback,
    v_cache: Option<Readback>,
    out: Readback,
}

impl Recorder {
    pub(crate) fn new(options: RecordOptions) -> Result<Self, EngineError> {
        let made = !options.folder.exists();
        std::fs::create_dir_all(&options.folder).map_err(|error| EngineError::Record {
            path: options.folder.clone(),
            message: format!("cannot make the folder: {error}"),
        })?;
        Ok(Self { options, made, state: Mutex::default() })
    }

    pub(crate) fn begin_step(&self) {
        let mut state = self.state.lock();
        state.steps += 1;
        (state.target_layers, state.draft_layers) = (0, 0);
    }

    /// Notes a call that was just recorded into `commands`, if it is one of those asked for.
    pub(crate) fn call(
        &self,
        problem: &AttentionProblem,
        commands: &mut Commands,
        plan: &Plan,
        io: &AttentionIo<'_>,
    ) -> Result<(), BackendError> {
        let mut state = self.state.lock();
        let layers = match problem.role {
            Role::Target => &mut state.target_layers,
            Role::Draft => &mut state.draft_layers,
        };
        let layer = *layers;
        *layers += 1;
        let step = state.steps.saturating_sub(1);
        if layer != self.options.layer || self.options.step.is_some_and(|wanted| wanted != step) {
            return Ok(());
        }
        let rows = u64::from(plan.batch().rows());
        let heads = u64::from(problem.kind.query_heads());
        let mut start = |slice: BufferSlice<'_>, bytes: u64| -> Result<Readback, BackendError> {
            Ok(commands.read_back(slice.buffer().slice(slice.offset(), bytes)?)?)
        };
        let q = start(io.q, rows * heads * u64::from(problem.kind.query_dim()) * problem.dtype.bytes())?;
        let out = start(io.out, rows * heads * u64::from(problem.kind.output_dim()) * 4)?;
        let k_cache = start(io.k_cache, io.k_cache.bytes())?;
        let v_cache = match problem.kind {
            AttentionKind::Mla { .. } => None,
            _ => Some(start(io.v_cache, io.v_cache.bytes())?),
        };
        state.pending.push(Pending {
            name: format!("step{step:04}-{}-{}-layer{layer:02}.safetensors", problem.role, problem.phase),
            problem: problem.clone(),
            batch: plan.batch().clone(),
            q,
            k_cache,
            v_cache,
            out,
        });
        Ok(())
    }

    /// Writes what was submitted.
    pub(crate) fn write(&self) -> Result<(), EngineError> {
        let pending = std::mem::take(&mut self.state.lock().pending);
        for call in pending {
            let path = self.options.folder.join(&call.name);
            let (batch, pages) = used_pages(&call.batch);
            let k_cache = gather(&call.k_cache.wait()?, &pages, call.batch.pool_pages);
            let v_cache = match call.v_cache {
                Some(v_cache) => gather(&v_cache.wait()?, &pages, call.batch.pool_pages),
                None => Vec::new(),
            };
            let mut case = Case::new(call.problem, batch, call.q.wait()?, k_cache, v_cache);
            case.out = Some(call.out.wait_as::<f32>()?);
            case.save(&path).map_err(|error| EngineError::Record { path, message: error.to_string() })?;
            self.state.lock().written += 1;
        }
        Ok(())
    }
}

impl Drop for Recorder {
    /// Says so where a run had no such call, and leaves no empty folder behind.
    fn drop(&mut self) {
        let State { steps, written: 0, .. } = *self.state.get_mut() else { return };
        if steps > 0 {
            let RecordOptions { layer, step, .. } = &self.options;
            let step = step.map(|step| format!(" at step {step}")).unwrap_or_default();
            tracing::warn!(
                "nothing was recorded: none of the run's {steps} steps called attention of layer {layer}{step}"
            );
        }
        if self.made {
            // A folder that somebody else has put something into stays.
            let _ = std::fs::remove_dir(&self.options.folder);
        }
    }
}

/// The same batch over a pool of just the pages it uses, and those pages in their new order.
fn used_pages(batch: &BatchLayout) -> (BatchLayout, Vec<i32>) {
    let mut pages: Vec<i32> = Vec::new();
    let mut small = batch.clone();
    for page in &mut small.page_table {
        if *page >= 0 {
            let place = pages.iter().position(|other| other == page).unwrap_or_else(|| {
                pages.push(*page);
                pages.len() - 1
            });
            *page = i32::try_from(place).unwrap_or(i32::MAX);
        }
    }
    small.pool_pages = pages.len() as u32;
    (small, pages)
}

fn gather(cache: &[u8], pages: &[i32], pool_pages: u32) -> Vec<u8> {
    let bytes = cache.len() / (pool_pages.max(1) as usize);
    pages.iter().flat_map(|page| &cache[*page as usize * bytes..][..bytes]).copied().collect()
}
