//! Text to token ids and back.
//!
//! Control tokens (those that open and close turns and texts) are never recognised in ordinary
//! text: [`TextTokenizer::encode_text`] spells them out letter by letter, so that a prompt cannot
//! inject a turn. Only the [`Segment::Template`] parts of [`TextTokenizer::encode_template`] may
//! contain them.
//!
//! GGUF tokens of the kind "user defined", and added tokens of a `tokenizer.json` that are not
//! marked special, are ordinary text under a name of its own and are recognised everywhere.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::LoadError;
use super::gguf::{Gguf, GgufValue, excerpt};
use super::map::read_text;

/// Ids above this are no ids of any vocabulary, only of a damaged file.
const MAX_ID: u32 = 1 << 30;

/// How Llama 3 cuts text into pieces before merging.
const LLAMA3_PIECES: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Qwen2 and Qwen3 do: as Llama 3, with every digit by itself.
const QWEN2_PIECES: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A part of a rendered chat template.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Segment {
    /// The template's own text: control tokens in it are recognised.
    Template(String),
    /// Text from outside: control tokens in it are spelt out.
    Text(String),
}

/// A model's tokenizer. Clones share one vocabulary.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    file: PathBuf,
    tokenizer: Tokenizer,
    /// Whether every ordinary token is a string over the byte alphabet.
    byte_level: bool,
    specials: Vec<Special>,
    special_ids: HashSet<u32>,
    /// The plain text of control tokens and of added tokens.
    plain: HashMap<u32, String>,
    /// The largest id plus one.
    vocab_size: u32,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The vocabulary itself would fill screens.
        f.debug_struct("Inner")
            .field("file", &self.file)
            .field("byte_level", &self.byte_level)
            .field("specials", &self.specials.len())
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Special {
    text: String,
    id: u32,
    /// Whether white space before or after it belongs to it.
    lstrip: bool,
    rstrip: bool,
}

impl TextTokenizer {
    /// Reads a Hugging Face `tokenizer.json`.
    ///
    /// # Errors
    /// If the file cannot be read or is not a sound tokenizer.
    pub fn from_hf_file(path: &Path) -> Result<Self, LoadError> {
        Self::from_hf_json(path, &read_text(path)?)
    }

