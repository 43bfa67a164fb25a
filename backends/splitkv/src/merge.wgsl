// A row's chunks become its answer, in order of position. One workgroup for each row and query head.

struct Call {
    nothing: f32, // as in call.wgsl
    heads: u32,
    first: u32,   // first row of this dispatch
    rows: u32,
    facts: u32,   // of sequences: first state, first chunk, chunk behind the last
    states: u32,
}
var<immediate> call: Call;

@group(0) @binding(1) var<storage, read> partials: array<f32>;

const LOWEST: f32 = -3.0e38;
const MASKED: f32 = -2.9e38;
const THREADS: u32 = GROUPS * VECTORS;
const AHEAD: u32 = 4u; // states that a thread has in flight

var<workgroup> highest_of: array<f32, THREADS>;
var<workgroup> total_of: array<f32, GROUPS>;
var<workgroup> sums_of: array<vec4<f32>, THREADS>;

@compute @workgroup_size(THREADS)
fn merge(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let number = (workgroup.x + workgroup.y * workgroups.x) / call.heads;
    let head = (workgroup.x + workgroup.y * workgroups.x) % call.heads;
    let row = call.first + min(number, call.rows - 1u);
    let sequence = row_sequence(row);
    let slots = sequence_queries(sequence) * call.heads;
    let chunks = vec2<u32>(extra(call.facts + sequence * 3u + 1u), extra(call.facts + sequence * 3u + 2u));
    // A sequence's only chunk is its answer already.
    let merges = number < call.rows && !(DIRECT && chunks.y - chunks.x == 1u);
    // The state of the row's chunk 0, if there were one: chunks are counted from position 0.
    let origin = extra(call.facts + sequence * 3u) + (row - sequence_start(sequence)) * call.heads + head
        - chunks.x * slots;
    let group = thread / VECTORS;
    let vector = thread % VECTORS;
    let facts = call.states * HEAD_DIM;
    let end = select(chunks.x, chunks.y, merges);

    var top = LOWEST;
    for (var c = chunks.x + thread; c < end; c += THREADS) {
        top = max(top, partials[facts + (origin + c * slots) * 2u]);
    }
    highest_of[thread] = top;
    workgroupBarrier();
    for (var half = THREADS_POWER / 2u; half > 0u; half /= 2u) {
        if (thread < half && thread + half < THREADS) {
            highest_of[thread] = max(highest_of[thread], highest_of[thread + half]);
        }
        workgroupBarrier();
    }
    top = highest_of[0];

    // A chunk belongs to the same group whatever comes before it.
    let mine = chunks.x + (group + GROUPS - chunks.x % GROUPS) % GROUPS;
    var sum = vec4<f32>();
    var total = 0.0;
    for (var c = mine; c < end; c += AHEAD * GROUPS) {
        var part: array<vec4<f32>, AHEAD>;
        var highest: array<f32, AHEAD>;
        var weights: array<f32, AHEAD>;
        for (var u = 0u; u < AHEAD; u++) {
            let state = origin + min(c + u * GROUPS, end - 1u) * slots;
            let place = state * HEAD_DIM + vector * 4u;
            part[u] = vec4<f32>(partials[place], partials[place + 1u], partials[place + 2u], partials[place + 3u]);
            highest[u] = partials[facts + state * 2u];
            weights[u] = partials[facts + state * 2u + 1u];
        }
        for (var u = 0u; u < AHEAD; u++) {
            var share = select(exp(highest[u] - top), 1.0, highest[u] == top);
            share = select(0.0, share, highest[u] > MASKED && c + u * GROUPS < end);
            sum = fma(part[u], vec4<f32>(share), sum);
            total = fma(weights[u], share, total);
        }
    }
    sums_of[thread] = sum;
    if (vector == 0u) { total_of[group] = total; }
    workgroupBarrier();

    if (group == 0u && merges) {
        var merged = vec4<f32>();
        var divisor = 0.0;
        for (var g = 0u; g < GROUPS; g++) {
            merged += sums_of[g * VECTORS + vector];
            divisor += total_of[g];
        }
        let end = ending(top, divisor, head);
        let place = row * call.heads + head;
        for (var i = 0u; i < 4u; i++) { out[place * HEAD_DIM + vector * 4u + i] = answer(merged[i], end); }
        if (vector == 0u) { write_lse(place, lse_of(end)); }
    }
}
