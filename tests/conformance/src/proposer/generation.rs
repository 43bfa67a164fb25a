//! A proposer in the engine: whatever it drafts, the tokens are the target's; and it drafts something worth verifying.

use std::ops::ControlFlow;

use polyattn_engine::{Engine, Generation, Happened, Request, Sampling, StopReason};

use super::{
    failed,
    subject::{Bench, CONTEXT},
};
use crate::Failure;

/// New tokens of a run.
const TOKENS: usize = 24;

/// The gap between the best and the second logit below which two summation orders may choose differently.
const TIE: f32 = 0.1;

fn run(engine: &mut Engine, request: &Request, what: &str) -> Result<Generation, Failure> {
    let generation = engine.generate(request, &mut |_| ControlFlow::Continue(()));
    generation.map_err(|error| Failure::new(format!("{what}: {error}")))
}

/// A greedy request that no end token ends.
fn greedy(prompt: &[u32], tokens: usize) -> Request {
    let mut request = Request::new(prompt.to_vec(), tokens);
    request.stop = Some(Vec::new());
    request
}

/// Widths to try: 1, 2 and the most, and the proposer's own.
fn widths(engine: &mut Engine) -> Result<Vec<u32>, Failure> {
    let Some((name, usual)) = engine.proposer() else { return Err(Failure::new("the engine has no proposer")) };
    let mut widths = vec![1, 2, usual];
    // The most is not told, but it can be asked for.
    let most = (1..128).take_while(|width| engine.set_speculative_tokens(*width).is_ok()).last();
    widths.extend(most);
    widths.retain(|width| most.is_some_and(|most| *width <= most));
    widths.sort_unstable();
    widths.dedup();
    if widths.is_empty() {
        return Err(Failure::new(format!("'{name}' drafts no number of tokens")));
    }
    Ok(widths)
}

fn set_width(engine: &mut Engine, width: u32) -> Result<(), Failure> {
    engine.set_speculative_tokens(width).map_err(failed)
}

/// Greedy tokens are those of plain decoding.
pub(super) fn greedy_tokens_are_the_targets(bench: &Bench) -> Result<(), Failure> {
    let ground = bench.ground()?;
    let mut plain = ground.engine(false, CONTEXT)?;
    let mut drafting = ground.engine(true, CONTEXT)?;
    let widths = widths(&mut drafting)?;
    for (number, prompt) in ground.prompts.iter().enumerate() {
        let request = greedy(prompt, TOKENS);
        let want = run(&mut plain, &request, "plain decoding")?.tokens;
        for width in &widths {
            set_width(&mut drafting, *width)?;
            let what = format!("prompt {number}, {width} tokens a step");
            let got = run(&mut drafting, &request, &what)?;
            same_up_to_ties(&mut plain, prompt, &got.tokens, &want, &what)?;
            let accepted = got.acceptance.as_ref().map_or(0, |acceptance| acceptance.accepted);
            if got.tokens.len() as u64 != 1 + got.steps + accepted {
                return Err(Failure::new(format!(
                    "{what}: {} tokens came of {} steps and {accepted} accepted drafts",
                    got.tokens.len(),
                    got.steps
                )));
            }
        }
    }
    Ok(())
}

/// The same tokens, up to the first place where the target itself is undecided.
fn same_up_to_ties(plain: &mut Engine, prompt: &[u32], got: &[u32], want: &[u32], what: &str) -> Result<(), Failure> {
    let Some(place) = got.iter().zip(want).position(|(a, b)| a != b) else {
        if got.len() == want.len() {
            return Ok(());
        }
        return Err(Failure::new(format!("{what}: {} tokens instead of {}", got.len(), want.len())));
    };
    let text = [prompt, &want[..place]].concat();
    let logits = plain.score(&text).map_err(failed)?;
    let row = &logits[logits.len() - logits.len() / text.len()..];
    let logit = |id: u32| row.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let margin = logit(want[place]) - logit(got[place]);
    if margin < TIE {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{what}: token {place} is {} instead of the target's {}, and no tie: {margin} apart",
        got[place], want[place]
    )))
}

/// With a seed, sampled tokens are those of plain sampling: noise belongs to a position.
pub(super) fn sampled_tokens_are_the_targets(bench: &Bench) -> Result<(), Failure> {
    let ground = bench.ground()?;
    let mut plain = ground.engine(false, CONTEXT)?;
    let mut drafting = ground.engine(true, CONTEXT)?;
    let widths = widths(&mut drafting)?;
    for (number, prompt) in ground.prompts.iter().enumerate() {
        let mut request = greedy(prompt, TOKENS);
        request.sampling =
            Sampling { temperature: 0.8, top_k: Some(20), top_p: 0.95, seed: number as u64, ..Sampling::default() };
        let want = run(&mut plain, &request, "plain sampling")?.tokens;
        for width in &widths {
            set_width(&mut drafting, *width)?;
            let what = format!("prompt {number}, sampled, {width} tokens a step");
            let got = run(&mut drafting, &request, &what)?.tokens;
            if got != want {
                return Err(Failure::new(format!("{what}: {got:?} instead of {want:?}")));
            }
        }
    }
    Ok(())
}