    /// Reads the text of a `tokenizer.json`; `file` is named in errors.
    ///
    /// # Errors
    /// If it is not a sound tokenizer.
    pub fn from_hf_json(file: &Path, text: &str) -> Result<Self, LoadError> {
        let json: serde_json::Value =
            serde_json::from_str(text).map_err(|e| LoadError::tokenizer(file, format!("it is not valid JSON: {e}")))?;
        check_hf_json(file, &json)?;
        drop(json);
        // The checks above cover the panics known in the library; this covers the others.
        let parsed = catch_unwind(AssertUnwindSafe(|| Tokenizer::from_bytes(text)))
            .map_err(|_| LoadError::tokenizer(file, "its contents cannot be understood"))?;
        let mut tokenizer = parsed.map_err(|e| LoadError::tokenizer(file, e.to_string()))?;
        // Settings of a training run may be left in the file; they would cut or pad prompts.
        tokenizer.with_truncation(None).map_err(|e| LoadError::tokenizer(file, e.to_string()))?;
        tokenizer.with_padding(None);

        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let mut specials = Vec::new();
        let mut plain = HashMap::new();
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            plain.insert(id, token.content.clone());
            if token.special {
                specials.push(Special { text: token.content, id, lstrip: token.lstrip, rstrip: token.rstrip });
            }
        }
        let vocab_size = tokenizer.get_vocab(true).values().max().map_or(0, |id| id.saturating_add(1));
        Self::finish(file, tokenizer, byte_level, specials, plain, vocab_size)
    }

    /// Builds the tokenizer of a GGUF file from its metadata.
    ///
    /// # Errors
    /// If keys are missing or contradict each other, or if the tokenizer is of a kind other than
    /// byte-level BPE with one of the known ways of cutting text into pieces.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, LoadError> {
        let file = gguf.path();
        let text = |key: &str| -> Result<&str, LoadError> {
            let value = gguf.get(key).ok_or_else(|| LoadError::field(file, key, "this metadata key is missing"))?;
            value.as_str().ok_or_else(|| LoadError::field(file, key, format!("{} is not a string", value.describe())))
        };
        let strings = |key: &str| -> Result<&[String], LoadError> {
            let value = gguf.get(key).ok_or_else(|| LoadError::field(file, key, "this metadata key is missing"))?;
            value
                .as_strings()
                .ok_or_else(|| LoadError::field(file, key, format!("{} is not a list of strings", value.describe())))
        };
        let model_key = "tokenizer.ggml.model";
        let model = text(model_key)?;
        if model != "gpt2" {
            return Err(LoadError::field(
                file,
                model_key,
                format!(
                    "the tokenizer kind '{}' is not supported (supported: gpt2, which is byte-level BPE)",
                    excerpt(model)
                ),
            ));
        }
        let pieces = Pieces::named(file, text("tokenizer.ggml.pre")?)?;
        let tokens = strings("tokenizer.ggml.tokens")?;
        let merges = strings("tokenizer.ggml.merges")?;
        let kinds = token_kinds(gguf, tokens.len())?;

        let mut vocab = Vocab::default();
        let mut specials = Vec::new();
        let mut plain = HashMap::new();
        let mut added = Vec::new();
        let mut seen: HashMap<&str, u32> = HashMap::with_capacity(tokens.len());
        for (id, (token, kind)) in (0u32..).zip(tokens.iter().zip(kinds)) {
            if let Some(first) = seen.insert(token, id) {
                return Err(LoadError::tokenizer(
                    file,
                    format!("ids {first} and {id} are both the token '{}'", excerpt(token)),
                ));
            }
            match kind {
                Kind::Normal => {
                    vocab.insert(token.clone(), id);
                }
                Kind::UserDefined => {
                    vocab.insert(token.clone(), id);
                    plain.insert(id, token.clone());
                    added.push(AddedToken::from(token.as_str(), false).normalized(false));
                }
                Kind::Control => {
                    // Under a name that no text leads to, because the byte alphabet has no
                    // character 0.
                    vocab.insert(format!("\0{id}"), id);
                    plain.insert(id, token.clone());
                    if !token.is_empty() {
                        specials.push(Special { text: token.clone(), id, lstrip: false, rstrip: false });
                    }
                }
            }
        }
        let merges = checked_merges(file, &vocab, merges)?;
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pieces == Pieces::Llama3)
            .build()
            .map_err(|e| LoadError::tokenizer(file, e.to_string()))?;
        let mut tokenizer = Tokenizer::new(bpe);
        let broken = |e: tokenizers::Error| LoadError::tokenizer(file, e.to_string());
        if pieces == Pieces::Qwen2 {
            tokenizer.with_normalizer(Some(NormalizerWrapper::NFC(NFC))).map_err(broken)?;
        }
        tokenizer.with_pre_tokenizer(Some(pieces.pre_tokenizer().map_err(broken)?));
        tokenizer.add_tokens(added).map_err(broken)?;
        let vocab_size = u32::try_from(tokens.len())
            .map_err(|_| LoadError::tokenizer(file, format!("it has {} tokens", tokens.len())))?;
        Self::finish(file, tokenizer, true, specials, plain, vocab_size)
    }

    fn finish(
        file: &Path,
        mut tokenizer: Tokenizer,
        byte_level: bool,
        mut specials: Vec<Special>,
        plain: HashMap<u32, String>,
        vocab_size: u32,
    ) -> Result<Self, LoadError> {
        if vocab_size == 0 {
            return Err(LoadError::tokenizer(file, "its vocabulary is empty"));
        }
        // From here on the library leaves control tokens alone, and `encode_template` finds them.
        tokenizer.set_encode_special_tokens(true);
        // The longest of several that start at one place wins.
        specials.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        Ok(Self {
            inner: Arc::new(Inner {
                file: file.to_owned(),
                tokenizer,
                byte_level,
                special_ids: specials.iter().map(|s| s.id).collect(),
                specials,
                plain,
                vocab_size,
            }),
        })
    }

    /// The file that the tokenizer came from.
    pub fn file(&self) -> &Path {
        &self.inner.file
    }

    /// The largest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size as usize
    }

    /// Checks that every id has a row in an embedding of `vocab_rows` rows. More rows than ids are
    /// fine: embeddings are often padded.
    ///
    /// # Errors
    /// If there are more ids than rows; the message has both numbers.
    pub fn check_fits(&self, vocab_rows: usize) -> Result<(), LoadError> {
        if self.vocab_size() <= vocab_rows {
            return Ok(());
        }
        Err(LoadError::tokenizer(
            &self.inner.file,
            format!("its ids go up to {}, but the model's embedding has only {vocab_rows} rows", self.vocab_size() - 1),
        ))
    }

    /// The id of a token by its name in the vocabulary. Ordinary tokens of a byte-level vocabulary
    /// are named in its byte alphabet, where for example `Ġ` stands for a space.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner
            .specials
            .iter()
            .find(|s| s.text == token)
            .map(|s| s.id)
            .or_else(|| self.inner.tokenizer.token_to_id(token))
            // The names that control tokens have inside are nobody's business.
            .filter(|_| !token.starts_with('\0'))
    }

    /// The text of one token, control tokens by their names, bytes that are not UTF-8 on their own
    /// as U+FFFD. `None` for an id that the vocabulary lacks.
    pub fn token_text(&self, id: u32) -> Option<String> {
        let bytes = self.token_bytes(id)?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether an id is a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.special_ids.contains(&id)
    }

    /// The first control token whose name occurs in `text`, if any.
    pub fn special_in<'a>(&'a self, text: &str) -> Option<&'a str> {
        self.next_special(text).map(|(_, s)| s.text.as_str())
    }

    /// The text with `stand_in` in place of every name of a control token.
    pub(crate) fn without_specials(&self, text: &str, stand_in: char) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((at, special)) = self.next_special(rest) {
            out.push_str(&rest[..at]);
            out.push(stand_in);
            rest = &rest[at + special.text.len()..];
        }
        out.push_str(rest);
        out
    }

    /// The ids of a text from outside. Names of control tokens in it are spelt out, and nothing is
    /// put in front or behind.
    ///
    /// # Errors
    /// If the tokenizer fails on this text.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, LoadError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        self.inner
            .tokenizer
            .encode_fast(text, false)
            .map(|e| e.get_ids().to_vec())
            .map_err(|e| LoadError::tokenizer(&self.inner.file, format!("the text cannot be encoded: {e}")))
    }

    /// The ids of a rendered template. Control tokens are recognised in its own parts only; between
    /// two of them, own and foreign text are encoded as one, so that the ids are those of the whole
    /// text wherever the foreign parts hold no control tokens.
    ///
    /// # Errors
    /// If the tokenizer fails on a part.
    pub fn encode_template(&self, segments: &[Segment]) -> Result<Vec<u32>, LoadError> {
        let mut ids = Vec::new();
        let mut pending = String::new();
        // Set behind a token that takes the white space after it.
        let mut stripping = false;
        let push = |pending: &mut String, stripping: &mut bool, text: &str| {
            let text = if *stripping { text.trim_start() } else { text };
            *stripping = *stripping && text.is_empty();
            pending.push_str(text);
        };
        for segment in segments {
            let mut rest = match segment {
                Segment::Text(text) => {
                    push(&mut pending, &mut stripping, text);
                    continue;
                }
                Segment::Template(text) => text.as_str(),
            };
            while let Some((at, special)) = self.next_special(rest) {
                push(&mut pending, &mut stripping, &rest[..at]);
                if special.lstrip {
                    pending.truncate(pending.trim_end().len());
                }
                ids.extend(self.encode_text(&pending)?);
                pending.clear();
                ids.push(special.id);
                stripping = special.rstrip;
                rest = &rest[at + special.text.len()..];
            }
            push(&mut pending, &mut stripping, rest);
        }
        ids.extend(self.encode_text(&pending)?);
        Ok(ids)
    }

    fn next_special(&self, text: &str) -> Option<(usize, &Special)> {
        self.inner
            .specials
            .iter()
            .filter_map(|s| text.find(&s.text).map(|at| (at, s)))
            // The list starts with the longest, and the first of equals is kept.
            .min_by_key(|(at, _)| *at)
    }

    /// The text of ids, control tokens and unknown ids left out. Bytes that are not UTF-8 become
    /// U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut detokenizer = self.detokenizer();
        let mut text: String = ids.iter().filter_map(|id| detokenizer.push(*id)).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    /// A decoder that takes ids one by one.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer { tokenizer: self.clone(), bytes: Vec::new(), ids: Vec::new(), shown: 0 }
    }

    /// Whether encoding and decoding gives back `text`. It may not: vocabularies can lack bytes,
    /// and some tokenizers normalise. Worth a warning before a prompt is used.
    pub fn survives_round_trip(&self, text: &str) -> bool {
        self.encode_text(text).is_ok_and(|ids| self.decode(&ids) == text)
    }

    /// Whether the tokenizer's own rules put `bos` in front of a plain text. Files from GGUF have
    /// no such rules; their metadata says it.
    pub(crate) fn adds_in_front(&self, bos: u32) -> bool {
        self.inner.tokenizer.encode_fast("a", true).is_ok_and(|e| e.get_ids().first() == Some(&bos))
    }

    /// The bytes that a token stands for.
    fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        if let Some(text) = self.inner.plain.get(&id) {
            return Some(text.clone().into_bytes());
        }
        let token = self.inner.tokenizer.id_to_token(id)?;
        if self.inner.byte_level
            && let Some(bytes) = token.chars().map(char_to_byte).collect()
        {
            return Some(bytes);
        }
        Some(token.into_bytes())
    }
}

