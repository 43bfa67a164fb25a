//! Everything a model's file or folder says, read and checked together.

use std::path::{Path, PathBuf};

use polyattn_api::{LayerConfig, MoeConfig};
use polyattn_device::DType;
use sha2::{Digest, Sha256};

use super::gguf::Gguf;
use super::map::{read_json_object, read_text};
use super::{
    ChatTemplate, Checkpoint, CheckpointFormat, DecoderConfig, LayerWeight, LoadError, StoredType, TextTokenizer,
    WeightName,
};

/// How many bytes of each end of each tensor the fingerprint covers.
const SAMPLE: usize = 4096;

/// A model on disk, ready to be placed on a device.
///
/// Opening reads configuration and tokenizer and checks that they, the weights' names, shapes and
/// types all fit together. The weights themselves stay on disk.
#[derive(Debug)]
#[non_exhaustive]
pub struct ModelSource {
    /// The weights.
    pub checkpoint: Checkpoint,
    /// The dimensions and the special ids.
    pub config: DecoderConfig,
    /// Text to ids and back.
    pub tokenizer: TextTokenizer,
    /// How a conversation becomes text, if the model says it.
    pub chat_template: Option<ChatTemplate>,
    /// Tells models apart: 64 hexadecimal digits over the names, shapes and types of all tensors and
    /// the first and last 4,096 stored bytes of each. The same weights in another file format or
    /// precision have another fingerprint.
    pub fingerprint: String,
}

impl ModelSource {
    /// The kinds of its attention layers, as the selector sees them, and for each layer the place of its kind. A kind has
    /// experts where one of its layers has.
    ///
    /// # Errors
    /// Experts that the checkpoint does not have.
    pub fn attention_layers(&self) -> Result<(Vec<LayerConfig>, Vec<usize>), LoadError> {
        let (mut kinds, places) = self.config.attention_layers();
        let Some(experts) = &self.config.experts else { return Ok((kinds, places)) };
        for (layer, place) in (0..).zip(&places).filter(|(layer, _)| self.config.has_experts(*layer)) {
            let kind = &mut kinds[*place];
            if kind.moe.is_some() {
                continue;
            }
            let name = WeightName::Expert { layer, expert: 0, weight: LayerWeight::Gate };
            let dtype = match self.checkpoint.dtype(&name.in_format(self.checkpoint.format()))? {
                StoredType::F32 => DType::F32,
                StoredType::BF16 => DType::BF16,
                _ => DType::F16,
            };
            let (hidden_size, wide) = (self.config.hidden_size, experts.intermediate_size);
            let moe = MoeConfig::new(experts.experts, experts.per_token, hidden_size, wide);
            kind.moe = Some(moe.with_dtype(dtype));
        }
        Ok((kinds, places))
    }

    /// The format of queries and cache: f32 for a model of f32 weights, otherwise f16.
    ///
    /// # Errors
    /// A checkpoint without an embedding.
    pub fn activation_dtype(&self) -> Result<DType, LoadError> {
        let name = WeightName::TokenEmbedding.in_format(self.checkpoint.format());
        Ok(match self.checkpoint.dtype(&name)? {
            StoredType::F32 => DType::F32,
            _ => DType::F16,
        })
    }

    /// Opens a GGUF file, or a Hugging Face folder with `config.json`, `tokenizer.json` and
    /// `*.safetensors`.
    ///
    /// # Errors
    /// If a file is missing or unsound, if the model is of a kind that is not supported, if a weight
    /// is missing or has another shape than the configuration needs, or if the tokenizer has more
    /// ids than the embedding has rows.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let checkpoint = Checkpoint::open(path)?;
        let (config, tokenizer, chat_template) = match checkpoint.gguf() {
            Some(gguf) => gguf_parts(gguf)?,
            None if path.is_dir() => hf_parts(path)?,
            None => {
                return Err(LoadError::unsupported(
                    path,
                    "a .safetensors file alone is not a model; name the folder that holds its config.json and tokenizer.json",
                ));
            }
        };
        tokenizer.check_fits(config.vocab_size as usize)?;
        config.check_weights(&checkpoint)?;
        let fingerprint = fingerprint(&checkpoint)?;
        Ok(Self { checkpoint, config, tokenizer, chat_template, fingerprint })
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// The naming convention of the weights.
    pub fn format(&self) -> CheckpointFormat {
        self.checkpoint.format()
    }
}

type Parts = (DecoderConfig, TextTokenizer, Option<ChatTemplate>);

