//! End-to-end tests of polyattn