/// Turns ids into text as they come, and holds back bytes until they make whole characters.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: TextTokenizer,
    /// Byte-level vocabularies: bytes that are not yet a whole character.
    bytes: Vec<u8>,
    /// Other vocabularies: the last ids, of which the first `shown` are out already and stand here
    /// because text may depend on what comes before it.
    ids: Vec<u32>,
    shown: usize,
}

impl Detokenizer {
    /// Takes one id and answers with the text that is complete now, if there is any. Control tokens
    /// and unknown ids have no text.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if self.tokenizer.is_special(id) {
            return None;
        }
        if self.tokenizer.inner.byte_level {
            self.bytes.extend(self.tokenizer.token_bytes(id)?);
            let text = take_characters(&mut self.bytes);
            return (!text.is_empty()).then_some(text);
        }
        self.ids.push(id);
        let text = self.tail();
        // An unfinished character decodes to this one.
        if text.is_empty() || text.ends_with('\u{fffd}') {
            return None;
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Some(text)
    }

    /// Ends the text: what was held back, with U+FFFD in place of unfinished characters.
    pub fn finish(mut self) -> String {
        if self.tokenizer.inner.byte_level {
            let mut text = take_characters(&mut self.bytes);
            text.push_str(&String::from_utf8_lossy(&self.bytes));
            return text;
        }
        self.tail()
    }

    /// The text of the ids that are not out yet.
    fn tail(&self) -> String {
        let decode = |ids: &[u32]| {
            let decoded = self.tokenizer.inner.tokenizer.decode(ids, true);
            decoded.unwrap_or_default()
        };
        let before = decode(&self.ids[..self.shown]);
        decode(&self.ids).strip_prefix(before.as_str()).map(str::to_owned).unwrap_or_default()
    }
}

