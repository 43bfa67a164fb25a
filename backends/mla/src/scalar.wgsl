// Attention of one chunk, in plain arithmetic. Vectors of four hold rows; QUADS of them are an item's.

// Scores of the chunk, [quad][key], then weights, then sums on their way to be merged.
var<workgroup> scores: array<vec4<f32>, QUADS * CHUNK>;
// The queries' elements that are at work, [element][quad].
var<workgroup> slice: array<vec4<f32>, QUADS * SLICE>;
var<workgroup> tops: array<vec4<f32>, QUADS * LANES>;
var<workgroup> totals: array<vec4<f32>, QUADS * LANES>;
// Where the chunk's keys lie, in tokens of the pool.
var<workgroup> places: array<u32, CHUNK>;
var<workgroup> rows: array<Row, QUADS * 4u>;

// Quads whose sums one thread keeps.
const PART: u32 = min(QUADS, 2u);
// Eight columns of PART quads are a thread's; more threads take other keys, then more turns are taken.
const UNITS: u32 = EIGHTS * (QUADS / PART);
const TEAM: u32 = THREADS / GROUPS;

// Eight columns of a row's sums.
fn keep(state: u32, column: u32, a: vec4<f32>, b: vec4<f32>) {
    if (state != NO_STATE) {
        let at = (state * LATENT + column) / 2u;
        partials[at] = a.xy;
        partials[at + 1u] = a.zw;
        partials[at + 2u] = b.xy;
        partials[at + 3u] = b.zw;
    }
}

