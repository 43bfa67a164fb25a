//! Which layout a cache gets: one that everybody reads who shares it.

use polyattn_device::DeviceFacts;

use crate::{AttentionProblem, Decline, KvLayout, Policy, Registry, ResolveError, ResolvedLayer, Selection, select};

/// Somebody who reads a cache, and the layouts it reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reader {
    /// Role, phase and layer, in words.
    pub problem: String,
    /// The backend's name.
    pub backend: &'static str,
    /// The layouts it reads, in order of preference.
    pub layouts: &'static [KvLayout],
}

impl Reader {
    pub(crate) fn of(layer: &ResolvedLayer) -> Self {
        Self::new(&layer.problem, &layer.backend)
    }

    fn new(problem: &AttentionProblem, backend: &crate::RegisteredBackend) -> Self {
        let layouts = backend.backend.capabilities().kv_layouts;
        Self { problem: problem.described(), backend: backend.name(), layouts }
    }
}

/// The readers of one cache have no layout in common.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no KV layout suits all who read the cache {cache}: {}", list(.readers))]
pub struct LayoutError {
    /// Which cache, in words.
    pub cache: String,
    /// Who wants what.
    pub readers: Vec<Reader>,
}

fn list(readers: &[Reader]) -> String {
    let one = |reader: &Reader| {
        let layouts: Vec<_> = reader.layouts.iter().map(|layout| layout.name()).collect();
        format!("{} on '{}' reads {}", reader.problem, reader.backend, layouts.join(", "))
    };
    readers.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// What is known of a layout before its readers are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// This one among equals.
    Prefer(KvLayout),
    /// This one alone.
    Require(KvLayout),
}

/// Backends for the phases of one layer kind, each problem with its policy, over one cache. The layout is the one under
/// which the best backends serve: by their places in the registry, then by their own order of preference.
pub(crate) fn agree(
    layers: &[(AttentionProblem, Policy)],
    wish: Option<Wish>,
    device: &DeviceFacts,
    registry: &Registry,
) -> Result<Vec<ResolvedLayer>, ResolveError> {
    let Some(all) = layers.first().map(|(problem, _)| KvLayout::of(problem.kind)) else { return Ok(Vec::new()) };
    let mut candidates = all.to_vec();
    match wish {
        Some(Wish::Require(only)) => candidates = vec![only],
        Some(Wish::Prefer(first)) => candidates.sort_by_key(|layout| *layout != first),
        None => {}
    }
    let mut best: Option<(Cost, Vec<ResolvedLayer>)> = None;
    // For each problem, who serves it under some layout.
    let mut readers: Vec<Option<Reader>> = vec![None; layers.len()];
    let mut first_error = None;
    for layout in &candidates {
        let mut cost = Cost::default();
        let mut served = Vec::new();
        for ((problem, policy), reader) in layers.iter().zip(&mut readers) {
            let mut problem = problem.clone();
            problem.kv_layout = *layout;
            match select(&problem, device, registry, policy) {
                Ok(selection) => {
                    cost.add(&selection, policy, *layout, wish);
                    reader.get_or_insert_with(|| Reader::new(&problem, &selection.backend));
                    let Selection { backend, declined, .. } = selection;
                    served.push(ResolvedLayer { problem, backend, policy: policy.clone(), declined });
                }
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        if served.len() == layers.len() {
            let ideal = cost == Cost::default();
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, served));
            }
            if ideal {
                break;
            }
        }
    }
    match (best, first_error) {
        (Some((_, served)), _) => Ok(served),
        (None, Some(error)) if readers.iter().any(Option::is_none) => Err(error.into()),
        _ => {
            let cache = format!("of layer '{}'", layers[0].0.layer);
            Err(LayoutError { cache, readers: readers.into_iter().flatten().collect() }.into())
        }
    }
}

/// What a layout costs those who read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    /// Better backends that decline because of the layout alone.
    lost: usize,
    /// Places in the readers' orders of preference.
    preference: usize,
}

impl Cost {
    fn add(&mut self, selection: &Selection, policy: &Policy, layout: KvLayout, wish: Option<Wish>) {
        // The declined are in the registry's order, and the one that was taken is not among them.
        self.lost += selection
            .declined
            .iter()
            .enumerate()
            .filter(|(_, one)| matches!(one.reasons[..], [Decline::KvLayout(_)]))
            .filter(|(place, one)| match policy {
                Policy::Auto => *place < selection.rank,
                Policy::Prefer(name) => *place < selection.rank || one.backend == name.as_str(),
                Policy::Require(_) => false,
            })
            .count();
        if wish != Some(Wish::Prefer(layout)) {
            let layouts = selection.backend.backend.capabilities().kv_layouts;
            self.preference += layouts.iter().position(|one| *one == layout).unwrap_or(layouts.len());
        }
    }
}
