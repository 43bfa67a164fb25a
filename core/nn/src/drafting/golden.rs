//! Drafters against tensors of an independent implementation, `tests/golden/make_drafters.py` (feature `test-support`).
#![expect(clippy::unwrap_used, reason = "a test's help may fail the test")]

use std::{path::Path, sync::Arc};

use ::safetensors::SafeTensors;
use polyattn_api::{
    CommittedRows, DraftAttention, DraftSequence, Drafter, EngineConfig, LoadContext, Outcome, Proposal,
    ProposeContext, Proposer, ProposerError, Registry, TargetFacts, TargetServices, resolve,
};
use polyattn_device::{Buffer, BufferSlice, Commands, DType, Device, DeviceChoice};

use crate::ops::{self, LinearCall, Matrix};

/// Pages of 4 tokens in no order, so that a page table that is ignored is noticed.
pub const PAGES: [i32; 8] = [5, 2, 7, 0, 6, 1, 4, 3];

/// What a test says of a case.
#[derive(Debug)]
pub struct GoldenCase<'a, D> {
    /// The method.
    pub proposer: &'a dyn Proposer,
    /// The case's folder.
    pub folder: &'a Path,
    /// Layers of the target.
    pub layers: u32,
    /// How far elements may lie apart, relative to 1 + their magnitude.
    pub tolerance: f32,
    /// Loads the drafter.
    pub load: fn(&LoadContext<'_>) -> Result<D, ProposerError>,
    /// The hidden states that the last pass left, and logits of a head of the drafter's own.
    pub stages: fn(&D) -> (Option<Buffer>, Option<Buffer>),
}

/// A target that is nothing but its embedding, which is its head too.
#[derive(Debug)]
pub struct Embedding {
    table: Matrix,
    /// Logits of the rows asked for last, `[rows, vocab]` f32.
    pub logits: Buffer,
}

impl Embedding {
    /// The golden tensor `embed`, `[vocab, hidden]`, and room for the logits of `rows` rows.
    #[must_use]
    pub fn of(golden: &Golden, device: &Device, rows: u32) -> Self {
        let [vocab, hidden] = *golden.shape("embed") else { panic!("embed is no matrix") };
        Self {
            table: Matrix {
                buffer: device.upload(&golden.of::<f32>("embed"), "embedding").unwrap(),
                rows: vocab as u32,
                cols: hidden as u32,
                dtype: DType::F32,
            },
            logits: device.alloc(vocab as u64 * u64::from(rows) * 4, "logits").unwrap(),
        }
    }
}

impl TargetServices for Embedding {
    fn embed(
        &self,
        commands: &mut Commands,
        ids: BufferSlice<'_>,
        rows: u32,
        out: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        Ok(ops::embed(commands, &self.table, ids, rows, out)?)
    }

    fn head_argmax(
        &self,
        commands: &mut Commands,
        hidden: BufferSlice<'_>,
        rows: u32,
        first: u32,
        ids: BufferSlice<'_>,
    ) -> Result<(), ProposerError> {
        let out = self.logits.whole();
        let call = LinearCall { x: hidden, rows, weight: &self.table, norm: None, bias: None, out, accumulate: false };
        ops::linear(commands, &call)?;
        Ok(ops::argmax(commands, out, first..rows, self.table.rows, ids)?)
    }
}

/// The tensors of a case.
#[derive(Debug)]
pub struct Golden(Vec<u8>);

impl Golden {
    /// `golden.safetensors` of a folder.
    #[must_use]
    pub fn open(folder: &Path) -> Self {
        Self(std::fs::read(folder.join("golden.safetensors")).unwrap())
    }

    /// A tensor's elements.
    #[must_use]
    pub fn of<T: bytemuck::Pod>(&self, name: &str) -> Vec<T> {
        bytemuck::pod_collect_to_vec(SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data())
    }

    /// A tensor's shape.
    #[must_use]
    pub fn shape(&self, name: &str) -> Vec<usize> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().shape().to_vec()
    }

    fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).is_ok()
    }
}

/// Asserts that elements agree within `tolerance`, relative to 1 + their magnitude.
pub fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert!(got.len() >= want.len(), "{what}: {} elements instead of {}", got.len(), want.len());
    for (place, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{what}[{place}] is {got}, not {want}");
    }
}

/// The CPU, and a GPU where there is one; says so where there is none.
#[must_use]
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    devices
}

