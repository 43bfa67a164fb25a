//! Portable flash attention in WGSL over a paged cache
