//! Options that several commands share, and how those that say the same thing are brought together.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use crate::api::{AttentionConfig, BackendChoice, BackendName, StrategyConfig};
use serde::{Deserialize, de::DeserializeOwned};

use crate::failure::Failure;

/// Which model, and who serves its attention.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ModelArgs {
    /// The model: a known name, a GGUF file, or a folder as Hugging Face has it. Without, smollm2.
    #[arg(long, value_name = "DIR|FILE|NAME")]
    pub(crate) model: Option<String>,

    /// Download nothing.
    #[arg(long)]
    pub(crate) offline: bool,

    /// The target's attention backend; automatically selected when unset.
    #[arg(long, value_name = "NAME")]
    pub(crate) attention_backend: Option<String>,

    /// The target's attention section, an object with backend, backend_per_phase and backend_per_kind.
    #[arg(long, value_name = "JSON")]
    pub(crate) attention_config: Option<String>,

    /// Configurations of backends, an object by backend name.
    #[arg(long, value_name = "JSON")]
    pub(crate) backend_config: Option<String>,

    /// The target's mixture-of-experts backend; automatically selected when unset, not looked at where the model has no
    /// experts.
    #[arg(long, value_name = "NAME")]
    pub(crate) moe_backend: Option<String>,
}

/// Who may serve a model's attention, and how they are set up.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct AttentionOptions {
    /// The target's attention.
    pub(crate) attention: AttentionConfig,
    /// Configurations of backends, by name.
    pub(crate) backend_config: BTreeMap<String, serde_json::Value>,
    /// The target's mixture-of-experts backend.
    pub(crate) moe_backend: Option<String>,
}

impl ModelArgs {
    /// What the options say of attention.
    ///
    /// # Errors
    /// An object that cannot be read, or a backend named twice with different values.
    pub(crate) fn attention(&self) -> Result<AttentionOptions, Failure> {
        let mut options = AttentionOptions::default();
        if let Some(text) = &self.attention_config {
            options.attention = object("--attention-config", text)?;
        }
        if let Some(text) = &self.backend_config {
            options.backend_config = object("--backend-config", text)?;
        }
        options.moe_backend = self.moe_backend.as_deref().and_then(MoeName::parse).map(|name| name.0);
        if let Some(name) = self.attention_backend.as_deref().and_then(BackendName::parse) {
            let named = BackendChoice::Require(name.clone());
            let config = std::mem::replace(&mut options.attention.backend, named);
            if config != BackendChoice::Auto && config != options.attention.backend {
                let message = format!("--attention-backend {name} contradicts the backend of --attention-config");
                return Err(Failure::new(message));
            }
        }
        Ok(options)
    }
}

/// Speculative decoding. One thing may be said in several ways, even several times, as long as they agree.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct SpeculativeArgs {
    /// The proposer, or none for plain decoding. Without, a known model with a drafter uses it.
    #[arg(long, value_name = "NAME|none")]
    proposer: Vec<String>,

    /// The draft model: a file or a folder.
    #[arg(long, value_name = "DIR|FILE")]
    draft_model: Vec<String>,

    /// An object with method, parameters, attention_backend, moe_backend, num_speculative_tokens, model, tree,
    /// tree_nodes, acceptance and length; each may also be given by itself.
    #[arg(long, value_name = "JSON")]
    speculative_config: Vec<String>,

    /// The proposer, as --proposer.
    #[arg(long = "speculative-config.method", value_name = "NAME")]
    draft_method: Vec<String>,

    /// The proposer's own parameters, an object that it reads.
    #[arg(long = "speculative-config.parameters", value_name = "JSON")]
    draft_parameters: Vec<String>,

    /// The draft's attention backend; automatically selected when unset, whatever the target's is.
    #[arg(long = "speculative-config.attention_backend", value_name = "NAME")]
    draft_attention_backend: Vec<String>,

    /// The draft's mixture-of-experts backend; the target's when unset.
    #[arg(long = "speculative-config.moe_backend", value_name = "NAME")]
    draft_moe_backend: Vec<String>,

    /// Tokens drafted and verified a step; the proposer's own default when unset.
    #[arg(long = "speculative-config.num_speculative_tokens", value_name = "N", allow_negative_numbers = true)]
    draft_tokens: Vec<u32>,

    /// The draft model, as --draft-model.
    #[arg(long = "speculative-config.model", value_name = "DIR|FILE")]
    draft_model_too: Vec<String>,

    /// Who makes trees of what is drafted: chain, top-k, best-first, static, or {"name": …, "parameters": {…}}; chains
    /// when unset.
    #[arg(long = "speculative-config.tree", value_name = "NAME|JSON")]
    draft_tree: Vec<String>,

    /// Nodes of a tree at the most.
    #[arg(long = "speculative-config.tree_nodes", value_name = "N")]
    draft_tree_nodes: Vec<u32>,

    /// What of a draft stands: match, greedy, rejection, block, or the lossy typical and synthetic; match when unset.
    #[arg(long = "speculative-config.acceptance", value_name = "NAME|JSON")]
    draft_acceptance: Vec<String>,

    /// How many tokens are drafted a step: fixed, per-batch-size or adaptive; fixed when unset.
    #[arg(long = "speculative-config.length", value_name = "NAME|JSON")]
    draft_length: Vec<String>,
}

