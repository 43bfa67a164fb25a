use std::collections::HashMap;

use polyattn_api::{
    Commands, Draft, DraftSequence, Drafter, Outcome, PrefixReuse, Proposal, ProposeContext, ProposerError, TapSpec,
    TreeWish,
};

use crate::Choose;

/// Weight of a step in the running mean of accepted tokens.
const NEWEST: f64 = 0.2;

/// A look-up in front of another drafter.
#[derive(Debug)]
pub struct CombinedDrafter {
    choose: Choose,
    look_up: Box<dyn Drafter>,
    model: Box<dyn Drafter>,
    running: HashMap<u64, Running>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Running {
    /// Whether the model drafted in the step under way.
    by_model: bool,
    /// Tokens of the model that stood, lately; `None` before its first draft.
    accepted: Option<f64>,
}

impl CombinedDrafter {
    /// Drafts by `look_up` or by `model`.
    #[must_use]
    pub fn new(choose: Choose, look_up: Box<dyn Drafter>, model: Box<dyn Drafter>) -> Self {
        Self { choose, look_up, model, running: HashMap::new() }
    }

    fn prefers(&self, sequence: u64, found: &Draft) -> bool {
        if found.is_empty() {
            return false;
        }
        let accepted = self.running.get(&sequence).and_then(|running| running.accepted);
        match (self.choose, accepted) {
            // The model is worth a try before it is judged.
            (Choose::Confident, None) => false,
            (Choose::Confident, Some(accepted)) => expected(found) >= accepted,
            _ => true,
        }
    }
}

/// Tokens that stand, to be expected: the sum of the probabilities of the likeliest path's prefixes.
fn expected(draft: &Draft) -> f64 {
    let (mut sum, mut probability, mut node) = (0.0, 1.0, None);
    let confidence = |node: u32| draft.confidence.get(node as usize).copied().unwrap_or(1.0);
    while let Some(next) = draft.children(node).max_by(|a, b| confidence(*a).total_cmp(&confidence(*b))) {
        probability *= confidence(next);
        sum += probability;
        node = Some(next);
    }
    sum
}

impl Drafter for CombinedDrafter {
    fn taps(&self) -> &TapSpec {
        self.model.taps()
    }

    fn max_tokens(&self) -> u32 {
        self.model.max_tokens()
    }

    fn reuse(&self) -> PrefixReuse {
        self.model.reuse()
    }

    fn default_tokens(&self) -> u32 {
        self.model.default_tokens()
    }

    fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
        // A look-up may find more than the model can draft, which is what the engine has room for.
        let most = self.max_tokens();
        let mut narrow = context.sequences.to_vec();
        narrow.iter_mut().for_each(|one| one.width = one.width.min(most));
        let mut look_up = ProposeContext::new(context.commands, &narrow, context.target).with_tree(context.tree);
        let found = self.look_up.propose(&mut look_up)?;
        let mut drafts = to_host(found, context.commands, &narrow, context.tree)?;
        drafts.resize(context.sequences.len(), Draft::default());
        let mut left: Vec<DraftSequence<'_>> = Vec::new();
        let mut places: Vec<usize> = Vec::new();
        for (place, sequence) in context.sequences.iter().enumerate() {
            let by_model = !self.prefers(sequence.id, &drafts[place]);
            self.running.entry(sequence.id).or_default().by_model = by_model;
            if by_model {
                left.push(*sequence);
                places.push(place);
            }
        }
        if left.is_empty() {
            return Ok(Proposal::Host(drafts));
        }
        if left.len() == context.sequences.len() {
            // Nothing of it need be known to the host.
            return self.model.propose(context);
        }
        let mut rest = ProposeContext::new(context.commands, &left, context.target).with_tree(context.tree);
        let proposal = self.model.propose(&mut rest)?;
        for (place, draft) in places.into_iter().zip(to_host(proposal, context.commands, &left, context.tree)?) {
            drafts[place] = draft;
        }
        Ok(Proposal::Host(drafts))
    }

