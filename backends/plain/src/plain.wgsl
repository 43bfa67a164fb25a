// One workgroup answers one query row of one head. It walks the keys in tiles of one key a thread: first every thread
// scores its key, then every thread sums some elements of the values, weighted by all scores of the tile.

override HEADS: u32;     // query heads
override GROUP: u32;     // query heads of a KV head
override HEAD_DIM: u32;

@group(0) @binding(4) var<storage, read_write> out: array<f32>;
struct Call { scale: f32 }
var<immediate> call: Call;

const TILE: u32 = 64u;
const LOWEST: f32 = -3.0e38; // below every logit: WGSL has no infinity

var<workgroup> places: array<u32, TILE>;  // where the head of each key begins in the cache
var<workgroup> scores: array<f32, TILE>;
var<workgroup> weights: array<f32, TILE>;

@compute @workgroup_size(TILE)
fn attend(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y + group.z * groups.y;
    if (row >= batch_rows()) { return; }
    let head = group.x;
    let sequence = row_sequence(row);
    // The row's own position is the last it sees.
    let position = sequence_kv_len(sequence) - sequence_queries(sequence) + row - sequence_start(sequence);
    let kv_heads = HEADS / GROUP;
    let query = (row * HEADS + head) * HEAD_DIM;

    var highest = LOWEST;      // the largest score so far
    var denominator = 0.0;     // the sum of e^(score - highest)
    var sums = vec4<f32>();    // of weighted values: elements thread, thread + 64, thread + 128, thread + 192
    for (var tile = 0u; tile <= position; tile += TILE) {
        // Beyond the row's position nothing is read, whatever lies there.
        let keys = min(TILE, position + 1u - tile);
        if (thread < keys) {
            let place = (slot(sequence, tile + thread) * kv_heads + head / GROUP) * HEAD_DIM;
            var products = vec4<f32>();
            for (var d = 0u; d < HEAD_DIM; d += 8u) {
                let a = q_load8(query + d);
                let b = k_load8(place + d);
                products += a[0] * b[0] + a[1] * b[1];
            }
            places[thread] = place;
            scores[thread] = call.scale * dot(products, vec4<f32>(1.0));
        }
        workgroupBarrier();

        let before = highest;
        for (var j = 0u; j < keys; j++) { highest = max(highest, scores[j]); }
        if (thread < keys) { weights[thread] = exp(scores[thread] - highest); }
        workgroupBarrier();

        let shrink = exp(before - highest);
        denominator *= shrink;
        sums *= shrink;
        for (var j = 0u; j < keys; j++) {
            denominator += weights[j];
            for (var i = 0u; i * TILE + thread < HEAD_DIM; i++) {
                sums[i] += weights[j] * v_at(places[j] + i * TILE + thread);
            }
        }
        // The next tile's scores may be written now, but its places only once all have read these.
        workgroupBarrier();
    }

    for (var i = 0u; i * TILE + thread < HEAD_DIM; i++) {
        out[query + i * TILE + thread] = sums[i] / denominator;
    }
    if (thread == 0u) { write_lse(row * HEADS + head, highest + log(denominator)); }
}
