//! What a proposer says of itself, against what it does.

use std::path::Path;

use polyattn_api::{BackendChoice, BackendName, EngineConfig, Phase, ProposerError, TargetFacts, default_draft_config};

use super::{drive::Stage, failed, subject::Bench};
use crate::Failure;

/// Tokens that no engine has room for in one draft.
const TOO_WIDE: u32 = 128;

/// The requirements are those of the loaded drafter: too few, and an engine would not provide; too many, and it would
/// demand of users what is not needed.
pub(super) fn requirements_are_honest(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let needs = *bench.proposer.proposer.requirements();
    if *bench.proposer.proposer.requirements() != needs {
        return Err(Failure::new("requirements() answers differently when asked again"));
    }
    let drive = stage.drafter()?;
    let drafter = &drive.drafter;
    let taps = drafter.taps();
    let layers = stage.ground.facts.layers;
    if needs.taps == taps.layers.is_empty() {
        return Err(Failure::new(format!(
            "requirements() says taps: {}, the drafter taps layers {:?}",
            needs.taps, taps.layers
        )));
    }
    if needs.last_hidden != taps.last_hidden {
        return Err(Failure::new(format!(
            "requirements() says last_hidden: {}, the drafter's taps say {}",
            needs.last_hidden, taps.last_hidden
        )));
    }
    if let Some(tap) = taps.layers.iter().find(|tap| **tap >= layers) {
        return Err(Failure::new(format!("it taps layer {tap} of a target of {layers} layers")));
    }
    let (most, usual) = (drafter.max_tokens(), drafter.default_tokens());
    if most == 0 || most >= TOO_WIDE || usual == 0 || usual > most {
        return Err(Failure::new(format!(
            "max_tokens() is {most} and default_tokens() {usual}: an engine takes 1 to {}, and no more by default than \
             at the most",
            TOO_WIDE - 1
        )));
    }
    let config = stage.ground.config()?;
    let described = config.speculative.as_ref().and_then(|speculative| speculative.draft.as_ref());
    if needs.draft_attention != described.is_some() {
        return Err(Failure::new(format!(
            "requirements() says draft_attention: {}, describe() gives {} attention layers",
            needs.draft_attention,
            described.map_or("no".into(), |model| model.layers.len().to_string())
        )));
    }
    Ok(())
}

/// Non-causal attention is asked for in the hook or by a layer exactly where it is required: otherwise a causal backend
/// would be chosen in silence, or bidirectional ones demanded for nothing.
pub(super) fn non_causal_is_asked_for(bench: &Bench) -> Result<(), Failure> {
    let config = bench.ground()?.config()?;
    let proposer = &bench.proposer.proposer;
    let draft = proposer.draft_config(&config);
    let by_layer = draft.model.layers.iter().any(|layer| layer.causal == Some(false));
    let described = config.speculative.as_ref().is_some_and(|speculative| speculative.draft.is_some());
    let asks = draft.attention.use_non_causal || (described && by_layer);
    let needs = proposer.requirements().non_causal;
    if needs != asks {
        return Err(Failure::new(format!(
            "requirements() says non_causal: {needs}, draft_config() gives use_non_causal: {} and {} a layer that says \
             causal: false",
            draft.attention.use_non_causal,
            if described && by_layer { "there is" } else { "there is not" }
        )));
    }
    Ok(())
}

/// The draft's backend is the speculative section's and never the target's: four rows, each with a target that is causal
/// and one that is not, and each with a mixture-of-experts backend of its own.
pub(super) fn the_targets_backend_is_not_inherited(bench: &Bench) -> Result<(), Failure> {
    let base = bench.ground()?.config()?;
    let plain = bench.proposer.proposer.draft_config(&base);
    for target in [None, Some("of-the-target")] {
        for draft in [None, Some("of-the-draft")] {
            for non_causal in [false, true] {
                for moe in [None, Some("of-the-draft")] {
                    let mut config = base.clone();
                    config.attention.backend = target.and_then(BackendName::parse).into();
                    if let Some(name) = target.and_then(BackendName::parse) {
                        let attention = &mut config.attention;
                        attention.backend_per_phase.insert(Phase::Verify, BackendChoice::Require(name.clone()));
                        attention.backend_per_kind.insert("full".into(), BackendChoice::Require(name));
                    }
                    config.attention.use_non_causal = non_causal;
                    config.kernel.moe_backend = Some("of-the-target".into());
                    if let Some(speculative) = &mut config.speculative {
                        speculative.attention_backend = draft.and_then(BackendName::parse);
                        speculative.moe_backend = moe.map(str::to_owned);
                    }
                    let rows = format!(
                        "attention.backend {target:?}, speculative.attention_backend {draft:?}, use_non_causal \
                         {non_causal}, speculative.moe_backend {moe:?}"
                    );
                    check_hook(bench, &config, &plain, &rows)?;
                }
            }
        }
    }
    Ok(())
}

