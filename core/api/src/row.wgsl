// What a query row sees, and what becomes of its scores.

// First key that a query row of a sequence sees, and the key behind the last one, but for a tree. Both never fall from
// row to row.
fn keys_of(sequence: u32, query: u32) -> vec2<u32> {
    let length = sequence_kv_len(sequence);
    let position = length - sequence_queries(sequence) + query;
    var end = length;
    if (sequence_causal(sequence)) {
        end = position + 1u;
        if (SPANS) { end = max(end, row_reach(sequence_start(sequence) + query) + 1u); }
    }
    if (call.right < length - position) { end = min(end, position + call.right + 1u); }
    return vec2<u32>(position - min(position, call.left), end);
}

// The logit of a scaled product, for a row at a position.
fn logit(product: f32, slope: f32, key: u32, position: u32) -> f32 {
    var x = product;
    // Some drivers make NaN of the tanh of large numbers.
    if (SOFTCAP) { x = call.softcap * tanh(clamp(x / call.softcap, -15.0, 15.0)); }
    if (ALIBI) { x = fma(slope, f32(i32(key) - i32(position)), x); }
    return x;
}
