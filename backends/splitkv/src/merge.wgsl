// A row's chunks become spans, where they are not yet, and these its answer, in order of position. One workgroup for each
// row and query head.

struct Call {
    nothing: f32, // as in call.wgsl
    heads: u32,
    first: u32,   // first row of this dispatch
    rows: u32,
    facts: u32,   // of sequences: first state, first chunk, chunk behind the last
    states: u32,
    per: u32,     // chunks of a state: one or a span's
}
var<immediate> call: Call;

@group(0) @binding(1) var<storage, read> partials: array<f32>;

const LOWEST: f32 = -3.0e38;
const MASKED: f32 = -2.9e38;
const THREADS: u32 = GROUPS * VECTORS;

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
    // States are counted from position 0, where the sequence's first may not lie.
    let states = vec2<u32>(chunks.x / call.per, (chunks.y + call.per - 1u) / call.per);
    let origin = extra(call.facts + sequence * 3u) + (row - sequence_start(sequence)) * call.heads + head
        - states.x * slots;
    let group = thread / VECTORS;
    let vector = thread % VECTORS;
    let facts = call.states * HEAD_DIM;
    let end = select(states.x, states.y, merges);

    var top = LOWEST;
    for (var s = states.x + thread; s < end; s += THREADS) {
        top = max(top, partials[facts + (origin + s * slots) * 2u]);
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

    // A span belongs to the same group whatever comes before it. Each takes SPAN states at once: those of a span's
    // chunks, or those of so many of its spans.
    let chunkwise = call.per == 1u;
    let stride = select(GROUPS, 1u, chunkwise);
    let first = select(states.x, states.x / SPAN, chunkwise);
    let mine = first + (group + GROUPS - first % GROUPS) % GROUPS;
    var sum = vec4<f32>();
    var total = 0.0;
    for (var s = select(mine, mine * SPAN, chunkwise); s < end; s += SPAN * GROUPS) {
        var part: array<vec4<f32>, SPAN>;
        var highest: array<f32, SPAN>;
        var weights: array<f32, SPAN>;
        for (var u = 0u; u < SPAN; u++) {
            let at = s + u * stride;
            let state = origin + clamp(at, states.x, end - 1u) * slots;
            let place = state * HEAD_DIM + vector * 4u;
            let is_there = at >= states.x && at < end;
            part[u] = vec4<f32>(partials[place], partials[place + 1u], partials[place + 2u], partials[place + 3u]);
            part[u] = select(vec4<f32>(), part[u], is_there);
            highest[u] = select(LOWEST, partials[facts + state * 2u], is_there);
            weights[u] = select(0.0, partials[facts + state * 2u + 1u], is_there);
        }
        if (chunkwise) {
            // As cooperative.wgsl joins the chunks of a span.
            for (var u = 1u; u < SPAN; u++) {
                let joint = join(highest[0], highest[u]);
                highest[0] = joint.highest;
                weights[0] = fma(weights[u], joint.later, weights[0] * joint.before);
                part[0] = fma(part[u], vec4<f32>(joint.later), part[0] * joint.before);
                highest[u] = LOWEST;
            }
        }
        for (var u = 0u; u < SPAN; u++) {
            let weight = weight_of(highest[u], top);
            sum = fma(part[u], vec4<f32>(weight), sum);
            total = fma(weights[u], weight, total);
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
