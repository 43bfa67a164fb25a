//! What every polyattn plugin depends on: attention problems, capabilities, registry and selection