/// A text ends where plain decoding ends it, in the middle of a draft too: at a number of tokens, at an end token, at the
/// end of the context.
pub(super) fn a_text_ends_where_it_must(bench: &Bench) -> Result<(), Failure> {
    let ground = bench.known_ground()?;
    let Some(prompt) = ground.prompts.first() else { return Err(Failure::new("no prompts to generate from")) };
    let mut plain = ground.engine(false, CONTEXT)?;
    let mut drafting = ground.engine(true, CONTEXT)?;
    let all = run(&mut plain, &greedy(prompt, TOKENS), "plain decoding")?.tokens;
    let compare = |plain: &mut Engine, drafting: &mut Engine, request: &Request, what: String| {
        let want = run(plain, request, "plain decoding")?;
        let got = run(drafting, request, &what)?;
        if (got.stop, got.tokens.len()) == (want.stop, want.tokens.len()) {
            return same_up_to_ties(plain, &request.prompt, &got.tokens, &want.tokens, &what);
        }
        let ended = |generation: &Generation| (generation.stop, generation.tokens.len());
        Err(Failure::new(format!("{what}: it ends with {:?} instead of {:?}", ended(&got), ended(&want))))
    };
    for tokens in 1..=10 {
        compare(&mut plain, &mut drafting, &greedy(prompt, tokens), format!("{tokens} tokens asked for"))?;
    }
    for (place, end) in all.iter().enumerate().take(10) {
        let mut request = greedy(prompt, TOKENS);
        request.stop = Some(vec![*end]);
        compare(&mut plain, &mut drafting, &request, format!("an end token in place {place}"))?;
    }
    for room in 1..8 {
        let context = prompt.len() as u32 + room;
        let (mut plain, mut drafting) = (ground.engine(false, context)?, ground.engine(true, context)?);
        let what = format!("a context with room for {room} tokens");
        compare(&mut plain, &mut drafting, &greedy(prompt, TOKENS), what)?;
    }
    Ok(())
}

/// A request leaves nothing behind: repeated, it has the same tokens and the same drafts, unless the proposer says that it
/// remembers requests; then the same tokens.
pub(super) fn requests_leave_no_trace(bench: &Bench) -> Result<(), Failure> {
    let ground = bench.known_ground()?;
    let mut engine = ground.engine(true, CONTEXT)?;
    let remembers = bench.proposer.proposer.requirements().remembers_requests;
    let mut first = Vec::new();
    for round in 0..3 {
        for (number, prompt) in ground.prompts.iter().enumerate() {
            let what = format!("prompt {number}, round {round}");
            let got = run(&mut engine, &greedy(prompt, TOKENS), &what)?;
            let drafts = got.acceptance.filter(|_| !remembers);
            let got = (got.tokens, drafts.map(|acceptance| (acceptance.drafted, acceptance.accepted)));
            match first.get(number) {
                None => first.push(got),
                Some(before) if *before == got => {}
                Some(before) if before.0 != got.0 => {
                    return Err(Failure::new(format!("{what}: {:?} instead of {:?}", got.0, before.0)));
                }
                Some(before) => {
                    return Err(Failure::new(format!(
                        "{what}: {:?} (drafted, accepted) instead of {:?} in the first round",
                        got.1, before.1
                    )));
                }
            }
        }
    }
    Ok(())
}

/// Something is drafted, and as much of it accepted as the author promised.
pub(super) fn enough_is_accepted(bench: &Bench) -> Result<(), Failure> {
    let ground = bench.known_ground()?;
    let mut engine = ground.engine(true, CONTEXT)?;
    let (mut steps, mut drafted, mut accepted) = (0, 0, 0);
    // Without a target of the author's, the prompt is known to be gone on with; others are not.
    let known = if bench.subject.has_target() { &ground.prompts[..] } else { &ground.prompts[..1] };
    for prompt in known {
        let generation = run(&mut engine, &greedy(prompt, 2 * TOKENS), "with drafts")?;
        if generation.stop != StopReason::Length {
            return Err(Failure::new(format!("a run ended early: {:?}", generation.stop)));
        }
        if let Some(acceptance) = generation.acceptance {
            steps += acceptance.drafted_steps;
            drafted += acceptance.drafted;
            accepted += acceptance.accepted;
        }
    }
    if drafted == 0 {
        return Err(Failure::new("nothing was drafted in any step, though the text repeats itself"));
    }
    let mean = 1.0 + accepted as f64 / steps as f64;
    match bench.subject.floor {
        Some(floor) if mean < floor => Err(Failure::new(format!(
            "the mean acceptance length is {mean:.2}, below the floor of {floor}: {accepted} of {drafted} drafted \
             tokens were accepted in {steps} steps"
        ))),
        _ => Ok(()),
    }
}