impl<D: Drafter> GoldenCase<'_, D> {
    /// Checks every pass of both steps on the CPU, and on a GPU where there is one.
    pub fn check(&self) {
        devices().iter().for_each(|device| self.check_on(device));
    }

    fn check_on(&self, device: &Device) {
        let what = format!("{} on {}", self.folder.display(), device.facts().name);
        let golden = Golden::open(self.folder);
        let [vocab, hidden] = *golden.shape("embed") else { panic!("{what}: embed is no matrix") };
        let target = TargetFacts::new(self.layers, hidden as u32, vocab as u32, 512);

        // The configuration that an engine would make, resolved for this device.
        let draft = self.proposer.describe(self.folder, &target).unwrap();
        let layer = serde_json::json!({"name": "full", "kind": "gqa", "query_heads": 1, "kv_heads": 1, "head_dim": 16});
        let config: EngineConfig = serde_json::from_value(serde_json::json!({
            "target": { "dtype": "f16", "layers": [layer] },
            "kv_cache": { "page_size": 4 },
            "speculative": { "method": self.proposer.name(), "draft": draft },
        }))
        .unwrap();
        let resolution = resolve(&config, device.facts(), Registry::global().unwrap()).unwrap();
        let attention: Vec<DraftAttention> = resolution
            .draft
            .iter()
            .map(|layer| {
                let kernel = layer.backend.prepare(device, &layer.problem).unwrap();
                DraftAttention::new(Arc::clone(&layer.problem.layer), kernel)
            })
            .collect();
        let draft_config = resolution.draft_config.as_ref().unwrap();
        let mut context = LoadContext::new(device, &target, draft_config);
        context.checkpoint = Some(self.folder);
        context.attention = &attention;
        context.pool_pages = PAGES.len() as u32;
        context.page_size = 4;
        context.kv_dtype = draft_config.model.dtype.into();
        context.max_rows = 16;
        let mut drafter = (self.load)(&context).unwrap();

        let lender = Embedding::of(&golden, device, 1);
        let (features, tokens) = (golden.of::<f32>("features"), golden.of::<u32>("tokens"));
        let [positions, width] = *golden.shape("features") else { panic!("{what}: features are no matrix") };
        // The second step's rows lie apart, as those of a tree do.
        for (step, positions, rows) in [("step1", 0..9, (0..9).collect()), ("step2", 9..positions, vec![1, 3, 4])] {
            let mut taps = vec![f32::NAN; (rows.len() + 2) * width];
            for (row, position) in rows.iter().zip(positions.clone()) {
                taps[*row as usize * width..][..width].copy_from_slice(&features[position * width..][..width]);
            }
            let taps = device.upload(&taps, "taps").unwrap();
            let tokens = &tokens[..=positions.end];
            let mut commands = device.commands().unwrap();
            let committed = [CommittedRows::new(0, &rows, positions.start as u32, tokens, &PAGES)];
            drafter.commit(&mut Outcome::new(&mut commands, &committed, Some(&taps), &lender)).unwrap();
            let _ = commands.submit().unwrap();

            let drafts = golden.of::<u32>(&format!("{step}.drafts"));
            // A draft of n tokens leaves behind what its n-th pass computed.
            for count in 1..=drafts.len() {
                let what = format!("{what}: {step}, token {count}");
                let mut commands = device.commands().unwrap();
                let sequences = [DraftSequence::new(0, tokens, count as u32, &PAGES)];
                let mut asked = ProposeContext::new(&mut commands, &sequences, &lender);
                let proposal = drafter.propose(&mut asked).unwrap();
                let _ = commands.submit().unwrap();
                let (hidden, logits) = (self.stages)(&drafter);
                let stages = [("hidden", hidden), ("logits", Some(logits.unwrap_or_else(|| lender.logits.clone())))];
                for (name, buffer) in stages {
                    let tensor = format!("{step}.{name}");
                    if let (Some(buffer), true) = (buffer, golden.has(&tensor)) {
                        let (all, columns) = (golden.of::<f32>(&tensor), golden.shape(&tensor)[1]);
                        let want = &all[(count - 1) * columns..count * columns];
                        let got: Vec<f32> = device.download(&buffer).unwrap();
                        assert_close(&got, want, self.tolerance, &format!("{what}, {name}"));
                    }
                }
                let Proposal::Device { ids, counts, .. } = proposal else { panic!("{what}: not on the device") };
                assert_eq!(counts, [count as u32], "{what}");
                let ids: Vec<u32> = device.download(&ids).unwrap();
                assert_eq!(ids[0], tokens[positions.end], "{what}: the anchor stays in front");
                assert_eq!(ids[1..=count], drafts[..count], "{what}");
            }
        }
    }
}
