// What the two kernels that answer a chunk have in common: their call, what a row sees, and where a state goes.

struct Call {
    scale: f32,
    softcap: f32,
    nothing: f32, // the LSE of a row that sees nothing, -infinity: WGSL cannot write it
    left: u32,    // the window, the largest u32 where it is unbounded
    right: u32,
    heads: u32,   // query heads
    kv_heads: u32,
    group: u32,   // query heads of a KV head
    items: u32,   // work items of this dispatch
    first: u32,   // the first one's place among the plan's words
    facts: u32,   // of sequences: first state, first chunk, chunk behind the last
    states: u32,  // states that the buffer has room for
    per: u32,     // chunks of a state
    zero: u32,    // 0, which no compiler knows
}
var<immediate> call: Call;

// For each state HEAD_DIM sums; behind all of them highest logit and sum of weights.
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;

const LOWEST: f32 = -3.0e38; // in place of -infinity
const MASKED: f32 = -2.9e38; // what is not above it weighs nothing

// Whether a sequence's only chunk is this one, so that its state is the answer.
fn is_only_chunk(sequence: u32) -> bool {
    return DIRECT && extra(call.facts + sequence * 3u + 2u) - extra(call.facts + sequence * 3u + 1u) == 1u;
}

// The first of the states of a sequence that a chunk is in: one for each query row and head follows.
fn first_state(sequence: u32, chunk: u32) -> u32 {
    let ordinal = chunk / call.per - extra(call.facts + sequence * 3u + 1u) / call.per;
    return extra(call.facts + sequence * 3u) + ordinal * sequence_queries(sequence) * call.heads;
}