/// What ran is what was declared: attention of the draft's own, or none.
pub(super) fn the_backends_that_ran_are_told(bench: &Bench) -> Result<(), Failure> {
    let ground = bench.known_ground()?;
    let mut engine = ground.engine(true, CONTEXT)?;
    let Some(prompt) = ground.prompts.first() else { return Err(Failure::new("no prompts to generate from")) };
    let generation = run(&mut engine, &greedy(prompt, TOKENS), "with drafts")?;
    let ran = !generation.backends.draft.0.is_empty();
    let needs = bench.proposer.proposer.requirements().draft_attention;
    let drafted = generation.acceptance.is_some_and(|acceptance| acceptance.drafted > 0);
    if ran != (needs && drafted) {
        return Err(Failure::new(format!(
            "requirements() says draft_attention: {needs}, and the draft ran attention on {:?}",
            generation.backends.draft.0
        )));
    }
    Ok(())
}

/// Several requests at once, in chains and in trees, greedy and drawn: whatever is drafted for a batch, each has the tokens
/// that it has alone, and nobody loses the drafter on the way.
pub(super) fn batches_change_no_token(bench: &Bench) -> Result<(), Failure> {
    let ground = bench.ground()?;
    let mut plain = ground.engine(false, CONTEXT)?;
    let trees = bench.proposer.proposer.requirements().drafts_trees;
    for tree in [false, true].into_iter().filter(|tree| trees || !tree) {
        let Some(mut drafting) = ground.batch_engine(tree, "match")? else { return Ok(()) };
        for sampling in [Sampling::default(), Sampling { temperature: 0.8, seed: 3, ..Sampling::default() }] {
            let requests = ground.prompts.iter().map(|prompt| Request { sampling, ..greedy(prompt, TOKENS) });
            let requests: Vec<_> = requests.collect();
            let shape = if tree { "trees" } else { "chains" };
            let got = run_together(&mut drafting, &requests)?;
            for ((number, request), got) in requests.iter().enumerate().zip(got) {
                let what = format!("prompt {number} beside others, in {shape}, temperature {}", sampling.temperature);
                if got.drafter_lost {
                    return Err(Failure::new(format!("{what}: the drafter failed on the way")));
                }
                let want = run(&mut plain, request, "plain decoding")?;
                if sampling.is_greedy() {
                    same_up_to_ties(&mut plain, &request.prompt, &got.tokens, &want.tokens, &what)?;
                } else if got.tokens != want.tokens {
                    return Err(Failure::new(format!("{what}: {:?} instead of {:?}", got.tokens, want.tokens)));
                }
            }
        }
    }
    // Drawn drafts are other tokens of the same distribution: that nothing fails is what can be seen here.
    for rule in ["rejection", "block"] {
        let Some(mut drafting) = ground.batch_engine(false, rule)? else { return Ok(()) };
        let sampling = Sampling { temperature: 0.9, seed: 5, ..Sampling::default() };
        let requests: Vec<_> =
            ground.prompts.iter().map(|prompt| Request { sampling, ..greedy(prompt, TOKENS) }).collect();
        for got in run_together(&mut drafting, &requests)? {
            if got.drafter_lost || got.tokens.len() != TOKENS {
                let count = got.tokens.len();
                return Err(Failure::new(format!(
                    "drawn drafts under '{rule}': the drafter failed after {count} tokens"
                )));
            }
        }
    }
    Ok(())
}

fn run_together(engine: &mut Engine, requests: &[Request]) -> Result<Vec<Generation>, Failure> {
    let ids = requests.iter().map(|request| engine.add_request(request.clone()).map_err(failed));
    let ids: Vec<_> = ids.collect::<Result<_, _>>()?;
    let mut done: Vec<Option<Generation>> = requests.iter().map(|_| None).collect();
    while !engine.is_idle() {
        for event in engine.step() {
            let Some(place) = ids.iter().position(|id| *id == event.request) else { continue };
            match event.what {
                Happened::Finished(generation) => done[place] = Some(*generation),
                Happened::Failed(error) => return Err(failed(error)),
                _ => {}
            }
        }
    }
    done.into_iter().map(|one| one.ok_or_else(|| Failure::new("a request never ended"))).collect()
}
