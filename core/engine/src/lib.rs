//! The reference engine of polyattn: paged KV cache, model runner, verification and generation
