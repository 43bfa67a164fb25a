// One head of one row by workgroup: query heads are normed, rotated and narrowed for attention, key heads go the same way
// into the cache, value heads there as they are.
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
    q_eps: f32,
    k_eps: f32,
}
var<immediate> p: Call;
@group(0) @binding(1) var<storage, read> table: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read> k_rows: array<f32>;
@group(0) @binding(4) var<storage, read> v_rows: array<f32>;
@group(0) @binding(5) var<storage, read_write> k_cache: array<u32>;
@group(0) @binding(6) var<storage, read_write> v_cache: array<u32>;

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
            let x = k_rows[base + i];
            head[i] = x;
            square = fma(x, x, square);
        }
        let scale = head_scale(local, square, select(p.k_eps, p.q_eps, query));
        turn_head(local, row, query, scale);
    } else {
        let base = row * p.v_stride + p.v_offset + (place - p.query_heads - p.kv_heads) * VALUE_DIM;
        for (var i = local; i < VALUE_DIM; i += 64u) {
            head[i] = v_rows[base + i];
        }
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
