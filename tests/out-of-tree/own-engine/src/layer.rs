use std::{error::Error, sync::Arc};

use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionProblem, BatchLayout, Buffer, Device, KvDType, Policy, Registry, StoreKv,
    select,
};

/// One attention layer: the kernel that selection found for it, and a paged f32 cache.
#[derive(Debug)]
pub struct Layer {
    device: Device,
    backend: &'static str,
    kernel: Arc<dyn AttentionKernel>,
    k_cache: Buffer,
    v_cache: Buffer,
}

impl Layer {
    /// A layer whose cache has `pages` pages of `page_size` tokens.
    ///
    /// # Errors
    /// Nobody can serve the problem, or the device fails.
    pub fn new(
        device: &Device,
        problem: &AttentionProblem,
        pages: u32,
        page_size: u32,
    ) -> Result<Self, Box<dyn Error>> {
        let mut problem = problem.clone().page_size(page_size);
        problem.kv_dtype = KvDType::F32;
        let selection = select(&problem, device.facts(), Registry::global()?, &Policy::Auto)?;
        let kernel = selection.backend.prepare(device, &problem)?;
        let slots = u64::from(pages) * u64::from(page_size) * u64::from(problem.kind.kv_heads());
        Ok(Self {
            device: device.clone(),
            backend: selection.backend.name(),
            kernel,
            k_cache: device.alloc(slots * u64::from(problem.kind.query_dim()) * 4, "own keys")?,
            v_cache: device.alloc(slots * u64::from(problem.kind.output_dim()) * 4, "own values")?,
        })
    }

    /// Who serves it.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.backend
    }

    /// Writes the batch's new keys and values into the cache, then answers its queries. Rows are packed, row by row
    /// `q` `[query_heads, head_dim]` and `kv` `[kv_heads, head_dim]` keys followed by `[kv_heads, value_dim]` values;
    /// the answer is `[rows, query_heads, value_dim]`.
    ///
    /// # Errors
    /// A batch that contradicts itself, or a device that fails.
    pub fn attend(&self, batch: &BatchLayout, q: &[f32], kv: &[f32]) -> Result<Vec<f32>, Box<dyn Error>> {
        let kind = self.kernel.problem().kind;
        let (q, kv) = (self.device.upload(q, "own queries")?, self.device.upload(kv, "own rows")?);
        let out_bytes = u64::from(batch.rows()) * u64::from(kind.query_heads()) * u64::from(kind.output_dim()) * 4;
        let out = self.device.alloc(out_bytes, "own answer")?;

        let keys = kind.kv_heads() * kind.query_dim();
        let row = keys + kind.kv_heads() * kind.output_dim();
        let plan = self.kernel.plan(batch)?;
        let mut commands = self.device.commands()?;
        let rows = StoreKv::from_rows(&kv, row, 0, keys, &self.k_cache, &self.v_cache);
        self.kernel.store_kv(&mut commands, &plan, &rows)?;
        self.kernel.encode(&mut commands, &plan, &AttentionIo::new(&q, &self.k_cache, &self.v_cache, &out))?;
        let answer = commands.read_back(out.whole())?;
        commands.submit()?;
        Ok(answer.wait_as()?)
    }
}
