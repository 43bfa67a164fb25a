//! What a drafter drafts, driven by hand: the same history gives the same draft, however it came about.

use polyattn_api::ProposerError;

use super::{drive::Stage, subject::Bench, text::Part};
use crate::Failure;

/// Tokens of a text when its first draft is asked for: over the end of a page.
const PROMPT: usize = 21;

/// Each number of accepted tokens leaves a drafter as if it had been given the accepted text alone.
pub(super) fn rejected_rows_leave_no_trace(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let width = stage.drafter()?.width();
    for accepted in 0..=width as usize {
        let mut drive = stage.drafter()?;
        let mut text = stage.text(0, PROMPT, 1);
        drive.commit(&[Part::all(&text)])?;
        // The second step keeps less where the first kept more.
        for accepted in [accepted, (width as usize - accepted) / 2] {
            let drafts = drive.propose(&[(&text, width)])?;
            let accepted = accepted.min(drafts.only().len());
            drive.accept(&mut text, drafts.only(), accepted)?;
            let got = drive.propose(&[(&text, width)])?;
            let what = format!(
                "after {accepted} of {} drafted tokens were accepted, against a drafter that was given the {} rows of \
                 the accepted text at once",
                drafts.only().len(),
                text.rows()
            );
            got.agree(&stage.fresh(&text, width)?, stage.tolerance(), &what)?;
        }
    }
    Ok(())
}

/// The same after many steps, so that a slow decay shows.
pub(super) fn many_steps_leave_no_trace(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let mut drive = stage.drafter()?;
    let width = drive.width();
    let mut text = stage.text(1, PROMPT, 2);
    drive.commit(&[Part::all(&text)])?;
    for step in 0..14 {
        drive.step(&mut text, 1 + step % width, (step * 5 % (width + 1)) as usize)?;
    }
    let got = drive.propose(&[(&text, width)])?;
    got.agree(&stage.fresh(&text, width)?, stage.tolerance(), "after 14 steps, against the same text at once")
}

/// A prompt gives the same draft in whatever chunks it comes, wherever its rows lie in the taps, and whether or not
/// drafts were asked for in between.
pub(super) fn chunks_do_not_matter(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let text = stage.text(0, 41, 3);
    let width = stage.drafter()?.width();
    let want = stage.fresh(&text, width)?;
    let chunkings: [&[u32]; 4] = [&[7, 13, 20], &[16, 16, 8], &[39, 1], &[1; 40]];
    for chunks in chunkings {
        for before in [0, 3] {
            let mut drive = stage.drafter()?;
            let mut from = 0;
            for rows in chunks {
                drive.commit(&[Part { before, rejected: &[1, 2], ..Part::of(&text, from, *rows) }])?;
                from += rows;
            }
            let got = drive.propose(&[(&text, width)])?;
            let what = format!("a prompt of 40 rows in chunks of {chunks:?}, behind {before} rows of others");
            got.agree(&want, stage.tolerance(), &what)?;
        }
    }
    Ok(())
}

/// The pages of a sequence may lie anywhere.
pub(super) fn pages_do_not_matter(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let text = stage.text(0, 41, 4);
    let width = stage.drafter()?.width();
    let want = stage.fresh(&text, width)?;
    for (place, reversed) in [(0, true), (1, false), (2, true)] {
        let got = stage.fresh(&text.clone().on_pages(place, reversed), width)?;
        got.agree(&want, stage.tolerance(), "the same text on other pages")?;
    }
    Ok(())
}

/// Several sequences of a step are drafted for as each by itself, or refused with an error that leaves the drafter as it
/// was.
pub(super) fn a_batch_is_as_each_alone(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let texts = [stage.text(0, 19, 5), stage.text(1, 34, 6), stage.text(2, 27, 7)];
    let mut drive = match stage.load(|context| context.max_sequences = texts.len() as u32) {
        Ok(drive) => drive,
        // It says so before the first step: a program can go by that.
        Err(ProposerError::Unsupported(_)) => return Ok(()),
        Err(error) => return Err(Failure::new(format!("load for {} sequences: {error}", texts.len()))),
    };
    let width = drive.width();
    // Unequal widths as well, where there is room for them.
    let widths = [width, 1.max(width / 2), width];
    let parts = [0, 1, 2].map(|place| Part { before: place, rejected: &[1, 2], ..Part::all(&texts[place as usize]) });
    let wanted: Vec<_> = texts.iter().zip(widths).collect();
    let drafts = match drive.try_commit(&parts, true) {
        Ok(()) => match drive.try_propose(&wanted) {
            Err(ProposerError::Unsupported(_)) => None,
            Err(error) => return Err(Failure::new(format!("propose for {} sequences: {error}", texts.len()))),
            Ok(_) => Some(drive.propose(&wanted)?),
        },
        Err(_) => {
            for part in &parts {
                drive.commit(std::slice::from_ref(part))?;
            }
            None
        }
    };
    for (place, (text, width)) in texts.iter().zip(widths).enumerate() {
        let want = stage.fresh(text, width)?;
        let mut got = match &drafts {
            Some(drafts) => drafts.clone(),
            None => drive.propose(&[(text, width)])?,
        };
        if drafts.is_some() {
            got.ids = vec![got.ids[place].clone()];
        }
        got.agree_in_ids(&want, stage.tolerance(), &format!("sequence {place} of 3, against the same alone"))?;
    }
    Ok(())
}

