//! `polyattn bench acceptance`.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use crate::{
    api::{Registry, TargetFacts},
    engine::{EngineOptions, Happened, Request, Sampling},
};
use serde::{Deserialize, Serialize};

use super::plot::{COLOURS, escaped};
use crate::{
    commands::{
        load::Model,
        options::{ModelArgs, ProposerChoice, SpeculativeArgs, SpeculativeChoice},
    },
    failure::{Ended, Failure, Verdict},
    output::{self, Context},
};

/// What of drafts is accepted, by position and proposer, over a data set of prompts.
///
/// A line of the data set is a JSON object with a `prompt`, or with `messages` (`[{"role": …, "content": …}]`), of which
/// those of the user are taken. Prompts go into the model's chat template where it has one, unless --raw.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  polyattn bench acceptance --dataset prompts.jsonl --plot acceptance.svg
  polyattn bench acceptance --dataset prompts.jsonl --proposer ngram --proposer dflash -n 64 --json
  polyattn bench acceptance --dataset prompts.jsonl --speculative-config.tree best-first")]
pub(super) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    speculative: SpeculativeArgs,

    /// The prompts, one JSON object a line.
    #[arg(long, value_name = "FILE.jsonl")]
    dataset: PathBuf,

    /// A picture of acceptance by position, one line for each proposer.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Prompts are the text itself, even where the model has a chat template.
    #[arg(long)]
    raw: bool,

    /// Prompts at the most.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    prompts: Option<u32>,

    /// New tokens of each prompt at the most.
    #[arg(short = 'n', long = "max-tokens", value_name = "N", default_value_t = 128,
        value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// 0 is greedy.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,

    /// Requests at once.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
}

