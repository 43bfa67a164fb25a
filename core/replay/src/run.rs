use std::{borrow::Cow, collections::BTreeMap, path::Path, time::Instant};

use polyattn_api::{AttentionBackend, AttentionIo, Buffer, Device, DeviceError, KvLayout};
use safetensors::Dtype;

use crate::{Case, ReplayError, file};

/// What a backend answered.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Outcome {
    /// `[tokens, query_heads, output_dim]`.
    pub out: Vec<f32>,
    /// `[tokens, query_heads]`, from backends that give it.
    pub lse: Option<Vec<f32>>,
    /// Milliseconds from the start of recording until the device was done, after a warm-up run.
    pub milliseconds: f64,
}

impl Outcome {
    /// An answer that came by other ways than [`Case::run`].
    #[must_use]
    pub fn new(out: Vec<f32>, lse: Option<Vec<f32>>, milliseconds: f64) -> Self {
        Self { out, lse, milliseconds }
    }

    /// Writes `out` and `lse` (F32) as a safetensors file, under a temporary name first.
    ///
    /// # Errors
    /// An answer of another size than `case` has; a file that cannot be written.
    pub fn save(&self, case: &Case, path: impl AsRef<Path>) -> Result<(), ReplayError> {
        let rows = case.batch.rows() as usize;
        let heads = case.problem.kind.query_heads() as usize;
        let dim = case.problem.kind.output_dim() as usize;
        let mut tensors =
            BTreeMap::from([("out", (Dtype::F32, vec![rows, heads, dim], bytemuck::cast_slice::<f32, u8>(&self.out)))]);
        if let Some(lse) = &self.lse {
            tensors.insert("lse", (Dtype::F32, vec![rows, heads], bytemuck::cast_slice(lse)));
        }
        let bytes = file::serialize(tensors, None).map_err(ReplayError::Case)?;
        file::write(path.as_ref(), &bytes)
    }
}

impl Case {
    /// Cached data as the problem's layout has it: cases keep theirs page by page, token by token, head by head.
    fn laid_out<'a>(&self, stored: &'a [u8]) -> Cow<'a, [u8]> {
        let (size, heads) = (self.batch.page_size as usize, self.problem.kind.kv_heads() as usize);
        let rows = self.batch.pool_pages as usize * size * heads;
        if self.problem.kv_layout != KvLayout::PageHeadToken || rows == 0 {
            return Cow::Borrowed(stored);
        }
        let bytes = stored.len() / rows;
        let mut laid_out = vec![0; stored.len()];
        for (at, row) in stored.chunks_exact(bytes.max(1)).enumerate() {
            let to = self.problem.kv_layout.row(at / heads, at % heads, heads, size);
            laid_out[to * bytes..][..bytes].copy_from_slice(row);
        }
        Cow::Owned(laid_out)
    }

    /// Runs it on `backend`, with LSE where the backend gives it. Outputs hold NaN beforehand, so what a kernel leaves
    /// unwritten cannot pass for an answer.
    ///
    /// # Errors
    /// [`ReplayError::Declined`] with every reason; a case that contradicts itself; a backend or device that fails.
    pub fn run(&self, device: &Device, backend: &dyn AttentionBackend) -> Result<Outcome, ReplayError> {
        self.validate()?;
        let mut problem = self.problem.clone();
        problem.lse = backend.capabilities().lse;
        let reasons = backend.declines(&problem, device.facts());
        if !reasons.is_empty() {
            return Err(ReplayError::Declined(reasons));
        }

        let q = upload(device, &self.q, "q")?;
        let k_cache = upload(device, &self.laid_out(&self.k_cache), "k_cache")?;
        let v_cache = match self.v_cache.as_slice() {
            [] => None,
            values => Some(upload(device, &self.laid_out(values), "v_cache")?),
        };
        let scales = |values: Option<&Vec<f32>>, label| match values {
            Some(values) => upload(device, &self.laid_out(bytemuck::cast_slice(values)), label).map(Some),
            None => Ok(None),
        };
        let optional = |values: Option<&Vec<f32>>, label| match values {
            Some(values) => upload(device, bytemuck::cast_slice(values), label).map(Some),
            None => Ok(None),
        };
        let k_scale = scales(self.k_scale.as_ref(), "k_scale")?;
        let v_scale = scales(self.v_scale.as_ref().or(self.k_scale.as_ref()), "v_scale")?;
        let sinks = optional(self.sinks.as_ref(), "sinks")?;
        let alibi_slopes = optional(self.alibi_slopes.as_ref(), "alibi_slopes")?;
        let poison = vec![f32::NAN; self.out_elements().max(4)];
        let out = device.upload(&poison, "out")?;
        let lse = device.upload(&poison[..self.lse_elements().max(4).min(poison.len())], "lse")?;

        let kernel = backend.prepare(device, &problem)?;
        let plan = kernel.plan(&self.batch)?;
        let mut io = AttentionIo::new(&q, &k_cache, v_cache.as_ref().unwrap_or(&k_cache), &out);
        io.lse = problem.lse.then(|| lse.whole());
        io.sinks = sinks.as_ref().map(Buffer::whole);
        io.alibi_slopes = alibi_slopes.as_ref().map(Buffer::whole);
        io.k_scale = k_scale.as_ref().map(Buffer::whole);
        io.v_scale = v_scale.as_ref().map(Buffer::whole);

        let mut milliseconds = 0.0;
        for _warm_up_then_measured in 0..2 {
            device.write(&out, 0, &poison)?;
            device.write(&lse, 0, &poison[..lse.bytes() as usize / 4])?;
            // Writes travel with the next submission; an empty one keeps them out of the time.
            device.commands()?.submit()?;
            device.wait()?;
            let start = Instant::now();
            let mut commands = device.commands()?;
            kernel.encode(&mut commands, &plan, &io)?;
            commands.submit()?;
            device.wait()?;
            milliseconds = start.elapsed().as_secs_f64() * 1e3;
        }

        let mut result = device.download::<f32>(&out)?;
        result.truncate(self.out_elements());
        let lse = match problem.lse {
            true => {
                let mut values = device.download::<f32>(&lse)?;
                values.truncate(self.lse_elements());
                Some(values)
            }
            false => None,
        };
        Ok(Outcome { out: result, lse, milliseconds })
    }
}

/// Uploads at least 16 bytes, so that an empty tensor can still be bound.
fn upload(device: &Device, bytes: &[u8], label: &str) -> Result<Buffer, DeviceError> {
    let buffer = device.alloc((bytes.len() as u64).max(16), label)?;
    device.write(&buffer, 0, bytes)?;
    Ok(buffer)
}
