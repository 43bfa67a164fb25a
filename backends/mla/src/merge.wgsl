// A row's chunks become its answer, in order of position. A workgroup for each query row, head and block of columns.

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

const THREADS: u32 = GROUPS * BLOCK;
const BLOCKS: u32 = VECTORS / BLOCK;
// States of a group that are read at once.
const AHEAD: u32 = 4u;

var<workgroup> highest_of: array<f32, THREADS>;
var<workgroup> total_of: array<f32, GROUPS>;
var<workgroup> sums_of: array<vec4<f32>, THREADS>;

// Highest logit and sum of weights of a state.
fn weight_of(state: u32) -> vec2<f32> {
    let pair = partials[call.states * VECTORS + state / 2u];
    return select(pair.xy, pair.zw, state % 2u == 1u);
}

@compute @workgroup_size(THREADS)
fn merge(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let number = workgroup.x + workgroup.y * workgroups.x;
    let row = call.first + min(number, call.rows * BLOCKS - 1u) / BLOCKS;
    let head = workgroup.z;
    let chunks = vec2<u32>(extra(call.facts + row * 3u + 1u), extra(call.facts + row * 3u + 2u));
    let origin = extra(call.facts + row * 3u) + head;
    let group = thread / BLOCK;
    let vector = number % BLOCKS * BLOCK + thread % BLOCK;

    var top = LOWEST;
    for (var c = thread; c < chunks.y - chunks.x; c += THREADS) {
        top = max(top, weight_of(origin + c * call.heads).x);
    }
    highest_of[thread] = top;
    workgroupBarrier();
    for (var t = 0u; t < min(THREADS, chunks.y - chunks.x); t++) { top = max(top, highest_of[t]); }

    // A chunk belongs to the same group whatever comes before it: chunks are counted from position 0.
    let mine = chunks.x + (group + GROUPS - chunks.x % GROUPS) % GROUPS;
    var sum = vec4<f32>();
    var total = 0.0;
    for (var c = mine; c < chunks.y; c += GROUPS * AHEAD) {
        var part: array<vec4<f32>, AHEAD>;
        var weight: array<vec2<f32>, AHEAD>;
        for (var i = 0u; i < AHEAD; i++) {
            let state = origin + (min(c + i * GROUPS, chunks.y - 1u) - chunks.x) * call.heads;
            part[i] = partials[state * VECTORS + vector];
            weight[i] = weight_of(state);
        }
        for (var i = 0u; i < AHEAD; i++) {
            let there = c + i * GROUPS < chunks.y && weight[i].x > MASKED;
            let share = select(0.0, exp(weight[i].x - top), there);
            sum = fma(part[i], vec4<f32>(share), sum);
            total = fma(weight[i].y, share, total);
        }
    }
    sums_of[thread] = sum;
    if (thread % BLOCK == 0u) { total_of[group] = total; }
    workgroupBarrier();

    if (group == 0u && number < call.rows * BLOCKS) {
        var merged = vec4<f32>();
        var divisor = 0.0;
        for (var g = 0u; g < GROUPS; g++) {
            merged += sums_of[g * BLOCK + thread];
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