/// Takes whole characters from the front of `bytes`; what can never become a character is U+FFFD.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut at = 0;
    loop {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(rest) => {
                text.push_str(rest);
                at = bytes.len();
                break;
            }
            Err(e) => {
                let valid = &bytes[at..at + e.valid_up_to()];
                text.push_str(&String::from_utf8_lossy(valid));
                at += e.valid_up_to();
                // No length: the bytes end within a character.
                let Some(bad) = e.error_len() else { break };
                text.push('\u{fffd}');
                at += bad;
            }
        }
    }
    bytes.drain(..at);
    text
}

/// The character that stands for a byte in byte-level vocabularies: visible Latin-1 characters
/// stand for themselves, the 68 other bytes for the characters from U+0100 on.
#[cfg(any(test, feature = "test-support"))]
pub(crate) fn byte_to_char(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=0x20 => offset_char(0, byte),
        0x7f..=0xa0 => offset_char(33, byte - 0x7f),
        0xad => offset_char(67, 0),
    }
}

#[cfg(any(test, feature = "test-support"))]
fn offset_char(base: u32, byte: u8) -> char {
    char::from_u32(0x100 + base + u32::from(byte)).unwrap_or('\u{fffd}')
}

/// The byte that a character stands for in byte-level vocabularies.
pub(crate) fn char_to_byte(c: char) -> Option<u8> {
    let code = u32::from(c);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// How text is cut into pieces; merges never cross pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pieces {
    Gpt2,
    Llama3,
    Qwen2,
    SmolLm,
}

impl Pieces {
    fn named(file: &Path, name: &str) -> Result<Self, LoadError> {
        Ok(match name {
            "gpt-2" => Self::Gpt2,
            "llama-bpe" | "llama3" | "llama-v3" => Self::Llama3,
            "qwen2" => Self::Qwen2,
            "smollm" => Self::SmolLm,
            other => {
                return Err(LoadError::field(
                    file,
                    "tokenizer.ggml.pre",
                    format!("'{}' is not supported (supported: gpt-2, llama-bpe, qwen2, smollm)", excerpt(other)),
                ));
            }
        })
    }

