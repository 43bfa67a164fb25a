//! The smallest attention backend on the GPU, and the one to copy
