use std::error::Error;

use polyattn_api::{
    BufferSlice, Commands, CommittedRows, Device, DraftSequence, EngineConfig, LoadContext, Outcome, Proposal,
    ProposeContext, ProposerError, Registry, TargetFacts, TargetServices,
};

/// What came of [`generate`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The prompt and the new tokens.
    pub tokens: Vec<u32>,
    /// Passes of the target.
    pub passes: usize,
}

/// An engine without an embedding or a head to lend: its drafters must do without.
#[derive(Debug)]
struct NothingToLend;

impl TargetServices for NothingToLend {
    fn embed(
        &self,
        _commands: &mut Commands,
        _ids: BufferSlice<'_>,
        _rows: u32,
        _out: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        Err(ProposerError::Unsupported("this engine lends no embedding".into()))
    }

    fn head_argmax(
        &self,
        _commands: &mut Commands,
        _hidden: BufferSlice<'_>,
        _rows: u32,
        _first: u32,
        _ids: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        Err(ProposerError::Unsupported("this engine lends no output head".into()))
    }
}

/// `count` tokens behind `prompt`, as `target` chooses them: it answers, for each row of a pass, the token that follows
/// the text so far. The proposer of this name drafts; what the target would not have said is thrown away.
///
/// # Errors
/// An unknown proposer, one that needs more than tokens, or one that fails.
pub fn generate(
    proposer: &str,
    config: &EngineConfig,
    prompt: &[u32],
    count: usize,
    target: impl Fn(&[u32]) -> u32,
) -> Result<Generated, Box<dyn Error>> {
    let device = Device::cpu();
    let registry = Registry::global()?;
    let entry = registry
        .proposer(proposer)
        .ok_or_else(|| format!("no proposer '{proposer}'; there are: {}", registry.proposer_names()))?;
    let needs = entry.proposer.requirements();
    if needs.taps || needs.last_hidden || needs.checkpoint || needs.draft_attention {
        return Err(format!("proposer '{proposer}' needs a model, this engine has tokens alone").into());
    }
    let facts = TargetFacts::new(1, 1, 1 << 16, 1 << 16);
    let draft_config = entry.proposer.draft_config(config);
    let mut drafter = entry.proposer.load(&LoadContext::new(&device, &facts, &draft_config))?;

    let mut tokens = prompt.to_vec();
    let mut committed = 0;
    let mut passes = 0;
    while tokens.len() < prompt.len() + count {
        let mut commands = device.commands()?;
        // Every token but the last, the anchor, has been committed when a draft is asked for.
        let rows = (tokens.len() - 1 - committed) as u32;
        let rows: Vec<u32> = (0..rows).collect();
        let accepted = [CommittedRows::new(0, &rows, committed as u32, &tokens, &[])];
        drafter.commit(&mut Outcome::new(&mut commands, &accepted, None, &NothingToLend))?;
        committed = tokens.len() - 1;

        let room = prompt.len() + count - tokens.len() - 1;
        let width = drafter.max_tokens().min(room as u32);
        let sequence = [DraftSequence::new(0, &tokens, width, &[])];
        let proposal = drafter.propose(&mut ProposeContext::new(&mut commands, &sequence, &NothingToLend))?;
        commands.submit()?;
        let Proposal::Host(drafts) = proposal else {
            return Err(
                format!("proposer '{proposer}' drafts on the device, this engine reads drafts on the host").into()
            );
        };

        // One pass answers the anchor and every drafted row; a draft holds as far as the target agrees.
        passes += 1;
        for draft in drafts.into_iter().flat_map(|draft| draft.tokens).map(Some).chain([None]) {
            let said = target(&tokens);
            tokens.push(said);
            if draft != Some(said) {
                break;
            }
        }
    }
    drafter.forget(0);
    Ok(Generated { tokens, passes })
}