@compute @workgroup_size(THREADS)
fn attend(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    // A workgroup beyond the last item repeats the last one without writing: an early return would leave barriers in
    // what a compiler takes for divergent flow.
    let number = workgroup.x + workgroup.y * workgroups.x;
    let item = call.first + min(number, call.items - 1u) * 3u;
    let sequence = extra(item);
    let first = extra(item + 1u);
    let chunk = extra(item + 2u);
    let begin = chunk * CHUNK;
    let count = min(QUADS * 4u, rows_of(sequence) - first);
    let lo = max(begin, keys_of(sequence, first / call.heads).x);
    let hi = min(begin + CHUNK, keys_of(sequence, (first + count - 1u) / call.heads).y);

    if (thread < QUADS * 4u) {
        // The last rows may be nobody's; they see nothing.
        var row = Row(0u, 0u, 0u, 0u, 0.0, NO_STATE);
        if (thread < count) { row = row_of(sequence, first + thread, chunk); }
        if (number >= call.items) { row.state = NO_STATE; }
        rows[thread] = row;
    }

    var x: array<vec4<f32>, KEYS * QUADS>;
    var place: array<u32, KEYS>;
    var busy = false;
    for (var u = 0u; u < KEYS; u++) {
        let key = begin + u * THREADS + thread;
        // Keys that no row sees give way to one that some row sees: what lies there may be anything, even under a
        // weight of zero.
        place[u] = slot(sequence, clamp(key, lo, hi - 1u));
        places[u * THREADS + thread] = place[u];
        busy = busy || (key >= lo && key < hi);
    }
    for (var s = 0u; s < DIM; s += SLICE) {
        let width = min(SLICE, DIM - s);
        workgroupBarrier();
        for (var i = thread; i < QUADS * SLICE; i += THREADS) {
            let element = i % SLICE;
            let quad = i / SLICE;
            var elements = vec4<f32>();
            for (var r = 0u; r < 4u; r++) {
                let row = quad * 4u + r;
                if (row < count && element < width) {
                    let place = (sequence_start(sequence) * call.heads + first + row) * DIM + s + element;
                    elements[r] = call.scale * q_at(place);
                }
            }
            slice[element * QUADS + quad] = elements;
        }
        workgroupBarrier();
        if (busy) {
            for (var d = 0u; d < width; d += 8u) {
                for (var u = 0u; u < KEYS; u++) {
                    let elements = cache_load8(place[u] * DIM + s + d);
                    let a = elements[0];
                    let b = elements[1];
                    for (var quad = 0u; quad < QUADS; quad++) {
                        let q = d * QUADS + quad;
                        var sum = x[u * QUADS + quad];
                        sum = fma(vec4<f32>(a.x), slice[q], sum);
                        sum = fma(vec4<f32>(a.y), slice[q + QUADS], sum);
                        sum = fma(vec4<f32>(a.z), slice[q + 2u * QUADS], sum);
                        sum = fma(vec4<f32>(a.w), slice[q + 3u * QUADS], sum);
                        sum = fma(vec4<f32>(b.x), slice[q + 4u * QUADS], sum);
                        sum = fma(vec4<f32>(b.y), slice[q + 5u * QUADS], sum);
                        sum = fma(vec4<f32>(b.z), slice[q + 6u * QUADS], sum);
                        x[u * QUADS + quad] = fma(vec4<f32>(b.w), slice[q + 7u * QUADS], sum);
                    }
                }
            }
        }
    }
    for (var u = 0u; u < KEYS; u++) {
        for (var quad = 0u; quad < QUADS; quad++) { scores[quad * CHUNK + u * THREADS + thread] = x[u * QUADS + quad]; }
    }
    workgroupBarrier();

    // Products become scores, scores weights. LANES threads serve a quad.
    let quad = thread / LANES;
    let lane = thread % LANES;
    if (quad < QUADS) {
        var top = vec4<f32>(LOWEST);
        for (var k = lane; k < CHUNK; k += LANES) {
            var score = scores[quad * CHUNK + k];
            if (SCALED) { score *= cache_scale_of(places[k]); }
            for (var r = 0u; r < 4u; r++) {
                let row = rows[quad * 4u + r];
                let x = logit(score[r], row.slope, begin + k, row.position);
                score[r] = select(LOWEST, x, sees(row, sequence, begin + k));
            }
            scores[quad * CHUNK + k] = score;
            top = max(top, score);
        }
        tops[thread] = top;
    }
    workgroupBarrier();
    if (quad < QUADS) {
        var top = vec4<f32>(LOWEST);
        for (var l = 0u; l < LANES; l++) { top = max(top, tops[quad * LANES + l]); }
        var total = vec4<f32>();
        for (var k = lane; k < CHUNK; k += LANES) {
            let score = scores[quad * CHUNK + k];
            var weight = select(vec4<f32>(), exp(score - top), score > vec4<f32>(MASKED));
            total = fma(weight, vec4<f32>(1.0), total);
            // The scale of a key's latent goes into its weight, once for all elements.
            if (SCALED) { weight *= cache_scale_of(places[k]); }
            scores[quad * CHUNK + k] = weight;
        }
        totals[thread] = total;
    }
    workgroupBarrier();
    if (quad < QUADS && lane == 0u) {
        var top = vec4<f32>(LOWEST);
        var total = vec4<f32>();
        for (var l = 0u; l < LANES; l++) {
            top = max(top, tops[quad * LANES + l]);
            total = fma(totals[quad * LANES + l], vec4<f32>(1.0), total);
        }
        for (var r = 0u; r < 4u; r++) {
            let state = rows[quad * 4u + r].state;
            if (state != NO_STATE) { partials[call.states * (LATENT / 2u) + state] = vec2<f32>(top[r], total[r]); }
        }
    }

    // Weighted sums of the latents. A team takes every so-manieth key of the chunk.
    let team = thread / TEAM;
    for (var turn = 0u; turn < (UNITS + TEAM - 1u) / TEAM; turn++) {
        let unit = turn * TEAM + thread % TEAM;
        let works = unit < UNITS;
        let column = unit % EIGHTS * 8u;
        let part = unit / EIGHTS * PART;
        var sums: array<vec4<f32>, 8u * PART>;
        if (works) {
            for (var k = (lo - begin) / GROUPS * GROUPS + team; k < hi - begin; k += GROUPS) {
                let elements = cache_load8(places[k] * DIM + column);
                let a = elements[0];
                let b = elements[1];
                for (var p = 0u; p < PART; p++) {
                    let weight = scores[(part + p) * CHUNK + k];
                    let s = p * 8u;
                    sums[s] = fma(weight, vec4<f32>(a.x), sums[s]);
                    sums[s + 1u] = fma(weight, vec4<f32>(a.y), sums[s + 1u]);
                    sums[s + 2u] = fma(weight, vec4<f32>(a.z), sums[s + 2u]);
                    sums[s + 3u] = fma(weight, vec4<f32>(a.w), sums[s + 3u]);
                    sums[s + 4u] = fma(weight, vec4<f32>(b.x), sums[s + 4u]);
                    sums[s + 5u] = fma(weight, vec4<f32>(b.y), sums[s + 5u]);
                    sums[s + 6u] = fma(weight, vec4<f32>(b.z), sums[s + 6u]);
                    sums[s + 7u] = fma(weight, vec4<f32>(b.w), sums[s + 7u]);
                }
            }
        }
        if (GROUPS > 1u) {
            // Teams become one, in order. The column at hand is moved to the front: an index that depends on a loop
            // with barriers, which few compilers unroll, would keep the sums out of registers from the start.
            for (var i = 0u; i < 8u; i++) {
                workgroupBarrier();
                for (var p = 0u; p < PART; p++) { scores[thread * PART + p] = sums[p * 8u]; }
                workgroupBarrier();
                for (var p = 0u; p < PART; p++) {
                    var merged = vec4<f32>();
                    if (team == 0u) {
                        for (var t = 0u; t < GROUPS; t++) { merged += scores[(t * TEAM + thread) * PART + p]; }
                    }
                    for (var next = 1u; next < 8u; next++) { sums[p * 8u + next - 1u] = sums[p * 8u + next]; }
                    sums[p * 8u + 7u] = merged;
                }
            }
        }
        if (team == 0u && works) {
            for (var p = 0u; p < PART; p++) {
                let row = (part + p) * 4u;
                let s = p * 8u;
                // By name: a component whose number no compiler can tell would keep the sums out of registers.
                keep(rows[row].state, column, vec4<f32>(sums[s].x, sums[s + 1u].x, sums[s + 2u].x, sums[s + 3u].x),
                    vec4<f32>(sums[s + 4u].x, sums[s + 5u].x, sums[s + 6u].x, sums[s + 7u].x));
                keep(rows[row + 1u].state, column, vec4<f32>(sums[s].y, sums[s + 1u].y, sums[s + 2u].y, sums[s + 3u].y),
                    vec4<f32>(sums[s + 4u].y, sums[s + 5u].y, sums[s + 6u].y, sums[s + 7u].y));
                keep(rows[row + 2u].state, column, vec4<f32>(sums[s].z, sums[s + 1u].z, sums[s + 2u].z, sums[s + 3u].z),
                    vec4<f32>(sums[s + 4u].z, sums[s + 5u].z, sums[s + 6u].z, sums[s + 7u].z));
                keep(rows[row + 3u].state, column, vec4<f32>(sums[s].w, sums[s + 1u].w, sums[s + 2u].w, sums[s + 3u].w),
                    vec4<f32>(sums[s + 4u].w, sums[s + 5u].w, sums[s + 6u].w, sums[s + 7u].w));
            }
        }
    }
}
