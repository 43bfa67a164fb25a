//! Where kernels go wrong.

use polyattn_api::Mask;
use polyattn_replay::{Tolerance, random::Spec};

use super::{Trials, subject::kind_name};
use crate::Failure;

pub(super) fn trials(trials: &mut Trials) {
    let subject = trials.subject.clone();
    let can = subject.can();
    let Some(phase) = subject.phases().first().copied() else { return };
    for kind in subject.kinds() {
        let Some(base) = subject.spec(kind) else { continue };
        let name = kind_name(kind);
        let page = base.page_size;
        let boundary = [page.saturating_sub(1).max(1), page, page + 1, 2 * page, 2 * page + 1];
        let long = [255, 256, 257, 600].map(|length| (1, length));
        for (what, sequences) in [
            ("an empty batch", Vec::new()),
            ("sequences without rows", vec![(0, 9), (0, 0), (0, 40)]),
            ("rows among sequences without rows", vec![(0, 9), (1, 20), (0, 0), (2, 7), (0, 1)]),
            ("one key", vec![(1, 1), (1, 1)]),
            ("pages just full", boundary.iter().map(|length| (1, *length)).collect()),
            ("more rows than a page", vec![(page.min(64) + 1, page.min(64) + 3)]),
            ("lengths far apart", vec![(1, 1), (2, 500), (1, 2), (5, 130)]),
            ("around 256 keys", long.to_vec()),
            ("many sequences", (1..70).map(|length| (1, length)).collect()),
        ] {
            let spec = Spec { sequences, ..base.clone() };
            trials.add(format!("{name}/edges/{what}"), move |subject| subject.check(&subject.case(7, &spec, phase)));
        }
        let spec = base.clone();
        trials.add(format!("{name}/edges/large logits"), move |subject| {
            let mut case = subject.case(8, &spec, phase);
            // Far beyond what exp holds, so that only differences matter. A logit of a thousand has few bits left for them.
            case.problem.scale = 40.0;
            case.tolerance = Tolerance { atol: 1e-2, rtol: 1e-2 };
            subject.check(&case)
        });
        let spec = base.clone();
        trials.add(format!("{name}/edges/a scale of its own"), move |subject| {
            let mut case = subject.case(9, &spec, phase);
            case.problem.scale = 0.37;
            subject.check(&case)
        });
        if can.tree {
            let spec = Spec { mask: Mask::Tree, sequences: vec![(6, 6), (4, 30), (5, 5)], ..base.clone() };
            trials.add(format!("{name}/edges/rows that see nothing"), move |subject| {
                let mut case = subject.case(10, &spec, phase);
                let Some(tree) = &mut case.batch.tree else {
                    return Err(Failure::new("the kit made no tree"));
                };
                // The second row of each sequence; where there is no context, it sees nothing at all.
                let rows = tree.bits.len() / tree.words;
                for row in [1, 7, 11].into_iter().filter(|row| *row < rows) {
                    tree.bits[row * tree.words..][..tree.words].fill(0);
                }
                subject.check(&case)
            });
        }
        if can.tree && can.sinks {
            let spec = Spec { mask: Mask::Tree, sinks: true, sequences: vec![(6, 6), (3, 3)], ..base.clone() };
            trials.add(format!("{name}/edges/rows that see a sink alone"), move |subject| {
                let mut case = subject.case(11, &spec, phase);
                if let Some(tree) = &mut case.batch.tree {
                    tree.bits.fill(0);
                }
                subject.check(&case)
            });
        }
    }
}