    fn pre_tokenizer(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let bytes = |cut| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, cut));
        let split = |pattern: &str| -> tokenizers::Result<PreTokenizerWrapper> {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            Ok(PreTokenizerWrapper::Split(split))
        };
        let steps = match self {
            Self::Gpt2 => return Ok(bytes(true)),
            Self::SmolLm => vec![PreTokenizerWrapper::Digits(Digits::new(true)), bytes(true)],
            Self::Llama3 => vec![split(LLAMA3_PIECES)?, bytes(false)],
            Self::Qwen2 => vec![split(QWEN2_PIECES)?, bytes(false)],
        };
        Ok(PreTokenizerWrapper::Sequence(Sequence::new(steps)))
    }
}

/// What a token of a GGUF vocabulary is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Never recognised in text.
    Control,
    Normal,
    /// Plain text that is recognised before anything else.
    UserDefined,
}

/// The kinds of all tokens. Without a list, the begin and end ids are control tokens and all others
/// normal ones.
fn token_kinds(gguf: &Gguf, count: usize) -> Result<Vec<Kind>, LoadError> {
    let file = gguf.path();
    let key = "tokenizer.ggml.token_type";
    let Some(value) = gguf.get(key) else {
        let mut kinds = vec![Kind::Normal; count];
        for key in ["bos", "eos", "eot", "unknown", "padding"] {
            let id = gguf
                .get(&format!("tokenizer.ggml.{key}_token_id"))
                .and_then(GgufValue::as_u64)
                .and_then(|id| usize::try_from(id).ok());
            if let Some(kind) = id.and_then(|id| kinds.get_mut(id)) {
                *kind = Kind::Control;
            }
        }
        return Ok(kinds);
    };
    let list = value
        .as_integers()
        .ok_or_else(|| LoadError::field(file, key, format!("{} is not a list of integers", value.describe())))?;
    if list.len() != count {
        return Err(LoadError::field(file, key, format!("it has {} entries for {count} tokens", list.len())));
    }
    list.into_iter()
        .enumerate()
        .map(|(id, kind)| match kind {
            1 => Ok(Kind::Normal),
            // Unknown, control, unused: nothing that text should lead to.
            2 | 3 | 5 => Ok(Kind::Control),
            4 => Ok(Kind::UserDefined),
            other => Err(LoadError::field(
                file,
                key,
                format!("token {id} has type {other}, which byte-level BPE does not have"),
            )),
        })
        .collect()
}

/// Splits merges into pairs, and checks that both parts and their sum are in the vocabulary.
fn checked_merges(file: &Path, vocab: &Vocab, merges: &[String]) -> Result<Merges, LoadError> {
    merges
        .iter()
        .enumerate()
        .map(|(i, merge)| {
            let error = |reason: &str| LoadError::tokenizer(file, format!("merge {i}, '{}', {reason}", excerpt(merge)));
            let (a, b) = merge
                .split_once(' ')
                .filter(|(a, b)| !a.is_empty() && !b.is_empty())
                .ok_or_else(|| error("is not two tokens with a space between"))?;
            if [a, b, &format!("{a}{b}")].into_iter().any(|t| !vocab.contains_key(t)) {
                return Err(error("has a part or a sum that is not in the vocabulary"));
            }
            Ok((a.to_owned(), b.to_owned()))
        })
        .collect()
}

