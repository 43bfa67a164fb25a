//! Bits, where they are promised.

use polyattn_api::{BatchLayout, DType, KvDType, Phase};
use polyattn_replay::{Case, Outcome, random::Spec};

use super::{
    Trials,
    subject::{Subject, kind_name},
};
use crate::Failure;

pub(super) fn trials(trials: &mut Trials) {
    let subject = trials.subject.clone();
    let Some(phase) = subject.phases().first().copied() else { return };
    for kind in subject.kinds() {
        let Some(mut spec) = subject.spec(kind) else { continue };
        spec.sequences = vec![(1, 300), (9, 40), (0, 5), (3, 3), (20, 133), (2, 1100)];
        bits(trials, &spec, phase);
        // Halves may have arithmetic of their own.
        if spec.dtype != DType::F16 && subject.formats().contains(&(DType::F16, KvDType::F16)) {
            (spec.dtype, spec.kv_dtype) = (DType::F16, KvDType::F16);
            bits(trials, &spec, phase);
        }
    }
}

fn bits(trials: &mut Trials, spec: &Spec, phase: Phase) {
    let can = trials.subject.can();
    let name = format!("{}/bits/{} over {}", kind_name(spec.kind), spec.dtype, spec.kv_dtype);
    if can.deterministic {
        let spec = spec.clone();
        trials.add(format!("{name}/the same call gives the same bits"), move |subject| {
            let case = subject.case(3, &spec, phase);
            let first = run(subject, &case)?;
            for _ in 0..3 {
                same(subject, &case, &first, &run(subject, &case)?, "again")?;
            }
            Ok(())
        });
    }
    if can.batch_invariant {
        let spec = spec.clone();
        trials.add(format!("{name}/a sequence has the same bits alone"), move |subject| {
            let case = subject.case(4, &spec, phase);
            let all = run(subject, &case)?;
            for sequence in 0..case.batch.sequences() {
                let one = alone(&case, sequence);
                let got = run(subject, &one)?;
                let want = part(&case, &all, sequence);
                same(subject, &one, &want, &got, &format!("sequence {sequence} alone"))?;
            }
            Ok(())
        });
    }
}

fn run(subject: &Subject, case: &Case) -> Result<Outcome, Failure> {
    subject.answer(case)?.ok_or_else(|| Failure::new(format!("it declines: {}", subject.declines_of(case))))
}

fn same(subject: &Subject, case: &Case, want: &Outcome, got: &Outcome, what: &str) -> Result<(), Failure> {
    let differ = |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    let lse = want.lse.as_deref().zip(got.lse.as_deref()).map_or(0, |(a, b)| differ(a, b));
    match (differ(&want.out, &got.out), lse) {
        (0, 0) => Ok(()),
        (out, lse) => Err(subject.failed(case, &format!("{what}: {out} elements and {lse} LSEs have other bits"))),
    }
}

/// One sequence of a case.
fn alone(case: &Case, sequence: usize) -> Case {
    let (start, queries) = case.batch.queries(sequence);
    let mut one = case.clone();
    one.batch = BatchLayout::new(case.batch.page_size, case.batch.pool_pages);
    let pages = &case.batch.page_table[sequence * case.batch.max_pages..][..case.batch.max_pages];
    one.batch.push(queries, case.batch.kv_len[sequence], pages);
    if let Some(tree) = &case.batch.tree {
        let mut own = tree.clone();
        own.bits = tree.bits[start as usize * tree.words..][..queries as usize * tree.words].to_vec();
        one.batch.tree = Some(own);
    }
    let row = (case.problem.kind.query_heads() * case.problem.kind.query_dim()) as usize
        * case.problem.dtype.bytes() as usize;
    one.q = case.q[start as usize * row..][..queries as usize * row].to_vec();
    one
}

/// What an outcome says of one sequence.
fn part(case: &Case, all: &Outcome, sequence: usize) -> Outcome {
    let (start, queries) = case.batch.queries(sequence);
    let heads = case.problem.kind.query_heads() as usize;
    let dim = case.problem.kind.output_dim() as usize;
    let rows = |values: &[f32], width: usize| values[start as usize * width..][..queries as usize * width].to_vec();
    Outcome::new(rows(&all.out, heads * dim), all.lse.as_deref().map(|lse| rows(lse, heads)), 0.0)
}
