//! Recorded attention problems of polyattn.
