// One head of one row by workgroup: query heads are normed, rotated and narrowed for attention, key heads go the same way
// into the cache, and value heads there as they are, where keys are not values too.
struct Call {
    query_heads: u32,
    kv_heads: u32,
    q_offset: u32,
    k_offset: u32,
    k_stride: u32,
    v_offset: u32,
    v_stride: u32,
    positions: u32,
    // Elements that are rotated, and the first of them.
    dim: u32,
    first: u32,
    // Elements of a head that are normed.
    q_normed: u32,
    k_normed: u32,
    q_eps: f32,
    k_eps: f32,
    front_offset: u32,
    front_stride: u32,
    front_dim: u32,
    back_offset: u32,
    back_stride: u32,
    back_dim: u32,
}
var<immediate> p: Call;

@compute @workgroup_size(64)
fn store_rotated(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row = workgroup.y + workgroup.z * MOST_ROWSu;
    if (row >= batch_rows()) { return; }
    let place = workgroup.x;
    let query = place < p.query_heads;
    let key = !query && place < p.query_heads + p.kv_heads;
    if (query || key) {
        let base = row * p.k_stride
            + select(p.k_offset + (place - p.query_heads) * HEAD_DIM, p.q_offset + place * HEAD_DIM, query);
        var square = 0.0;
        for (var i = local; i < HEAD_DIM; i += 64u) {
            LOAD
            head[i] = x;
            if (i < normed_dim(query)) { square = fma(x, x, square); }
        }
        let scale = head_scale(local, query, square, select(p.k_eps, p.q_eps, query));
        turn_head(local, row, query, scale);
    } else {
        V_LOAD
    }
    workgroupBarrier();
    QUERIES
    let s = row_sequence(row);
    let to = slot(s, sequence_kv_len(s) - sequence_queries(s) + row - sequence_start(s));
    let at = cache_row(to, place - p.query_heads - select(p.kv_heads, 0u, key), p.kv_heads);
    SCALE
    if (key) {
        K_STORE
    } else {
        V_STORE
    }
}
