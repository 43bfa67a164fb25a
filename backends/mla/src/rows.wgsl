// What both kernels have in common: the call, and what a row sees. lib.rs tells the structure.
//
// A row's bits must not depend on the rows beside it, so sums are spelled as fma: nothing is left for a compiler to
// contract in one specialisation and not in another.

struct Call {
    scale: f32,
    softcap: f32,
    left: u32,   // the window, the largest u32 where it is unbounded
    right: u32,
    heads: u32,
    items: u32,  // work items of this dispatch
    first: u32,  // the first one's place among the plan's words
    facts: u32,  // of query rows: first state, first chunk, chunk behind the last
    end: u32,    // the query row behind the last one of this dispatch
    states: u32, // states that the buffer has room for
}
var<immediate> call: Call;

// For each state LATENT sums; behind all of them highest logit and sum of weights.
@group(0) @binding(3) var<storage, read_write> partials: array<vec2<f32>>;

const LOWEST: f32 = -3.0e38; // in place of -infinity
const MASKED: f32 = -2.9e38; // what is not above it weighs nothing
const NO_STATE: u32 = 0xffffffffu;

// A row is a query row of a sequence and a head. What it sees: keys first .. end.
struct Row {
    first: u32,
    end: u32,
    query: u32,
    position: u32,
    slope: f32,
    state: u32,
}

// Rows of a sequence that this dispatch answers.
fn rows_of(sequence: u32) -> u32 {
    let start = sequence_start(sequence);
    return (min(start + sequence_queries(sequence), call.end) - start) * call.heads;
}

fn row_of(sequence: u32, row: u32, chunk: u32) -> Row {
    let query = row / call.heads;
    let head = row % call.heads;
    let seen = keys_of(sequence, query);
    let facts = call.facts + (sequence_start(sequence) + query) * 3u;
    let chunks = vec2<u32>(extra(facts + 1u), extra(facts + 2u));
    let own = extra(facts) + (chunk - chunks.x) * call.heads + head;
    let state = select(NO_STATE, own, chunk >= chunks.x && chunk < chunks.y);
    let position = sequence_kv_len(sequence) - sequence_queries(sequence) + query;
    return Row(seen.x, seen.y, query, position, slope_of(head), state);
}

fn sees(row: Row, sequence: u32, key: u32) -> bool {
    var seen = key >= row.first && key < row.end;
    if (TREE && seen) {
        let context = row.position - row.query;
        if (key >= context) { seen = tree_bit(sequence_start(sequence) + row.query, key - context); }
    }
    return seen;
}