/// Checks those parts of a `tokenizer.json` whose faults the library answers with a panic or worse.
fn check_hf_json(file: &Path, json: &serde_json::Value) -> Result<(), LoadError> {
    let id_too_large = |what: &str, id: u64| {
        LoadError::tokenizer(file, format!("{what} has the id {id}, which is not the id of a token"))
    };
    let too_large = |id: &u64| *id > u64::from(MAX_ID);
    let added = json.get("added_tokens").and_then(|v| v.as_array());
    for token in added.into_iter().flatten() {
        if let Some(id) = token.get("id").and_then(|v| v.as_u64()).filter(too_large) {
            return Err(id_too_large("an added token", id));
        }
    }
    let model = json.get("model");
    let field = |name: &str| model.and_then(|m| m.get(name));
    let Some(vocab) = field("vocab").and_then(|v| v.as_object()) else {
        return Ok(());
    };
    for (token, id) in vocab {
        if let Some(id) = id.as_u64().filter(too_large) {
            return Err(id_too_large(&format!("token '{}'", excerpt(token)), id));
        }
    }
    let prefix = field("continuing_subword_prefix").and_then(|v| v.as_str()).unwrap_or("");
    let merges = field("merges").and_then(|v| v.as_array());
    for (i, merge) in merges.into_iter().flatten().enumerate() {
        let pair = match merge {
            serde_json::Value::String(text) => text.split_once(' '),
            serde_json::Value::Array(pair) => match pair.as_slice() {
                [a, b] => a.as_str().zip(b.as_str()),
                _ => None,
            },
            _ => None,
        };
        let sound = pair.is_some_and(|(a, b)| {
            vocab.contains_key(a)
                && vocab.contains_key(b)
                && b.strip_prefix(prefix).is_some_and(|b| vocab.contains_key(&format!("{a}{b}")))
        });
        // The old form of a file starts with its version.
        let version = merge.as_str().is_some_and(|m| m.starts_with("#version"));
        if !sound && !version {
            return Err(LoadError::tokenizer(
                file,
                format!(
                    "merge {i}, {}, is not two tokens of the vocabulary whose sum is in it too",
                    excerpt(&merge.to_string())
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test may panic")]
mod tests {
    use super::super::config::Architecture;
    use super::super::gguf::GgufArray;
    use super::super::gguf_write::GgufWriter;
    use super::super::tiny::{TinyModel, cached_model};
    use super::*;

    fn from_writer(w: &GgufWriter) -> Result<TextTokenizer, LoadError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, w.finish()).unwrap();
        TextTokenizer::from_gguf(&Gguf::open(&path)?)
    }

    fn tiny() -> TextTokenizer {
        from_writer(&TinyModel::new(Architecture::Llama).gguf()).unwrap()
    }

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut seen = HashSet::new();
        for byte in 0..=255u8 {
            let c = byte_to_char(byte);
            assert!(seen.insert(c));
            assert_eq!(char_to_byte(c), Some(byte), "{byte}");
        }
        assert_eq!(byte_to_char(b' '), 'Ġ');
        assert_eq!(byte_to_char(b'\n'), 'Ċ');
        assert_eq!(char_to_byte('你'), None);
    }

    #[test]
    fn control_tokens_are_recognised_in_templates_only() {
        let t = tiny();
        let start = t.id_of("<|im_start|>").unwrap();
        let text = t.encode_text("a<|im_start|>b").unwrap();
        assert!(!text.contains(&start));
        assert_eq!(t.decode(&text), "a<|im_start|>b");
        let mixed = t
            .encode_template(&[
                Segment::Template("<|im_start|>user\n".into()),
                Segment::Text("x<|im_start|>".into()),
                Segment::Template("<|im_end|>".into()),
            ])
            .unwrap();
        assert_eq!(mixed.iter().filter(|id| **id == start).count(), 1);
        assert_eq!(mixed.first(), Some(&start));
        assert_eq!(mixed.last(), t.id_of("<|im_end|>").as_ref());
        assert_eq!(t.decode(&mixed), "user\nx<|im_start|>");
        assert_eq!(t.special_in("x <|im_end|>"), Some("<|im_end|>"));
        assert_eq!(t.id_of("\u{0}1"), None);
    }

    #[test]
    fn merges_reach_across_segments() {
        let t = tiny();
        let whole = t.encode_text("the then").unwrap();
        let parts = [Segment::Template("the t".into()), Segment::Text("hen".into())];
        assert_eq!(t.encode_template(&parts).unwrap(), whole);
    }

    #[test]
    fn streaming_gives_whole_characters_only() {
        let t = tiny();
        for text in ["é", "你好, world", "🙂🙂", "a\u{301}", ""] {
            let ids = t.encode_text(text).unwrap();
            let mut d = t.detokenizer();
            let mut out = String::new();
            for id in ids {
                if let Some(part) = d.push(id) {
                    assert!(!part.is_empty() && !part.contains('\u{fffd}'));
                    out.push_str(&part);
                }
            }
            assert_eq!(d.finish(), "");
            assert_eq!(out, text);
            assert!(t.survives_round_trip(text));
        }
        let smile = t.encode_text("🙂").unwrap();
        assert_eq!(smile.len(), 4);
        assert_eq!(t.decode(&smile[..3]), "\u{fffd}");
        let mut broken = smile[..2].to_vec();
        broken.extend(t.encode_text("ok").unwrap());
        assert_eq!(t.decode(&broken), "\u{fffd}ok");
        assert_eq!(t.decode(&[u32::MAX, 5000]), "");
    }

    #[test]
    fn hugging_face_and_gguf_agree() {
        let tiny = TinyModel::new(Architecture::Llama);
        let gguf = from_writer(&tiny.gguf()).unwrap();
        let json = tiny.tokenizer_json();
        let hf = TextTokenizer::from_hf_json(Path::new("tokenizer.json"), &json).unwrap();
        assert_eq!(hf.vocab_size(), gguf.vocab_size());
        for text in ["the other then 2024", "<|im_start|>x", "你好", "  \n\n"] {
            assert_eq!(hf.encode_text(text).unwrap(), gguf.encode_text(text).unwrap());
            assert!(hf.survives_round_trip(text));
        }
        let segments = [Segment::Template("<|im_start|>the<|im_end|>\n".into())];
        let ids = gguf.encode_template(&segments).unwrap();
        assert_eq!(hf.encode_template(&segments).unwrap(), ids);
    }

    /// A vocabulary with `▁` for spaces and a byte fallback, as Llama 2 has.
    #[test]
    fn a_vocabulary_that_is_not_byte_level_streams_too() {
        let json = r#"{"version": "1.0", "added_tokens":
            [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
              "normalized": false, "special": true}],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                "byte_fallback": true, "ignore_merges": false,
                "vocab": {"<s>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "<0xC3>": 5, "<0xA9>": 6},
                "merges": ["▁ a"]}}"#;
        let t = TextTokenizer::from_hf_json(Path::new("tokenizer.json"), json).unwrap();
        let ids = t.encode_text("ab a é").unwrap();
        assert_eq!(ids, [4, 3, 4, 1, 5, 6]);
        assert_eq!(t.decode(&ids), "ab a é");
        let mut d = t.detokenizer();
        let parts: Vec<_> = ids.iter().map(|id| d.push(*id)).collect();
        let some = |s: &str| Some(s.to_owned());
        assert_eq!(parts, [some("a"), some("b"), some(" a"), some(" "), None, some("é")]);
        assert!(t.adds_in_front(0) && !t.adds_in_front(1));
    }

    #[test]
    fn a_tokenizer_that_does_not_fit() {
        let t = tiny();
        let n = t.vocab_size();
        assert!(t.check_fits(n).is_ok());
        let message = t.check_fits(n - 1).unwrap_err().to_string();
        assert!(message.contains(&(n - 1).to_string()), "{message}");
    }

    #[test]
    fn bad_metadata_is_named() {
        let change = |key: &str, value: GgufValue| {
            let mut w = TinyModel::new(Architecture::Llama).gguf();
            w.replace(key, value);
            from_writer(&w).unwrap_err().to_string()
        };
        let text = |s: &str| GgufValue::String(s.into());
        let list = |l: &[&str]| GgufValue::Array(GgufArray::String(l.iter().map(|s| s.to_string()).collect()));
        assert!(change("tokenizer.ggml.model", text("llama")).contains("kind 'llama'"));
        assert!(change("tokenizer.ggml.pre", text("tekken")).contains("'tekken' is not supported"));
        assert!(change("tokenizer.ggml.tokens", text("a")).contains("not a list of strings"));
        assert!(change("tokenizer.ggml.tokens", list(&[])).contains("entries for 0 tokens"));
        assert!(change("tokenizer.ggml.merges", list(&["ab"])).contains("merge 0, 'ab'"));
        assert!(change("tokenizer.ggml.merges", list(&["t q"])).contains("not in the vocabulary"));
        // A sum longer than any token must not reach the library.
        let long = "other the";
        assert!(change("tokenizer.ggml.merges", list(&[long])).contains("merge 0"));
        let mut w = TinyModel::new(Architecture::Llama).gguf();
        w.remove("tokenizer.ggml.pre");
        let missing = from_writer(&w).unwrap_err().to_string();
        assert!(missing.contains("tokenizer.ggml.pre"), "{missing}");
        let kinds = GgufValue::Array(GgufArray::I32(vec![6; TinyModel::new(Architecture::Llama).vocab_size()]));
        assert!(change("tokenizer.ggml.token_type", kinds).contains("token 0 has type 6"));

        let mut w = TinyModel::new(Architecture::Llama).gguf();
        let mut tokens = w
            .metadata()
            .iter()
            .find(|(k, _)| k == "tokenizer.ggml.tokens")
            .and_then(|(_, v)| v.as_strings())
            .unwrap()
            .to_vec();
        tokens[9] = tokens[8].clone();
        w.replace("tokenizer.ggml.tokens", GgufValue::Array(GgufArray::String(tokens)));
        assert!(from_writer(&w).unwrap_err().to_string().contains("ids 8 and 9 are both"));
    }

    #[test]
    fn bad_tokenizer_json_is_an_error() {
        let json = TinyModel::new(Architecture::Llama).tokenizer_json();
        let bad = |from: &str, to: &str| {
            assert!(json.contains(from), "{from}");
            let text = json.replace(from, to);
            let file = Path::new("tokenizer.json");
            TextTokenizer::from_hf_json(file, &text).unwrap_err().to_string()
        };
        assert!(bad("\"t h\"", "\"other the\"").contains("merge 0"));
        assert!(bad("\"t h\"", "\"th\"").contains("merge 0"));
        assert!(bad("\"a\":", "\"a\": 4294967295, \"zzzz\":").contains("4294967295"));
        assert!(bad("\"BPE\"", "\"XYZ\"").contains("tokenizer.json"));
        for len in (0..json.len()).step_by(97) {
            if let Some(cut) = json.get(..len) {
                assert!(TextTokenizer::from_hf_json(Path::new("t"), cut).is_err());
            }
        }
    }

    #[test]
    fn the_ways_of_cutting_text() {
        let pieces = |p: Pieces, text: &str| -> Vec<String> {
            use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
            let mut s = PreTokenizedString::from(text);
            p.pre_tokenizer().unwrap().pre_tokenize(&mut s).unwrap();
            s.get_splits(OffsetReferential::Original, OffsetType::Byte)
                .into_iter()
                .map(|(_, (start, end), _)| text[start..end].to_owned())
                .collect()
        };
        let text = "I'LL pay 12345  now!\n\n ok";
        assert_eq!(pieces(Pieces::Gpt2, text), ["I", "'", "LL", " pay", " 12345", " ", " now", "!", "\n\n", " ok"]);
        assert_eq!(
            pieces(Pieces::SmolLm, text),
            ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " ", " now", "!", "\n\n", " ok"]
        );
        assert_eq!(pieces(Pieces::Llama3, text), ["I", "'LL", " pay", " ", "123", "45", " ", " now", "!\n\n", " ok"]);
        assert_eq!(
            pieces(Pieces::Qwen2, text),
            ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " ", " now", "!\n\n", " ok"]
        );
    }

    #[test]
    fn long_runs_of_one_character_are_encoded() {
        let t = tiny();
        for c in [" ", "\n", "a", "7"] {
            let text = c.repeat(200_000);
            assert!(t.survives_round_trip(&text), "{c:?}");
        }
    }

    /// Fixtures from the model's own vocabulary and merges.
    #[test]
    fn smollm2_fixtures() {
        let Some(path) = cached_model() else { return };
        let t = TextTokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap();
        assert_eq!(t.vocab_size(), 49_152);
        for (text, ids) in [
            ("Hello world", &[19556, 905][..]),
            (" 2024", &[216, 34, 32, 34, 36]),
            ("What is 17+25?", &[1780, 314, 216, 33, 39, 27, 34, 37, 47]),
            ("don't I'll", &[12420, 982, 339, 3060]),
            ("\n\n", &[1116]),
            ("a\tb", &[81, 197, 82]),
            ("é", &[2756]),
            ("你好", &[18645, 250, 48392, 138]),
            ("🙂", &[10813, 38887]),
        ] {
            assert_eq!(t.encode_text(text).unwrap(), ids, "{text:?}");
            assert_eq!(t.decode(ids), text);
        }
        let turn = "<|im_start|>user\nHi<|im_end|>\n";
        let ids = t.encode_template(&[Segment::Template(turn.into())]).unwrap();
        assert_eq!(ids, [1, 4093, 198, 26843, 2, 198]);
        let ids = t.encode_text(turn).unwrap();
        assert!(ids.iter().all(|id| *id > 16));
        assert_eq!(t.decode(&ids), turn);
        // Bytes that the vocabulary lacks vanish.
        assert!(!t.survives_round_trip("a\u{4}b"));
        assert!(t.survives_round_trip("naïve — 你好 🙂 \t x"));
    }
}
