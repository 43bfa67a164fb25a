//! Attention on the CPU: serves every problem, and is the reference