/// The object of `--speculative-config`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SpeculativeObject {
    method: Option<String>,
    parameters: Option<serde_json::Map<String, serde_json::Value>>,
    attention_backend: Option<String>,
    moe_backend: Option<String>,
    num_speculative_tokens: Option<u32>,
    model: Option<String>,
    tree: Option<StrategyConfig>,
    tree_nodes: Option<u32>,
    acceptance: Option<StrategyConfig>,
    length: Option<StrategyConfig>,
}

/// The proposer that was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ProposerChoice {
    /// Nothing was said: the model's own drafter, where it has one.
    #[default]
    Unset,
    /// Plain decoding.
    None,
    /// This one, in lower case.
    Named(String),
}

impl ProposerChoice {
    fn parse(text: &str) -> Option<Self> {
        let name = text.trim().to_ascii_lowercase();
        match name.as_str() {
            "" | "auto" => None,
            "none" => Some(Self::None),
            _ => Some(Self::Named(name)),
        }
    }
}

impl fmt::Display for ProposerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unset => "auto",
            Self::None => "none",
            Self::Named(name) => name,
        })
    }
}

/// What was said of speculative decoding, brought together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpeculativeChoice {
    /// The proposer.
    pub(crate) proposer: ProposerChoice,
    /// The proposer's own parameters.
    pub(crate) parameters: Option<serde_json::Value>,
    /// The draft model; the known drafter of a known model when unset.
    pub(crate) draft_model: Option<PathBuf>,
    /// The draft's attention backend; automatically selected when unset.
    pub(crate) attention_backend: Option<BackendName>,
    /// The draft's mixture-of-experts backend; the target's when unset.
    pub(crate) moe_backend: Option<String>,
    /// Tokens drafted and verified a step; the proposer's own default when unset.
    pub(crate) num_speculative_tokens: Option<u32>,
    /// Who makes trees; chains when unset.
    pub(crate) tree: Option<StrategyConfig>,
    /// Nodes of a tree at the most.
    pub(crate) tree_nodes: Option<u32>,
    /// What of a draft stands.
    pub(crate) acceptance: Option<StrategyConfig>,
    /// How many tokens are drafted a step.
    pub(crate) length: Option<StrategyConfig>,
}

impl SpeculativeArgs {
    /// One choice for each proposer that was named, where several may be.
    ///
    /// # Errors
    /// As [`merge`](Self::merge).
    pub(crate) fn each_proposer(&self) -> Result<Vec<SpeculativeChoice>, Failure> {
        self.proposer.iter().map(|name| Self { proposer: vec![name.clone()], ..self.clone() }.merge()).collect()
    }

