//! DFlash: block diffusion drafting with non-causal attention
