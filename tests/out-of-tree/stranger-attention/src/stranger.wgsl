// One workgroup answers one query row of one head, with an online softmax over tiles of keys. SHARE threads score one
// key together; then each thread sums the latent elements thread, thread + 64, …, which are the values too.

@group(0) @binding(3) var<storage, read_write> out: array<f32>;
struct Call { scale: f32, softcap: f32 }
var<immediate> call: Call;

const THREADS = 64u;
const SHARE = THREADS / TILE;
const EACH = (LATENT + THREADS - 1u) / THREADS;
const LOWEST = -3.0e38;

var<workgroup> query: array<f32, DIM>;
var<workgroup> parts: array<f32, THREADS>;
var<workgroup> places: array<u32, TILE>;
var<workgroup> logits: array<f32, TILE>;

@compute @workgroup_size(64)
fn attend(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = group.y + group.z * groups.y;
    if (row >= batch_rows()) { return; }
    let answer = row * HEADS + group.x;
    for (var d = thread; d < DIM; d += THREADS) { query[d] = q_at(answer * DIM + d); }
    workgroupBarrier();

    let sequence = row_sequence(row);
    let length = sequence_kv_len(sequence);
    let position = length - sequence_queries(sequence) + row - sequence_start(sequence);
    let first = position - min(position, LEFT);
    let reach = min(length - 1u - position, RIGHT);
    let end = position + select(reach, 0u, CAUSAL) + 1u;

    var highest = LOWEST;
    var denominator = 0.0;
    var sums: array<f32, EACH>;
    for (var tile = first; tile < end; tile += TILE) {
        let keys = min(TILE, end - tile);
        let key = thread / SHARE;
        var part = 0.0;
        if (key < keys) {
            let place = slot(sequence, tile + key) * DIM;
            for (var d = thread % SHARE * 8u; d < DIM; d += SHARE * 8u) {
                let k = kv_load8(place + d);
                part += dot(vec4(query[d], query[d + 1u], query[d + 2u], query[d + 3u]), k[0]);
                part += dot(vec4(query[d + 4u], query[d + 5u], query[d + 6u], query[d + 7u]), k[1]);
            }
            if (thread % SHARE == 0u) { places[key] = place; }
        }
        parts[thread] = part;
        workgroupBarrier();
        if (thread < keys) {
            var x = 0.0;
            for (var i = 0u; i < SHARE; i++) { x += parts[thread * SHARE + i]; }
            x *= call.scale;
            // Some drivers make NaN of the tanh of large numbers.
            if (SOFTCAP) { x = call.softcap * tanh(clamp(x / call.softcap, -15.0, 15.0)); }
            logits[thread] = x;
        }
        workgroupBarrier();

        let before = highest;
        for (var j = 0u; j < keys; j++) { highest = max(highest, logits[j]); }
        let shrink = exp(before - highest);
        denominator *= shrink;
        for (var i = 0u; i < EACH; i++) { sums[i] *= shrink; }
        for (var j = 0u; j < keys; j++) {
            let weight = exp(logits[j] - highest);
            denominator += weight;
            for (var i = 0u; i < EACH; i++) {
                let d = i * THREADS + thread;
                if (d < LATENT) { sums[i] += weight * kv_at(places[j] + d); }
            }
        }
        workgroupBarrier();
    }

    // Every row sees itself at least, so the denominator is not 0.
    for (var i = 0u; i < EACH; i++) {
        let d = i * THREADS + thread;
        if (d < LATENT) { out[answer * LATENT + d] = sums[i] / denominator; }
    }
    if (thread == 0u) { write_lse(answer, highest + log(denominator)); }
}