    /// One choice out of everything that was said.
    ///
    /// # Errors
    /// An object that cannot be read, a value out of range, or the same thing said twice with different values.
    pub(crate) fn merge(&self) -> Result<SpeculativeChoice, Failure> {
        let mut proposer = Once::default();
        let mut parameters = Once::default();
        let mut draft_model = Once::default();
        let mut attention_backend = Once::default();
        let mut moe_backend = Once::default();
        let mut tokens = Once::default();
        let (mut tree, mut tree_nodes) = (Once::default(), Once::default());
        let (mut acceptance, mut length) = (Once::default(), Once::default());

        for text in &self.proposer {
            proposer.say("--proposer", ProposerChoice::parse(text))?;
        }
        for text in &self.draft_model {
            draft_model.say("--draft-model", Model::parse("--draft-model", text)?)?;
        }
        for text in &self.speculative_config {
            let object: SpeculativeObject = object("--speculative-config", text)?;
            let option = |field: &str| format!("--speculative-config {field}");
            proposer.say(&option("method"), object.method.as_deref().and_then(ProposerChoice::parse))?;
            parameters.say(&option("parameters"), object.parameters.map(serde_json::Value::Object))?;
            attention_backend
                .say(&option("attention_backend"), object.attention_backend.as_deref().and_then(BackendName::parse))?;
            moe_backend.say(&option("moe_backend"), object.moe_backend.as_deref().and_then(MoeName::parse))?;
            tokens.say(&option("num_speculative_tokens"), object.num_speculative_tokens)?;
            tree.say(&option("tree"), object.tree)?;
            tree_nodes.say(&option("tree_nodes"), object.tree_nodes)?;
            acceptance.say(&option("acceptance"), object.acceptance)?;
            length.say(&option("length"), object.length)?;
            let model = object.model.as_deref().map(|text| Model::parse(&option("model"), text)).transpose()?;
            draft_model.say(&option("model"), model.flatten())?;
        }
        let option = |field: &str| format!("--speculative-config.{field}");
        for text in &self.draft_method {
            proposer.say(&option("method"), ProposerChoice::parse(text))?;
        }
        for text in &self.draft_parameters {
            let value = object(&option("parameters"), text)?;
            parameters.say(&option("parameters"), Some(serde_json::Value::Object(value)))?;
        }
        for text in &self.draft_attention_backend {
            attention_backend.say(&option("attention_backend"), BackendName::parse(text))?;
        }
        for text in &self.draft_moe_backend {
            moe_backend.say(&option("moe_backend"), MoeName::parse(text))?;
        }
        for count in &self.draft_tokens {
            tokens.say(&option("num_speculative_tokens"), Some(*count))?;
        }
        let strategies = [
            (&self.draft_tree, &mut tree, "tree"),
            (&self.draft_acceptance, &mut acceptance, "acceptance"),
            (&self.draft_length, &mut length, "length"),
        ];
        for (texts, said, field) in strategies {
            for text in texts {
                said.say(&option(field), Some(strategy(&option(field), text)?))?;
            }
        }
        for nodes in &self.draft_tree_nodes {
            tree_nodes.say(&option("tree_nodes"), Some(*nodes))?;
        }
        for text in &self.draft_model_too {
            draft_model.say(&option("model"), Model::parse(&option("model"), text)?)?;
        }

        if let Some((source, 0)) = &tokens.said {
            return Err(Failure::new(format!("{source}: 0 tokens cannot be drafted, at least 1")));
        }
        Ok(SpeculativeChoice {
            proposer: proposer.value().unwrap_or_default(),
            parameters: parameters.value(),
            draft_model: draft_model.value().map(|model: Model| model.0),
            attention_backend: attention_backend.value(),
            moe_backend: moe_backend.value().map(|name: MoeName| name.0),
            num_speculative_tokens: tokens.value(),
            tree: tree.value(),
            tree_nodes: tree_nodes.value(),
            acceptance: acceptance.value(),
            length: length.value(),
        })
    }
}

/// A strategy as an option has it: a name, or an object with name and parameters.
fn strategy(option: &str, text: &str) -> Result<StrategyConfig, Failure> {
    match text.trim_start().starts_with('{') {
        true => object(option, text),
        false if text.trim().is_empty() => Err(Failure::new(format!("{option}: '' is no name"))),
        false => Ok(StrategyConfig::new(text)),
    }
}

/// Reads the JSON object that an option was given.
fn object<T: DeserializeOwned>(option: &str, text: &str) -> Result<T, Failure> {
    let fault = |message: String| Failure::new(format!("{option}: {message}"));
    // serde would take an array for the fields in order.
    if !text.trim_start().starts_with('{') {
        return Err(fault(format!("'{text}' is no JSON object")));
    }
    let mut source = serde_json::Deserializer::from_str(text);
    let object = serde_path_to_error::deserialize(&mut source).map_err(|error| {
        let path = error.path().to_string();
        let message = error.into_inner().to_string();
        fault(if path == "." { message } else { format!("{path}: {message}") })
    })?;
    source.end().map_err(|error| fault(error.to_string()))?;
    Ok(object)
}

/// Something that may be said several times, but only one way.
#[derive(Debug)]
struct Once<T> {
    /// The option that said it first, and what it said.
    said: Option<(String, T)>,
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self { said: None }
    }
}

