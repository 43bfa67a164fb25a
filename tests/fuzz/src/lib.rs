//! The targets: each takes whatever bytes there are and must neither panic nor hang, nor answer wrongly.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a target that panics has found something")]

mod page_table;
pub mod seeds;

use std::{fs, path::Path};

use polyattn_api::{BackendEntry, DeviceFacts, EngineConfig, INTERFACE_VERSION, Origin, Registry, resolve};
use polyattn_nn::load::{Checkpoint, DecoderConfig, RopeConfig, TextTokenizer, gguf::Gguf};
use polyattn_replay::{Case, reference::attention_f64};

pub use page_table::page_table;

/// A target by its name.
pub const TARGETS: [(&str, fn(&[u8])); 5] = [
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("configuration", configuration),
    ("replay", replay),
    ("page_table", page_table),
];

/// `data` as a file with this name in a folder of its own.
fn with_file(name: &str, data: &[u8], read: impl FnOnce(&Path)) {
    let folder = tempfile::Builder::new().prefix("polyattn-fuzz").tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, data).unwrap();
    read(&path);
}

/// Reads every tensor that a checkpoint says it has.
fn read_all(path: &Path) {
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    for name in checkpoint.names() {
        let (Ok(_), Ok(_)) = (checkpoint.shape(name), checkpoint.dtype(name)) else { continue };
        let Ok((rows, columns)) = checkpoint.rows_and_columns(name) else { continue };
        // A tensor lies within its file, so what it becomes is not larger than some of those.
        let mut out = vec![0.0; rows.min(4) * columns];
        let _ = checkpoint.read_rows(name, 0..rows.min(4), &mut out);
        let _ = checkpoint.row_bytes(name, rows..rows.wrapping_add(1));
    }
}

/// A model in one file: header, metadata, tensors, configuration and tokenizer.
pub fn gguf(data: &[u8]) {
    with_file("model.gguf", data, |path| {
        if let Ok(gguf) = Gguf::open(path) {
            let _ = DecoderConfig::from_gguf(&gguf).map(|config| config.weights());
            if let Ok(tokenizer) = TextTokenizer::from_gguf(&gguf) {
                let _ = tokenizer.encode_text("The quick brown fox, 1234!");
            }
        }
        read_all(path);
    });
}

/// A checkpoint of one file.
pub fn safetensors(data: &[u8]) {
    with_file("model.safetensors", data, read_all);
}

/// An engine's configuration as JSON and as TOML, and a model's.
pub fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let read = [serde_json::from_str::<EngineConfig>(text).ok(), toml::from_str(text).ok()];
    let entry = BackendEntry {
        origin: Origin { crate_name: "polyattn-fuzz", version: "0" },
        interface: INTERFACE_VERSION,
        priority: 0,
        make: || std::sync::Arc::new(polyattn_cpu::Cpu),
    };
    let registry = Registry::builder().backend(entry).build().unwrap();
    for config in read.into_iter().flatten() {
        let _ = resolve(&config, &DeviceFacts::cpu(), &registry).map_err(|error| error.to_string());
    }
    let file = Path::new("config.json");
    if let Ok(config) = DecoderConfig::from_hf_json(file, text) {
        let _ = config.rope.inv_freq();
        let _ = (config.window(0), config.layer_parameters());
    }
    let _ = RopeConfig::from_hf_json(file, text, 64).map(|rope| rope.inv_freq());
}

/// A recorded attention call: what is read is valid, is written and read again as itself, and can be computed.
pub fn replay(data: &[u8]) {
    let Ok(case) = Case::from_bytes("case.safetensors", data) else { return };
    case.validate().unwrap();
    let bytes = case.to_bytes().unwrap();
    assert_eq!(Case::from_bytes("again", &bytes).unwrap().to_bytes().unwrap(), bytes);
    let work = case.lse_elements() as u64 * u64::from(case.batch.kv_len.iter().copied().max().unwrap_or(0));
    if work * u64::from(case.problem.kind.query_dim().max(case.problem.kind.output_dim())) < 1 << 22 {
        attention_f64(&case).unwrap();
    }
}