fn check_hook(bench: &Bench, config: &EngineConfig, plain: &EngineConfig, rows: &str) -> Result<(), Failure> {
    let proposer = &bench.proposer.proposer;
    let before = config.clone();
    let got = proposer.draft_config(config);
    if *config != before {
        return Err(Failure::new(format!("{rows}: draft_config() changes the target's configuration")));
    }
    if got != proposer.draft_config(config) {
        return Err(Failure::new(format!("{rows}: draft_config() answers differently when asked again")));
    }
    let default = default_draft_config(config);
    let name = |choice: &BackendChoice| match choice {
        BackendChoice::Auto => "automatic".to_owned(),
        BackendChoice::Prefer(name) => format!("prefer '{name}'"),
        BackendChoice::Require(name) => format!("'{name}'"),
        _ => format!("{choice:?}"),
    };
    if got.attention.backend != default.attention.backend {
        return Err(Failure::new(format!(
            "{rows}: the draft's backend is {}, it must be {}: what the speculative section says, and nothing of the \
             target's",
            name(&got.attention.backend),
            name(&default.attention.backend)
        )));
    }
    let finer = |config: &EngineConfig| {
        let attention = &config.attention;
        (attention.backend_per_phase.clone(), attention.backend_per_kind.clone())
    };
    if finer(&got) != finer(&default) {
        return Err(Failure::new(format!(
            "{rows}: the draft's backends per phase and kind are {:?}, they must be {:?}: what the speculative section \
             says, and nothing of the target's",
            finer(&got),
            finer(&default)
        )));
    }
    if got.attention.use_non_causal != plain.attention.use_non_causal {
        return Err(Failure::new(format!(
            "{rows}: use_non_causal is {} for the draft, {} where the target is causal",
            got.attention.use_non_causal, plain.attention.use_non_causal
        )));
    }
    if got.kernel.moe_backend != default.kernel.moe_backend {
        return Err(Failure::new(format!(
            "{rows}: the draft's moe_backend is {:?}, it must be {:?}",
            got.kernel.moe_backend, default.kernel.moe_backend
        )));
    }
    if got.speculative.is_some() {
        return Err(Failure::new(format!("{rows}: the draft's configuration has a speculative section of its own")));
    }
    Ok(())
}

/// A draft model that is missing, broken or of another target is an error that says so, and no panic.
pub(super) fn what_cannot_be_loaded_is_an_error(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let proposer = &bench.proposer.proposer;
    let needs = proposer.requirements();
    let without = stage.load(|context| context.checkpoint = None).map(drop);
    match (needs.checkpoint, without) {
        (true, Ok(())) => return Err(Failure::new("requirements() says checkpoint: true, but it loads without one")),
        (true, Err(ProposerError::NoCheckpoint(_))) => {}
        (true, Err(error)) => {
            return Err(Failure::new(format!("without a checkpoint, load() says '{error}' instead of NoCheckpoint")));
        }
        (false, Err(error)) => {
            return Err(Failure::new(format!("requirements() says checkpoint: false, load() without one: {error}")));
        }
        (false, Ok(())) => return Ok(()),
    }

    let folder = tempfile::tempdir().map_err(failed)?;
    let nowhere = folder.path().join("nowhere");
    let garbage = folder.path().join("garbage");
    std::fs::create_dir(&garbage).map_err(failed)?;
    for file in ["config.json", "model.safetensors", "model.gguf"] {
        std::fs::write(garbage.join(file), "]this is no checkpoint[").map_err(failed)?;
    }
    let facts = &stage.ground.facts;
    for path in [&nowhere, &garbage] {
        refuses(&stage, path, facts, &format!("the checkpoint {}", path.display()))?;
    }
    if let Some(checkpoint) = &stage.ground.checkpoint {
        let TargetFacts { layers, hidden_size, vocab_size, context_length, .. } = *facts;
        if needs.taps || needs.last_hidden {
            let wide = TargetFacts::new(layers, hidden_size * 2, vocab_size, context_length);
            refuses(&stage, checkpoint, &wide, "a target twice as wide")?;
        }
        if needs.target_vocabulary {
            refuses(
                &stage,
                checkpoint,
                &TargetFacts::new(layers, hidden_size, 2, context_length),
                "a target of 2 ids",
            )?;
        }
    }
    Ok(())
}

/// That either `describe` or `load` refuses a checkpoint for a target.
fn refuses(stage: &Stage<'_>, checkpoint: &Path, target: &TargetFacts, what: &str) -> Result<(), Failure> {
    if stage.bench.proposer.proposer.describe(checkpoint, target).is_err() {
        return Ok(());
    }
    let loaded = stage.load(|context| {
        context.checkpoint = Some(checkpoint);
        context.target = target;
    });
    match loaded {
        Err(_) => Ok(()),
        Ok(_) => Err(Failure::new(format!("{what}: neither describe() nor load() refuses it"))),
    }
}
