// A row's chunks become its answer, in order of position. One workgroup for each query row and head.

struct Call {
    nothing: f32, // the LSE of a row that sees nothing, -infinity: WGSL cannot write it
    heads: u32,
    first: u32,   // first query row of this dispatch
    rows: u32,
    facts: u32,   // of query rows: first state, first chunk, chunk behind the last
    states: u32,
}
var<immediate> call: Call;

@group(0) @binding(1) var<storage, read> partials: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;

const LOWEST: f32 = -3.0e38;
const MASKED: f32 = -2.9e38;
const LN_2: f32 = 0.6931471805599453;

var<workgroup> highest_of: array<f32, GROUPS>;
var<workgroup> total_of: array<f32, GROUPS>;
var<workgroup> sums_of: array<vec4<f32>, GROUPS * VECTORS>;

// Highest logit and sum of weights of a state.
fn weight_of(state: u32) -> vec2<f32> {
    let pair = partials[call.states * VECTORS + state / 2u];
    return select(pair.xy, pair.zw, state % 2u == 1u);
}

@compute @workgroup_size(GROUPS * VECTORS)
fn merge(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let number = workgroup.x + workgroup.y * workgroups.x;
    let row = call.first + min(number, call.rows - 1u);
    let head = workgroup.z;
    let chunks = vec2<u32>(extra(call.facts + row * 3u + 1u), extra(call.facts + row * 3u + 2u));
    let origin = extra(call.facts + row * 3u) + head;
    let group = thread / VECTORS;
    let vector = thread % VECTORS;

    // A chunk belongs to the same group whatever comes before it: chunks are counted from position 0.
    let mine = chunks.x + (group + GROUPS - chunks.x % GROUPS) % GROUPS;
    var top = LOWEST;
    for (var c = mine; c < chunks.y; c += GROUPS) { top = max(top, weight_of(origin + (c - chunks.x) * call.heads).x); }
    if (vector == 0u) { highest_of[group] = top; }
    workgroupBarrier();
    for (var g = 0u; g < GROUPS; g++) { top = max(top, highest_of[g]); }

    var sum = vec4<f32>();
    var total = 0.0;
    for (var c = mine; c < chunks.y; c += GROUPS) {
        let state = origin + (c - chunks.x) * call.heads;
        let weight = weight_of(state);
        let share = select(0.0, exp(weight.x - top), weight.x > MASKED);
        sum = fma(partials[state * VECTORS + vector], vec4<f32>(share), sum);
        total = fma(weight.y, share, total);
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
        out[(row * call.heads + head) * VECTORS + vector] =
            select(vec4<f32>(), merged * factor / divisor, divisor > 0.0);
        if (vector == 0u) {
            write_lse(row * call.heads + head, select(call.nothing, fma(log2(divisor), LN_2, base), divisor > 0.0));
        }
    }
}