fn gguf_parts(gguf: &Gguf) -> Result<Parts, LoadError> {
    const TEMPLATE: &str = "tokenizer.chat_template";
    let config = DecoderConfig::from_gguf(gguf)?;
    let tokenizer = TextTokenizer::from_gguf(gguf)?;
    let text_of = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
    let template = match gguf.get(TEMPLATE) {
        None => None,
        Some(value) => {
            let source = value.as_str().ok_or_else(|| {
                LoadError::field(gguf.path(), TEMPLATE, format!("{} is not a string", value.describe()))
            })?;
            Some(ChatTemplate::new(
                gguf.path(),
                TEMPLATE,
                source,
                &text_of(config.bos),
                &text_of(config.eos.first().copied()),
            )?)
        }
    };
    Ok((config, tokenizer, template))
}

fn hf_parts(folder: &Path) -> Result<Parts, LoadError> {
    let mut config = DecoderConfig::from_hf_folder(folder)?;
    let file = folder.join("tokenizer.json");
    if !file.exists() {
        return Err(LoadError::tokenizer(
            &file,
            "the file is missing; other tokenizer files, such as tokenizer.model, are not read",
        ));
    }
    let tokenizer = TextTokenizer::from_hf_file(&file)?;

    let settings_file = folder.join("tokenizer_config.json");
    let settings = match settings_file.exists() {
        true => read_json_object(&settings_file)?,
        false => serde_json::Map::new(),
    };
    // A token is given as its text, or as an object that holds it.
    let token = |name: &str| -> Option<String> {
        let value = settings.get(name)?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        text.map(str::to_owned)
    };
    let (bos, eos) = (token("bos_token"), token("eos_token"));
    let id_of = |text: &Option<String>| {
        let id = text.as_deref().and_then(|t| tokenizer.id_of(t));
        id.filter(|id| *id < config.vocab_size)
    };
    let (bos_id, eos_id) = (id_of(&bos), id_of(&eos));
    config.bos = config.bos.or(bos_id);
    // Chat models often end a turn with a token that only the tokenizer's settings name.
    if let Some(id) = eos_id
        && !config.eos.contains(&id)
    {
        config.eos.push(id);
    }
    // The tokenizer's own rules are what the model's makers run; the setting is for other code.
    config.add_bos = config.add_bos || config.bos.is_some_and(|id| tokenizer.adds_in_front(id));

    let template = hf_template(folder, &settings_file, &settings)?
        .map(|(file, origin, source)| {
            ChatTemplate::new(
                &file,
                &origin,
                &source,
                bos.as_deref().unwrap_or_default(),
                eos.as_deref().unwrap_or_default(),
            )
        })
        .transpose()?;
    Ok((config, tokenizer, template))
}

/// The file, the name and the text of a folder's chat template: a file of its own, or a setting of
/// the tokenizer, which may be one template or a list of named ones.
fn hf_template(
    folder: &Path,
    settings_file: &Path,
    settings: &serde_json::Map<String, serde_json::Value>,
) -> Result<Option<(PathBuf, String, String)>, LoadError> {
    const FILE: &str = "chat_template.jinja";
    const FIELD: &str = "chat_template";
    let own = folder.join(FILE);
    if own.exists() {
        let source = read_text(&own)?;
        return Ok(Some((own, FILE.to_owned(), source)));
    }
    let source = match settings.get(FIELD) {
        None | Some(serde_json::Value::Null) => return Ok(None),
        Some(serde_json::Value::String(source)) => Some(source.as_str()),
        Some(serde_json::Value::Array(list)) => list
            .iter()
            .find(|t| t.get("name").and_then(|n| n.as_str()) == Some("default"))
            .and_then(|t| t.get("template")?.as_str()),
        Some(_) => None,
    };
    let source = source.ok_or_else(|| {
        LoadError::field(settings_file, FIELD, "it is neither a template nor a list with one named 'default'")
    })?;
    Ok(Some((settings_file.to_owned(), FIELD.to_owned(), source.to_owned())))
}

