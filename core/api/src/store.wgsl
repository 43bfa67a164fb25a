// One invocation writes one word of one row: x counts the words of K, and of V; y and z count rows. A row has as many parts
// as it has places in the cache, one for each head or one for all of them.
struct Call {
    parts: u32,
    k_words: u32, // of a part
    v_words: u32,
    k_offset: u32,
    k_stride: u32,
    v_offset: u32,
    v_stride: u32,
}
var<immediate> call: Call;
@group(0) @binding(1) var<storage, read> k_rows: array<f32>;
@group(0) @binding(2) var<storage, read_write> k_cache: array<u32>;

@compute @workgroup_size(64)
fn store(@builtin(global_invocation_id) id: vec3<u32>) {
    let r = id.y + id.z * MOST_ROWSu;
    if (r >= batch_rows()) { return; }
    let s = row_sequence(r);
    let to = slot(s, sequence_kv_len(s) - sequence_queries(s) + r - sequence_start(s));
    STORE
}