impl<T: PartialEq + fmt::Display> Once<T> {
    fn say(&mut self, source: &str, value: Option<T>) -> Result<(), Failure> {
        match (&self.said, value) {
            (_, None) => {}
            (None, Some(value)) => self.said = Some((source.to_owned(), value)),
            (Some((first, said)), Some(value)) => {
                if *said != value {
                    return Err(Failure::new(format!("{first} '{said}' and {source} '{value}' contradict each other")));
                }
            }
        }
        Ok(())
    }

    fn value(self) -> Option<T> {
        self.said.map(|(_, value)| value)
    }
}

/// A mixture-of-experts backend, looked up only where a model has experts: kept as written, compared without regard to
/// case.
#[derive(Debug)]
struct MoeName(String);

impl MoeName {
    fn parse(text: &str) -> Option<Self> {
        BackendName::parse(text).map(|_| Self(text.trim().to_owned()))
    }
}

impl PartialEq for MoeName {
    fn eq(&self, other: &Self) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl fmt::Display for MoeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A draft model's place.
#[derive(Debug, PartialEq)]
struct Model(PathBuf);

impl Model {
    fn parse(source: &str, text: &str) -> Result<Option<Self>, Failure> {
        if text.is_empty() {
            return Err(Failure::new(format!("{source}: '' is no file or folder")));
        }
        Ok(Some(Self(Path::new(text).to_owned())))
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        args: SpeculativeArgs,
    }

    fn merged(args: &[&str]) -> Result<SpeculativeChoice, String> {
        let program = Program::try_parse_from(["program"].iter().chain(args)).map_err(|error| error.to_string())?;
        program.args.merge().map_err(|failure| failure.0)
    }

    #[track_caller]
    fn good(args: &[&str]) -> SpeculativeChoice {
        merged(args).expect("good options")
    }

    #[track_caller]
    fn refused(args: &[&str]) -> String {
        merged(args).expect_err("bad options")
    }

    #[test]
    fn nothing_said_is_nothing_set() {
        assert_eq!(good(&[]), SpeculativeChoice::default());
        assert_eq!(good(&["--speculative-config", "{}"]), SpeculativeChoice::default());
        let nulls =
            r#"{"method":null,"attention_backend":null,"moe_backend":null,"num_speculative_tokens":null,"model":null}"#;
        assert_eq!(good(&["--speculative-config", nulls]), SpeculativeChoice::default());
    }

    #[test]
    fn the_object_and_the_single_options_say_the_same() {
        let want = SpeculativeChoice {
            proposer: ProposerChoice::Named("dflash".into()),
            draft_model: Some("drafter".into()),
            attention_backend: BackendName::parse("flash"),
            moe_backend: Some("Grouped".into()),
            num_speculative_tokens: Some(7),
            ..SpeculativeChoice::default()
        };
        let object = r#"{"method":"DFlash","attention_backend":"FLASH","moe_backend":"Grouped","num_speculative_tokens":7,"model":"drafter"}"#;
        assert_eq!(good(&["--speculative-config", object]), want);
        assert_eq!(good(&[&format!("--speculative-config={object}")]), want);
        let single = [
            "--speculative-config.method=dflash",
            "--speculative-config.attention_backend",
            "Flash",
            "--speculative-config.moe_backend",
            "Grouped",
            "--speculative-config.num_speculative_tokens",
            "7",
            "--speculative-config.model",
            "drafter",
        ];
        assert_eq!(good(&single), want);
        let mut both = single.to_vec();
        both.extend(["--speculative-config", object, "--proposer", "dFlash", "--draft-model", "drafter"]);
        assert_eq!(good(&both), want, "the same value twice is fine");
    }