#[derive(Deserialize)]
struct Line {
    prompt: Option<String>,
    #[serde(default)]
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

#[derive(Serialize)]
struct Answer {
    command: String,
    model: String,
    device: String,
    dataset: String,
    prompts: usize,
    temperature: f64,
    rows: Vec<Row>,
}

#[derive(Default, Serialize)]
struct Row {
    proposer: String,
    tree: String,
    acceptance: String,
    /// Whether what was emitted follows the target's distribution.
    lossless: bool,
    num_speculative_tokens: u32,
    mean_acceptance_length: f64,
    /// Accepted ÷ drafted tokens.
    acceptance_rate: f64,
    /// For each position the share of the steps with a draft that accepted it.
    per_position: Vec<f64>,
    /// Steps that drafted each position.
    drafted_per_position: Vec<u64>,
    drafted: u64,
    accepted: u64,
    wasted: u64,
    steps: u64,
    /// Requests whose drafter failed, and which went on without.
    drafters_lost: usize,
    draft_seconds: f64,
    verify_seconds: f64,
}

/// The texts of a data set.
fn read(path: &Path, most: Option<u32>) -> Result<Vec<String>, Failure> {
    let fault = |message: String| Failure::new(format!("--dataset {}: {message}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| fault(format!("cannot read it: {error}")))?;
    let mut prompts = Vec::new();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (number, line) in lines.take(most.map_or(usize::MAX, |most| most as usize)) {
        let at = |message: String| fault(format!("line {}: {message}", number + 1));
        let line: Line = serde_json::from_str(line).map_err(|error| at(error.to_string()))?;
        let said =
            line.messages.iter().filter(|message| message.role == "user").map(|message| message.content.as_str());
        let said = said.collect::<Vec<_>>().join("\n");
        match line.prompt.or(Some(said)).filter(|prompt| !prompt.is_empty()) {
            Some(prompt) => prompts.push(prompt),
            None => return Err(at("neither a prompt nor a message of the user".into())),
        }
    }
    if prompts.is_empty() { Err(fault("it has no prompts".into())) } else { Ok(prompts) }
}

pub(super) fn run(args: &Args, context: &Context) -> Ended {
    let texts = read(&args.dataset, args.prompts)?;
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(Failure::new(format!("--temperature: {} is out of range, 0 or more", args.temperature)));
    }
    let device = context.open()?;
    let model = Model::open(args.model.model.as_deref(), args.model.offline)?;
    let mut prompts = Vec::new();
    for text in &texts {
        prompts.push(model.prompt(text, !args.raw && model.source.chat_template.is_some())?);
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut answer = Answer {
        command: std::iter::once("polyattn".to_owned()).chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" "),
        model: model.name.clone(),
        device: device.facts().name.clone(),
        dataset: args.dataset.display().to_string(),
        prompts: prompts.len(),
        temperature: args.temperature,
        rows: Vec::new(),
    };
    for choice in choices(&args.speculative, &model)? {
        let attention = args.model.attention()?;
        let room = u32::try_from(longest + args.max_tokens as usize).unwrap_or(u32::MAX);
        let mut setup = EngineOptions::default()
            .with_context(room)
            .with_sequences(args.batch)
            .with_speculative(model.speculative(&choice)?);
        (setup.attention, setup.backend_config) = (attention.attention, attention.backend_config);
        setup.kernel.moe_backend = attention.moe_backend;
        let mut engine = model.engine(&device, &setup)?;
        let Some((proposer, width)) = engine.proposer() else {
            return Err(Failure::new("no proposer to measure: name one with --proposer"));
        };
        let mut row = Row { proposer: proposer.into(), num_speculative_tokens: width, ..Row::default() };
        if let Some((tree, acceptance, _)) = engine.strategies() {
            (row.tree, row.acceptance) = (tree.into(), acceptance.into());
        }
        row.lossless = engine.is_lossless();
        let mut accepted_per_position: Vec<f64> = Vec::new();
        for prompt in &prompts {
            let mut request = Request::new(prompt.clone(), args.max_tokens as usize);
            request.sampling = Sampling { temperature: args.temperature, ..Sampling::default() };
            engine.add_request(request)?;
        }
        let mut generations = Vec::new();
        while !engine.is_idle() {
            for event in engine.step() {
                match event.what {
                    Happened::Finished(generation) => generations.push(generation),
                    Happened::Failed(error) => return Err(error.into()),
                    _ => {}
                }
            }
        }
        row.drafters_lost = generations.iter().filter(|generation| generation.drafter_lost).count();
        if row.drafters_lost > 0 {
            output::note(&format!(
                "{proposer} failed in {} of {} requests, which went on without it: its figures are of what came before",
                row.drafters_lost,
                generations.len()
            ));
        }
        for acceptance in generations.into_iter().filter_map(|generation| generation.acceptance) {
            row.drafted += acceptance.drafted;
            row.accepted += acceptance.accepted;
            row.wasted += acceptance.wasted;
            row.steps += acceptance.drafted_steps;
            row.draft_seconds += acceptance.draft_seconds;
            row.verify_seconds += acceptance.verify_seconds;
            let positions = acceptance.per_position.len();
            row.drafted_per_position.resize(row.drafted_per_position.len().max(positions), 0);
            accepted_per_position.resize(row.drafted_per_position.len(), 0.0);
            for (place, share) in acceptance.per_position.iter().enumerate() {
                row.drafted_per_position[place] += acceptance.drafted_per_position.get(place).copied().unwrap_or(0);
                accepted_per_position[place] += share * acceptance.drafted_steps as f64;
            }
        }
        let share = |part: f64, whole: u64| if whole == 0 { 0.0 } else { part / whole as f64 };
        row.mean_acceptance_length = 1.0 + share(row.accepted as f64, row.steps);
        row.acceptance_rate = share(row.accepted as f64, row.drafted);
        row.per_position = accepted_per_position.iter().map(|hits| share(*hits, row.steps)).collect();
        answer.rows.push(row);
    }
    if let Some(path) = &args.plot {
        std::fs::write(path, plot(&answer))
            .map_err(|error| Failure::new(format!("--plot {}: cannot write it: {error}", path.display())))?;
    }
    context.answer(&answer, || table(&answer))?;
    Ok(Verdict::Holds)
}

/// The proposers that were named, or every one that the model has what it needs for.
fn choices(args: &SpeculativeArgs, model: &Model) -> Result<Vec<SpeculativeChoice>, Failure> {
    let named = args.each_proposer()?;
    if !named.is_empty() {
        return Ok(named);
    }
    let base = args.merge()?;
    if base.proposer != ProposerChoice::Unset {
        return Ok(vec![base]);
    }
    let choice = |(name, draft_model): (&str, _)| SpeculativeChoice {
        proposer: ProposerChoice::Named(name.to_owned()),
        draft_model,
        ..base.clone()
    };
    Ok(fitting(model, base.draft_model.as_deref())?.into_iter().map(choice).collect())
}

/// The proposers that a model has what they need for, each with the drafter that was named where it is for them: those
/// without a checkpoint, those whose layers are in the model's own, and those that read DFlash's where such a drafter
/// was named or is at hand.
pub(super) fn fitting(model: &Model, drafter: Option<&Path>) -> Result<Vec<(&'static str, Option<PathBuf>)>, Failure> {
    let (config, path) = (&model.source.config, model.source.checkpoint.path());
    let facts =
        TargetFacts::new(config.layers, config.hidden_size, config.vocab_size, config.context_length).loaded_from(path);
    let has_drafter = drafter.is_some() || model.has_drafter();
    let mut found = Vec::new();
    for entry in Registry::global()?.proposers().iter() {
        let (name, needs) = (entry.proposer.name(), entry.proposer.requirements());
        if matches!(name, "combine" | "dflash") {
            found.extend(has_drafter.then(|| (name, drafter.map(Path::to_owned))));
        } else if !needs.checkpoint || needs.in_target_checkpoint && entry.proposer.describe(path, &facts).is_ok() {
            found.push((name, None));
        }
    }
    Ok(found)
}

fn table(answer: &Answer) -> String {
    let mut table = output::table(&[
        "proposer",
        "tree",
        "tokens a step",
        "acceptance length",
        "rate",
        "wasted",
        "lost",
        "by position",
    ]);
    for row in &answer.rows {
        let positions: Vec<_> = row.per_position.iter().map(|share| format!("{share:.2}")).collect();
        table.add_row([
            row.proposer.clone(),
            row.tree.clone(),
            row.num_speculative_tokens.to_string(),
            format!("{:.2}", row.mean_acceptance_length),
            format!("{:.2}", row.acceptance_rate),
            row.wasted.to_string(),
            row.drafters_lost.to_string(),
            positions.join(" "),
        ]);
    }
    let lossy = answer.rows.iter().any(|row| !row.lossless);
    format!(
        "{} on {}: {} prompts of {}, temperature {}{}\n{table}",
        answer.model,
        answer.device,
        answer.prompts,
        answer.dataset,
        answer.temperature,
        if lossy { "; LOSSY acceptance: what was emitted is not the target's" } else { "" }
    )
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 50.0;

/// Acceptance by position, one line for each proposer.
fn plot(answer: &Answer) -> String {
    let positions = answer.rows.iter().map(|row| row.per_position.len()).max().unwrap_or(0).max(2);
    let x = |position: usize| LEFT + (WIDTH - LEFT - RIGHT) * (position - 1) as f64 / (positions - 1) as f64;
    let y = |share: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"24\" \
         font-size=\"16\">{}</text>\n",
        escaped(&format!("{} on {}, {} prompts", answer.model, answer.device, answer.prompts))
    );
    // Writing to a string cannot fail.
    for tenth in (0..=10).step_by(2) {
        let share = f64::from(tenth) / 10.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{0:.1}\" x2=\"{1:.1}\" y2=\"{0:.1}\" stroke=\"#dddddd\"/><text x=\"{2}\" \
             y=\"{3:.1}\" text-anchor=\"end\">{share:.1}</text>",
            y(share),
            WIDTH - RIGHT,
            LEFT - 6.0,
            y(share) + 4.0
        );
    }
    for position in 1..=positions {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{position}</text>",
            x(position),
            HEIGHT - BOTTOM + 16.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">position</text><text x=\"{LEFT}\" y=\"{:.1}\">accepted, of \
         steps with a draft</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 12.0,
        TOP - 8.0
    );
    for (at, (row, colour)) in answer.rows.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let points: Vec<_> =
            row.per_position.iter().enumerate().map(|(place, share)| (x(place + 1), y(*share))).collect();
        let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for (x, y) in &points {
            let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
        }
        let height = TOP + 16.0 * at as f64;
        let lossy = if row.lossless { "" } else { ", lossy" };
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{height:.1}\" fill=\"{colour}\">{}</text>",
            WIDTH - RIGHT + 12.0,
            escaped(&format!("{} {}: {:.2}{lossy}", row.proposer, row.tree, row.mean_acceptance_length))
        );
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::{Answer, Row, plot, read};