fn fingerprint(checkpoint: &Checkpoint) -> Result<String, LoadError> {
    let mut names = checkpoint.names();
    names.sort_unstable();
    let mut hash = Sha256::new();
    for name in names {
        // Tensors that cannot be read take no part in the model.
        let Ok(ty) = checkpoint.dtype(name) else {
            continue;
        };
        let shape = checkpoint.shape(name)?;
        hash.update(format!("{name}\0{ty}\0{shape:?}\0"));
        let (rows, _) = checkpoint.rows_and_columns(name)?;
        let bytes = checkpoint.row_bytes(name, 0..rows)?;
        hash.update(&bytes[..bytes.len().min(SAMPLE)]);
        hash.update(&bytes[bytes.len().saturating_sub(SAMPLE)..]);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test may panic")]
mod tests {
    use super::super::config::{Architecture, RopePairing, WeightName};
    use super::super::tiny::{TinyModel, cached_model};
    use super::super::{ChatMessage, StoredType};
    use super::*;

    fn open_bytes(bytes: &[u8]) -> Result<ModelSource, LoadError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, bytes).unwrap();
        ModelSource::open(&path)
    }

    /// Reads every tensor, as a caller would.
    fn read_all(model: &ModelSource) -> f32 {
        let c = &model.checkpoint;
        let mut sum = 0.0;
        for name in c.names() {
            let (rows, columns) = c.rows_and_columns(name).unwrap();
            let mut out = vec![0.0; columns];
            for row in 0..rows {
                c.read_rows(name, row..row + 1, &mut out).unwrap();
                sum += out.iter().sum::<f32>();
            }
        }
        sum
    }

    #[test]
    fn both_formats_of_one_model_agree() {
        for architecture in Architecture::IN_GGUF {
            let mut tiny = TinyModel::new(architecture);
            tiny.tied_embedding = architecture != Architecture::Qwen2;
            let dir = tempfile::tempdir().unwrap();
            tiny.write_hf_folder(dir.path()).unwrap();
            let file = dir.path().join("m.gguf");
            tiny.write_gguf(&file).unwrap();
            let hf = ModelSource::open(dir.path()).unwrap();
            let gguf = ModelSource::open(&file).unwrap();
            assert_ne!(hf.fingerprint, gguf.fingerprint);
            assert_eq!(hf.config.eos, [2, 0]);
            assert_eq!(hf.config.bos, Some(1));

            let mut same = hf.config.clone();
            same.rope.pairing = gguf.config.rope.pairing;
            assert_eq!(same, gguf.config);
            assert_eq!(hf.config.rope.pairing, RopePairing::HalfSplit);

            let messages = [ChatMessage::user("the <|im_end|>")];
            let ids = |m: &ModelSource| {
                let t = m.chat_template.as_ref().unwrap();
                t.encode(&m.tokenizer, &messages, true).unwrap()
            };
            assert_eq!(ids(&hf), ids(&gguf));

            let row = |m: &ModelSource, name: WeightName, row: usize| {
                let mut out = vec![0.0; tiny.hidden_size];
                let name = name.in_format(m.format());
                m.checkpoint.read_rows(&name, row..row + 1, &mut out).unwrap();
                out
            };
            let up = WeightName::Layer(1, LayerWeight::Up);
            assert_eq!(row(&hf, up, 5), row(&gguf, up, 5));
            // Row 2i + s of an interleaved head is row s · 8 + i of a half-split one.
            let query = WeightName::Layer(0, LayerWeight::Query);
            let stored = match architecture {
                Architecture::Llama => 16 + 2 * 3 + 1,
                _ => 16 + 8 + 3,
            };
            assert_eq!(row(&hf, query, 16 + 8 + 3), row(&gguf, query, stored));
        }
    }

    #[test]
    fn quantised_files_open_and_read() {
        for ty in [StoredType::F16, StoredType::Q8_0, StoredType::Q4_1] {
            let mut tiny = TinyModel::new(Architecture::Llama);
            tiny.ty = ty;
            let model = open_bytes(&tiny.gguf().finish()).unwrap();
            assert_eq!(model.checkpoint.dtype("blk.0.attn_q.weight").unwrap(), ty);
            assert!(read_all(&model).is_finite());
        }
    }

    #[test]
    fn what_does_not_fit_together_is_an_error() {
        let tiny = TinyModel::new(Architecture::Llama);
        let mut w = tiny.gguf();
        w.remove("blk.1.ffn_up.weight");
        let message = open_bytes(&w.finish()).unwrap_err().to_string();
        assert!(message.contains("no tensor 'blk.1.ffn_up.weight'"), "{message}");

        let mut w = tiny.gguf();
        w.remove("blk.1.ffn_norm.weight");
        w.tensor("blk.1.ffn_norm.weight", &[63], StoredType::F32, vec![0; 252]);
        let message = open_bytes(&w.finish()).unwrap_err().to_string();
        assert!(message.contains("[63]") && message.contains("[64]"), "{message}");

        let mut w = tiny.gguf();
        w.remove("token_embd.weight");
        w.remove("llama.vocab_size");
        w.tensor("token_embd.weight", &[100, 64], StoredType::F32, vec![0; 25600]);
        let message = open_bytes(&w.finish()).unwrap_err().to_string();
        assert!(message.contains("269") && message.contains("100 rows"), "{message}");

        let dir = tempfile::tempdir().unwrap();
        tiny.write_hf_folder(dir.path()).unwrap();
        let alone = ModelSource::open(&dir.path().join("model.safetensors"));
        assert!(alone.unwrap_err().to_string().contains("name the folder"));
        std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        let message = ModelSource::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json") && message.contains("missing"), "{message}");
        let message = ModelSource::open(&dir.path().join("absent")).unwrap_err().to_string();
        assert!(message.contains("absent: cannot open the model"), "{message}");
    }

    #[test]
    fn other_places_of_chat_templates() {
        let dir = tempfile::tempdir().unwrap();
        TinyModel::new(Architecture::Qwen3).write_hf_folder(dir.path()).unwrap();
        let settings = dir.path().join("tokenizer_config.json");
        let rendered = || {
            let model = ModelSource::open(dir.path())?;
            let template = model.chat_template;
            Ok::<_, LoadError>(template.map(|t| t.render(&[], false).unwrap()))
        };
        std::fs::write(&settings, "{}").unwrap();
        assert_eq!(rendered().unwrap(), None);
        let list =
            r#"{"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]}"#;
        std::fs::write(&settings, list).unwrap();
        assert_eq!(rendered().unwrap().as_deref(), Some("y"));
        std::fs::write(&settings, r#"{"chat_template": 7}"#).unwrap();
        assert!(rendered().unwrap_err().to_string().contains("'chat_template'"));
        std::fs::write(dir.path().join("chat_template.jinja"), "z").unwrap();
        assert_eq!(rendered().unwrap().as_deref(), Some("z"));
    }

    /// A small file for the tables of damaged ones.
    fn small() -> Vec<u8> {
        let mut tiny = TinyModel::new(Architecture::Llama);
        tiny.layers = 1;
        tiny.hidden_size = 32;
        tiny.query_heads = 2;
        tiny.kv_heads = 1;
        tiny.intermediate_size = 32;
        tiny.ty = StoredType::Q4_1;
        tiny.gguf().finish()
    }

    #[test]
    fn every_truncation_is_an_error() {
        let sound = small();
        assert!(open_bytes(&sound).is_ok());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        for len in (0..sound.len()).step_by(7) {
            std::fs::write(&path, &sound[..len]).unwrap();
            let error = ModelSource::open(&path).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("m.gguf"), "{len}: {error}");
        }
    }

    #[test]
    fn flipped_bytes_never_panic() {
        let sound = small();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let header = open_bytes(&sound).unwrap().checkpoint.gguf().unwrap().data_offset();
        for at in (0..header).step_by(3) {
            for mask in [0x01, 0x80, 0xff] {
                let mut bytes = sound.clone();
                bytes[at] ^= mask;
                std::fs::write(&path, &bytes).unwrap();
                if let Ok(model) = ModelSource::open(&path) {
                    read_all(&model);
                    let _ = model.tokenizer.encode_text("the other 12");
                    if let Some(t) = &model.chat_template {
                        let _ = t.encode(&model.tokenizer, &[ChatMessage::user("x")], true);
                    }
                }
            }
        }
    }

    #[test]
    fn smollm2_opens() {
        let Some(path) = cached_model() else { return };
        let model = ModelSource::open(&path).unwrap();
        let c = &model.config;
        assert_eq!((c.layers, c.hidden_size, c.vocab_size), (30, 576, 49_152));
        assert_eq!((c.query_heads, c.kv_heads, c.head_dim), (9, 3, 64));
        assert_eq!((c.intermediate_size, c.context_length), (1536, 8192));
        assert_eq!((c.bos, c.add_bos, c.eos.as_slice()), (Some(1), false, &[2, 0][..]));
        assert_eq!((c.rope.theta, c.rope.pairing), (100_000.0, RopePairing::Interleaved));
        assert_eq!(c.rms_norm_eps, 1e-5);
        assert!(c.tied_embedding && !c.qkv_bias && !c.qk_norm);
        let gguf = model.checkpoint.gguf().unwrap();
        assert_eq!((gguf.tensors().len(), gguf.data_offset()), (272, 1_785_664));
        let mut out = vec![0.0; 576];
        let start = std::time::Instant::now();
        let mut sum = 0.0;
        for name in model.checkpoint.names() {
            let (rows, columns) = model.checkpoint.rows_and_columns(name).unwrap();
            out.resize(columns, 0.0);
            for row in 0..rows {
                model.checkpoint.read_rows(name, row..row + 1, &mut out).unwrap();
                sum += out.iter().map(|v| f64::from(*v)).sum::<f64>();
            }
        }
        assert!(sum.is_finite());
        eprintln!("all rows dequantised in {:?}", start.elapsed());
    }
}