    #[test]
    fn auto_is_unset() {
        for auto in ["auto", "AUTO", "Auto"] {
            let object = format!(r#"{{"method":"{auto}","attention_backend":"{auto}","moe_backend":"{auto}"}}"#);
            assert_eq!(good(&["--speculative-config", &object]), SpeculativeChoice::default());
            assert_eq!(good(&["--speculative-config.attention_backend", auto]).attention_backend, None);
            let set = ["--speculative-config.attention_backend", "flash", "--speculative-config", &object];
            assert_eq!(good(&set).attention_backend, BackendName::parse("flash"), "unset contradicts nothing");
            assert_eq!(good(&["--proposer", auto]).proposer, ProposerChoice::Unset);
        }
        assert_eq!(good(&["--proposer", "None"]).proposer, ProposerChoice::None);
    }

    #[test]
    fn different_values_contradict_each_other() {
        assert_eq!(
            refused(&["--proposer", "ngram", "--speculative-config", r#"{"method":"dflash"}"#]),
            "--proposer 'ngram' and --speculative-config method 'dflash' contradict each other"
        );
        assert_eq!(
            refused(&["--proposer", "none", "--speculative-config.method", "dflash"]),
            "--proposer 'none' and --speculative-config.method 'dflash' contradict each other"
        );
        assert_eq!(
            refused(&["--draft-model", "a", "--speculative-config.model", "b"]),
            "--draft-model 'a' and --speculative-config.model 'b' contradict each other"
        );
        for (field, a, b) in [
            ("attention_backend", "\"plain\"", "flash"),
            ("moe_backend", "\"a\"", "b"),
            ("num_speculative_tokens", "3", "4"),
            ("model", "\"a\"", "b"),
        ] {
            let object = format!("{{\"{field}\":{a}}}");
            let error = refused(&["--speculative-config", &object, &format!("--speculative-config.{field}"), b]);
            assert_eq!(
                error,
                format!(
                    "--speculative-config {field} '{}' and --speculative-config.{field} '{b}' contradict each other",
                    a.trim_matches('"')
                )
            );
        }
        assert!(refused(&["--proposer", "a", "--proposer", "b"]).contains("contradict"));
        let twice = ["--speculative-config", r#"{"method":"a"}"#, "--speculative-config", r#"{"method":"b"}"#];
        assert!(refused(&twice).contains("contradict"));
    }

    #[test]
    fn strategies_are_names_or_objects() {
        let found = good(&[
            "--speculative-config",
            r#"{"tree":"Top-K","tree_nodes":12,"length":{"name":"fixed","parameters":{"tokens":3}}}"#,
            "--speculative-config.tree",
            "top-k",
            "--speculative-config.acceptance",
            r#"{"name":"synthetic","parameters":{"length":4}}"#,
        ]);
        assert_eq!((found.tree, found.tree_nodes), (Some(StrategyConfig::new("top-k")), Some(12)));
        assert_eq!(found.length.map(|length| length.to_string()).as_deref(), Some(r#"fixed {"tokens":3}"#));
        assert_eq!(found.acceptance.map(|rule| rule.name).as_deref(), Some("synthetic"));
        let two = ["--speculative-config.tree", "top-k", "--speculative-config.tree", "static"];
        assert!(refused(&two).contains("contradict"));
        assert!(refused(&["--speculative-config.length", "{\"nom\":1}"]).contains("unknown field `nom`"));
    }

    #[test]
    fn a_bad_object_is_refused_with_its_field() {
        for (text, wanted) in [
            (r#"{"methods":"x"}"#, "unknown field `methods`"),
            (r#"{"method":3}"#, "method: invalid type: integer `3`"),
            (r#"{"num_speculative_tokens":"7"}"#, "num_speculative_tokens: invalid type: string \"7\""),
            (r#"{"num_speculative_tokens":-1}"#, "num_speculative_tokens: invalid value: integer `-1`"),
            (r#"{"num_speculative_tokens":0}"#, "num_speculative_tokens: 0 tokens"),
            (r#"{"method":"a","method":"a"}"#, "duplicate field `method`"),
            (r#"{"model":""}"#, "model: ''"),
            (r#"{"method":"#, "EOF"),
            (r#"{"method":"a"} x"#, "trailing characters"),
            ("[]", "'[]' is no JSON object"),
            ("dflash", "'dflash' is no JSON object"),
            ("", "'' is no JSON object"),
        ] {
            let error = refused(&["--speculative-config", text]);
            assert!(error.starts_with("--speculative-config") && error.contains(wanted), "{text}: {error}");
        }
        let zero = refused(&["--speculative-config.num_speculative_tokens", "0"]);
        assert!(zero.starts_with("--speculative-config.num_speculative_tokens: 0 "), "{zero}");
        assert!(refused(&["--draft-model", ""]).starts_with("--draft-model: ''"));
        assert!(refused(&["--speculative-config.methods", "x"]).contains("--speculative-config.methods"));
        assert!(refused(&["--speculative-config.num_speculative_tokens", "-1"]).contains("'-1'"));
    }
}