/// Sequences that take turns do not see each other.
pub(super) fn sequences_that_take_turns(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let mut drive = stage.drafter()?;
    let width = drive.width();
    let mut texts = [stage.text(0, 19, 8), stage.text(1, 30, 9)];
    for text in &texts {
        drive.commit(&[Part::all(text)])?;
    }
    for step in 0..4 {
        for text in &mut texts {
            drive.step(text, width, step % 3)?;
        }
    }
    for text in &texts {
        let what = format!("text {} of two that took turns, against the same alone", text.id);
        drive.propose(&[(text, width)])?.agree(&stage.fresh(text, width)?, stage.tolerance(), &what)?;
    }
    Ok(())
}

/// A sequence that ended is forgotten: its identifier and its pages serve another.
pub(super) fn an_identifier_is_used_again(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let mut drive = stage.drafter()?;
    let width = drive.width();
    // The one before is longer than the one behind, and shorter than the last.
    for (tokens, seed) in [(45, 10), (PROMPT, 11), (60, 12)] {
        let mut text = stage.text(0, tokens, seed).with_id(5);
        drive.commit(&[Part::all(&text)])?;
        drive.step(&mut text, width, 1)?;
        let what = format!("a text of {tokens} tokens under an identifier that was used before");
        drive.propose(&[(&text, width)])?.agree(&stage.fresh(&text, width)?, stage.tolerance(), &what)?;
        drive.drafter.forget(text.id);
    }
    // Nothing is known of it, and nothing happens.
    drive.drafter.forget(1234);
    Ok(())
}

/// Never more than was asked for; never an id beyond the vocabulary, whatever the text.
pub(super) fn widths_and_ids_keep_their_bounds(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let mut drive = stage.drafter()?;
    let (most, last) = (drive.drafter.max_tokens(), stage.vocab() - 1);
    for tokens in [1, most] {
        let asked = stage.load(|context| context.num_speculative_tokens = Some(tokens));
        let asked = asked.map_err(|error| Failure::new(format!("load for {tokens} tokens a step: {error}")))?;
        let got = asked.drafter.max_tokens();
        if got < tokens {
            return Err(Failure::new(format!("loaded for {tokens} tokens a step, max_tokens() is {got}")));
        }
    }
    // More than it can do is refused, or has no effect.
    let _ = stage.load(|context| context.num_speculative_tokens = Some(most + 1));
    for seed in 20..26 {
        let mut text = stage.text((seed % 3) as u32, PROMPT, seed).with_id(seed);
        // The ends of the vocabulary as well.
        text.tokens[3..9].copy_from_slice(&[last, 0, last, 0, last, 0]);
        text.tokens.extend([last, 0]);
        drive.commit(&[Part::all(&text)])?;
        for width in [1, 2, most / 2, most - 1, most] {
            if width > 0 {
                // The bounds are checked there.
                let _ = drive.propose(&[(&text, width.min(most))])?;
            }
        }
        match drive.try_propose(&[(&text, most + 3)]) {
            // More than it says that it drafts: an engine has no room for them.
            Ok(drafts) if drafts.only().len() > most as usize => {
                let got = drafts.only().len();
                return Err(Failure::new(format!("{got} tokens drafted, and max_tokens() is {most}")));
            }
            // Fewer, or an error: both are answers.
            _ => {}
        }
        drive.drafter.forget(text.id);
    }
    Ok(())
}

/// The same question has the same answer: asked twice of one drafter, and of two.
pub(super) fn the_same_question_has_the_same_answer(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let text = stage.text(0, 33, 30);
    let mut drive = stage.drafter()?;
    let width = drive.width();
    drive.commit(&[Part::all(&text)])?;
    let want = drive.propose(&[(&text, width)])?;
    for what in ["asked a second time", "asked a third time"] {
        drive.propose(&[(&text, width)])?.agree(&want, 0.0, what)?;
    }
    stage.fresh(&text, width)?.agree(&want, 0.0, "asked of another drafter")
}

/// Hidden states that are asked for are used: without, every trial of them would pass.
pub(super) fn hidden_states_matter(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let drive = stage.drafter()?;
    let width = drive.width();
    for seed in 40..46 {
        let text = stage.text(0, PROMPT, seed);
        let other = text.clone().with_other_states();
        let want = stage.fresh(&text, width)?;
        if stage.fresh(&other, width)?.agree(&want, stage.tolerance(), "").is_err() {
            return Ok(());
        }
    }
    let taps = drive.drafter.taps();
    Err(Failure::new(format!("it taps {taps:?}, but other hidden states change none of 6 drafts")))
}

/// What an engine would never send is an error or has no effect, and no panic; and it is never taken for an answer.
pub(super) fn nonsense_is_an_error(bench: &Bench) -> Result<(), Failure> {
    let stage = Stage::open(bench)?;
    let mut drive = stage.drafter()?;
    let text = stage.text(0, PROMPT, 50);
    let width = drive.width();
    if !drive.drafter.taps().is_empty() && drive.try_commit(&[Part::all(&text)], false).is_ok() {
        return Err(Failure::new("it needs hidden states and is content with a commit that has none"));
    }
    drop(drive);
    let mut drive = stage.drafter()?;
    drive.commit(&[Part::all(&text)])?;
    let mut pageless = text.clone();
    pageless.take_pages();
    let _ = drive.try_propose(&[(&pageless, width)]);
    let mut empty = text.clone();
    empty.tokens.clear();
    let _ = drive.try_propose(&[(&empty, width)]);
    let _ = drive.try_propose(&[]);
    // A drafter that was asked nonsense still works.
    drive.propose(&[(&text, width)])?.agree(&stage.fresh(&text, width)?, stage.tolerance(), "after nonsense")
}
