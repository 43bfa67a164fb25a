// A row's chunks become its answer, in order of position. One workgroup for each row and query head.

struct Call {
    nothing: f32, // the LSE of a row that sees nothing, -infinity: WGSL cannot write it
    heads: u32,
    first: u32,   // first row of this dispatch
    rows: u32,
    facts: u32,   // of sequences: first state, first chunk, chunk behind the last
    states: u32,
}
var<immediate> call: Call;

@group(0) @binding(1) var<storage, read> partials: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

const LOWEST: f32 = -3.0e38;
const MASKED: f32 = -2.9e38;
const LN_2: f32 = 0.6931471805599453;

var<workgroup> highest_of: array<f32, GROUPS>;
var<workgroup> total_of: array<f32, GROUPS>;
var<workgroup> sums_of: array<vec4<f32>, GROUPS * VECTORS>;

@compute @workgroup_size(GROUPS * VECTORS)
fn merge(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let number = workgroup.x + workgroup.y * workgroups.x;
    let row = call.first + min(number, call.rows - 1u);
    let head = workgroup.z;
    let sequence = row_sequence(row);
    let slots = sequence_queries(sequence) * call.heads;
    let chunks = vec2<u32>(extra(call.facts + sequence * 3u + 1u), extra(call.facts + sequence * 3u + 2u));
    // The state of the row's chunk 0, if there were one: chunks are counted from position 0.
    let origin = extra(call.facts + sequence * 3u) + (row - sequence_start(sequence)) * call.heads + head
        - chunks.x * slots;
    let group = thread / VECTORS;
    let vector = thread % VECTORS;

    // A chunk belongs to the same group whatever comes before it.
    let mine = chunks.x + (group + GROUPS - chunks.x % GROUPS) % GROUPS;
    let facts = call.states * HEAD_DIM;
    var top = LOWEST;
    for (var c = mine; c < chunks.y; c += GROUPS) { top = max(top, partials[facts + (origin + c * slots) * 2u]); }
    if (vector == 0u) { highest_of[group] = top; }
    workgroupBarrier();
    for (var g = 0u; g < GROUPS; g++) { top = max(top, highest_of[g]); }

    var sum = vec4<f32>();
    var total = 0.0;
    for (var c = mine; c < chunks.y; c += GROUPS) {
        let state = origin + c * slots;
        let highest = partials[facts + state * 2u];
        let share = select(0.0, exp(highest - top), highest > MASKED);
        let place = state * HEAD_DIM + vector * 4u;
        let part = vec4<f32>(partials[place], partials[place + 1u], partials[place + 2u], partials[place + 3u]);
        sum = fma(part, vec4<f32>(share), sum);
        total = fma(partials[facts + state * 2u + 1u], share, total);
    }
    sums_of[thread] = sum;
    if (vector == 0u) { total_of[group] = total; }
    workgroupBarrier();

    if (group == 0u && number < call.rows) {
        var merged = vec4<f32>();
        var divisor = 0.0;
        for (var g = 0u; g < GROUPS; g++) {
            merged += sums_of[g * VECTORS + vector];
            divisor += total_of[g];
        }
        var base = top;
        var factor = 1.0;
        if (SINKS) {
            // One more logit, that of no key.
            base = max(base, sink_of(head));
            factor = exp(top - base);
            divisor = fma(divisor, factor, exp(sink_of(head) - base));
        }
        let answer = select(vec4<f32>(), merged * factor / divisor, divisor > 0.0);
        let place = (row * call.heads + head) * HEAD_DIM + vector * 4u;
        for (var i = 0u; i < 4u; i++) { out[place + i] = answer[i]; }
        if (vector == 0u) {
            write_lse(row * call.heads + head, select(call.nothing, fma(log2(divisor), LN_2, base), divisor > 0.0));
        }
    }
}