    fn commit(&mut self, outcome: &mut Outcome<'_>) -> Result<(), ProposerError> {
        for sequence in outcome.sequences {
            let running = self.running.entry(sequence.id).or_default();
            if std::mem::take(&mut running.by_model) {
                let accepted = f64::from(sequence.count().saturating_sub(1));
                let mean = running.accepted.map_or(accepted, |mean| mean + NEWEST * (accepted - mean));
                running.accepted = Some(mean);
            }
        }
        self.look_up.commit(outcome)?;
        self.model.commit(outcome)
    }

    fn forget(&mut self, sequence: u64) {
        self.running.remove(&sequence);
        self.look_up.forget(sequence);
        self.model.forget(sequence);
    }
}

/// A proposal as the host knows it.
fn to_host(
    proposal: Proposal,
    commands: &mut Commands,
    sequences: &[DraftSequence<'_>],
    tree: Option<TreeWish<'_>>,
) -> Result<Vec<Draft>, ProposerError> {
    match (proposal, tree) {
        (Proposal::Host(drafts), _) => Ok(drafts),
        (Proposal::Device { ids, stride, counts }, _) => {
            let readback = commands.read_back(ids.whole())?;
            commands.flush()?;
            let ids = readback.wait_as::<u32>()?;
            let rows = counts.iter().enumerate().map(|(row, count)| {
                let first = row * stride as usize + 1;
                Draft::from(ids.get(first..first + *count as usize).unwrap_or(&[]).to_vec())
            });
            Ok(rows.collect())
        }
        (Proposal::Marginals(marginals), Some(wish)) => Ok(marginals
            .iter()
            .zip(sequences)
            .map(|(marginals, sequence)| wish.builder.build(marginals, wish.nodes, sequence.width))
            .collect()),
        (other, _) => Err(ProposerError::Unsupported(format!("no draft can be made of {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use polyattn_api::{
        CommittedRows, Device, Draft, DraftSequence, Drafter, Outcome, Proposal, ProposeContext, ProposerError,
        TapSpec, TargetServices,
    };

    use super::{Choose, CombinedDrafter, expected};

    /// Drafts the same for everybody, and counts how often it was asked.
    #[derive(Debug, Default)]
    struct Same {
        draft: Draft,
        taps: TapSpec,
    }

    impl Drafter for Same {
        fn taps(&self) -> &TapSpec {
            &self.taps
        }
        fn max_tokens(&self) -> u32 {
            8
        }
        fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
            // The look-up finds something for even sequences alone.
            let odd = |id: u64| !id.is_multiple_of(2);
            let draft = |one: &DraftSequence<'_>| if odd(one.id) { Draft::default() } else { self.draft.clone() };
            Ok(Proposal::Host(context.sequences.iter().map(draft).collect()))
        }
        fn commit(&mut self, _: &mut Outcome<'_>) -> Result<(), ProposerError> {
            Ok(())
        }
    }

    #[derive(Debug)]
    struct Model(TapSpec);

    impl Drafter for Model {
        fn taps(&self) -> &TapSpec {
            &self.0
        }
        fn max_tokens(&self) -> u32 {
            8
        }
        fn propose(&mut self, context: &mut ProposeContext<'_>) -> Result<Proposal, ProposerError> {
            // On the device, as models do.
            let rows = context.sequences.len();
            let ids = context.commands.device().alloc(rows as u64 * 12, "ids")?;
            let words: Vec<u32> = context.sequences.iter().flat_map(|one| [0, 70, 71 + one.id as u32]).collect();
            context.commands.device().write(&ids, 0, &words)?;
            Ok(Proposal::Device { ids, stride: 3, counts: vec![2; rows] })
        }
        fn commit(&mut self, _: &mut Outcome<'_>) -> Result<(), ProposerError> {
            Ok(())
        }
    }

    #[derive(Debug)]
    struct Nothing;

    impl TargetServices for Nothing {
        fn embed(
            &self,
            _: &mut polyattn_api::Commands,
            _: polyattn_api::BufferSlice<'_>,
            _: u32,
            _: polyattn_api::BufferSlice<'_>,
        ) -> Result<(), ProposerError> {
            Ok(())
        }
        fn head_argmax(
            &self,
            _: &mut polyattn_api::Commands,
            _: polyattn_api::BufferSlice<'_>,
            _: u32,
            _: u32,
            _: polyattn_api::BufferSlice<'_>,
        ) -> Result<(), ProposerError> {
            Ok(())
        }
    }

    fn propose(drafter: &mut CombinedDrafter, ids: &[u64]) -> Proposal {
        let device = Device::cpu();
        let mut commands = device.commands().unwrap();
        let sequences: Vec<_> = ids.iter().map(|id| DraftSequence::new(*id, &[1], 8, &[])).collect();
        drafter.propose(&mut ProposeContext::new(&mut commands, &sequences, &Nothing)).unwrap()
    }

    fn tokens(proposal: &Proposal) -> Vec<Vec<u32>> {
        let Proposal::Host(drafts) = proposal else { panic!("{proposal:?} is not on the host") };
        drafts.iter().map(|draft| draft.tokens.clone()).collect()
    }

    #[test]
    fn the_first_that_has_something() {
        let look_up = Same { draft: vec![5, 6].into(), ..Same::default() };
        let mut drafter = CombinedDrafter::new(Choose::First, Box::new(look_up), Box::new(Model(TapSpec::default())));
        assert_eq!(tokens(&propose(&mut drafter, &[0, 1, 2])), [vec![5, 6], vec![70, 72], vec![5, 6]]);
        assert_eq!(tokens(&propose(&mut drafter, &[0, 4])), [vec![5, 6], vec![5, 6]]);
        // Where the model drafts for all, its ids stay on the device.
        assert!(matches!(propose(&mut drafter, &[1, 3]), Proposal::Device { .. }));
    }

    #[test]
    fn the_one_that_expects_more() {
        let draft = Draft { confidence: vec![0.5, 0.5], ..vec![5, 6].into() };
        assert_eq!(expected(&draft), 0.75);
        let look_up = Same { draft, ..Same::default() };
        let mut drafter =
            CombinedDrafter::new(Choose::Confident, Box::new(look_up), Box::new(Model(TapSpec::default())));
        let commit = |drafter: &mut CombinedDrafter, rows: &[u32]| {
            let device = Device::cpu();
            let mut commands = device.commands().unwrap();
            let committed = [CommittedRows::new(0, rows, 1, &[1; 9], &[])];
            drafter.commit(&mut Outcome::new(&mut commands, &committed, None, &Nothing)).unwrap();
        };
        // The model comes first, has one token accepted, and stays.
        assert!(matches!(propose(&mut drafter, &[0]), Proposal::Device { .. }));
        commit(&mut drafter, &[0, 1]);
        assert!(matches!(propose(&mut drafter, &[0]), Proposal::Device { .. }));
        // None for two steps: 1, 0.8, 0.64 on average, which is less than 0.75.
        commit(&mut drafter, &[0]);
        assert!(matches!(propose(&mut drafter, &[0]), Proposal::Device { .. }));
        commit(&mut drafter, &[0]);
        assert_eq!(tokens(&propose(&mut drafter, &[0])), [vec![5, 6]]);
        // What the look-up had accepted says nothing of the model.
        commit(&mut drafter, &[0, 1, 2]);
        assert_eq!(tokens(&propose(&mut drafter, &[0])), [vec![5, 6]]);
        drafter.forget(0);
        assert!(matches!(propose(&mut drafter, &[0]), Proposal::Device { .. }));
    }
}