    #[test]
    fn reads_prompts_and_messages() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("prompts.jsonl");
        let text = "{\"prompt\": \"one\"}\n\n{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": \"two\"}]}\n";
        std::fs::write(&file, text).expect("written");
        assert_eq!(read(&file, None).expect("good"), ["one", "two"]);
        assert_eq!(read(&file, Some(1)).expect("good"), ["one"]);
        for (text, wanted) in
            [("{\"text\": 1}", "line 1: neither a prompt"), ("[", "line 1: EOF"), ("\n", "no prompts")]
        {
            std::fs::write(&file, text).expect("written");
            let error = read(&file, None).expect_err("bad").0;
            assert!(error.contains("prompts.jsonl") && error.contains(wanted), "{error}");
        }
        assert!(read(&folder.path().join("nowhere"), None).expect_err("bad").0.contains("cannot read it"));
    }

    #[test]
    fn draws_a_line_for_each_proposer() {
        let row = |proposer: &str, per_position: &[f64]| Row {
            proposer: proposer.into(),
            per_position: per_position.to_vec(),
            lossless: true,
            ..Row::default()
        };
        let answer = Answer {
            command: String::new(),
            model: "m<1>".into(),
            device: "cpu".into(),
            dataset: String::new(),
            prompts: 2,
            temperature: 0.0,
            rows: vec![row("ngram", &[0.5, 0.25]), row("dflash", &[0.9]), row("none", &[])],
        };
        let svg = plot(&answer);
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (3, 3));
        assert!(svg.contains("m&lt;1&gt;") && svg.ends_with("</svg>\n"));
    }
}
