//! Attention as a plugin: the facade library and the polyattn program
