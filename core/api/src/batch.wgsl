// The batch of a step, as `Plan` packs it.
@group(0) @binding(0) var<storage, read> batch: array<u32>;

fn batch_sequences() -> u32 { return batch[0]; }
fn batch_rows() -> u32 { return batch[1]; }
fn batch_page_size() -> u32 { return batch[3]; }
fn sequence_start(s: u32) -> u32 { return batch[12u + s * 4u]; }
fn sequence_queries(s: u32) -> u32 { return batch[13u + s * 4u]; }
fn sequence_kv_len(s: u32) -> u32 { return batch[14u + s * 4u]; }
fn sequence_causal(s: u32) -> bool { return batch[15u + s * 4u] == 1u; }
fn row_sequence(r: u32) -> u32 { return batch[batch[4] + r]; }
fn page(s: u32, logical: u32) -> u32 { return batch[batch[5] + s * batch[2] + logical]; }
// Place in the pool, in tokens, of a position of a sequence.
fn slot(s: u32, position: u32) -> u32 { return page(s, position / batch[3]) * batch[3] + position % batch[3]; }
fn tree_bit(r: u32, j: u32) -> bool { return ((batch[batch[6] + r * batch[7] + (j >> 5u)] >> (j & 31u)) & 1u) == 1u; }
fn extra(i: u32) -> u32 { return batch[batch[8] + i]; }
// Last position that the prefix spans let row r see, 0 where none does; there where the problem has spans.
fn row_reach(r: u32) -> u32 { return batch[batch[9] + r]; }
