// Flash attention of one KV head over a tile of rows; lib.rs tells the structure. Vectors of four hold four rows.
//
// A row's bits must not depend on how many rows its item has. So sums are spelled as fma, which leaves the compiler
// nothing to contract in one specialisation and not in another, and a product that is not one goes through a select
// or a shuffle before it is added to.

@group(0) @binding(4) var<storage, read_write> out: array<f32>;

struct Call {
    scale: f32,
    softcap: f32,
    nothing: f32, // the LSE of a row that sees nothing, -infinity: WGSL cannot write it
    left: u32,    // the window, the largest u32 where it is unbounded
    right: u32,
    heads: u32,   // query heads
    kv_heads: u32,
    group: u32,   // query heads of a KV head
}
var<immediate> call: Call;

// The words of the plan: four, of which the third is the number of items, then sequence and first row of each item.
const PLAN_HEADER: u32 = 2u;

const LOWEST: f32 = -3.0e38;  // in place of -infinity
const MASKED: f32 = -2.9e38;  // what is not above it weighs nothing
const LN_2: f32 = 0.6931471805599453;
const ROUNDS: u32 = 4u;       // of merging, so that SLICES / ROUNDS slices fill the scratch memory

// First the queries, [element][quad], then the slices' sums on their way to be merged.
var<workgroup> scratch: array<vec4<f32>, SCRATCH>;
// What the threads of a slice tell each other: weights, on some devices scores too, and where their keys lie.
var<workgroup> exchange: array<vec4<f32>, QUADS * THREADS>;
var<workgroup> places: array<u32, THREADS>;
var<workgroup> slice_highest: array<vec4<f32>, SLICES>;
var<workgroup> slice_total: array<vec4<f32>, SLICES>;
// What each row sees: keys row_first .. row_end.
var<workgroup> row_first: array<vec4<u32>, QUADS>;
var<workgroup> row_end: array<vec4<u32>, QUADS>;
var<workgroup> row_query: array<vec4<u32>, QUADS>;
var<workgroup> row_slope: array<vec4<f32>, QUADS>;

@compute @workgroup_size(THREADS)
fn attend(at: Invocation) {
    let thread = thread_of(at);
    let slice = thread / LANES;
    // A workgroup beyond the last item repeats the last one without writing; returning early would leave barriers in
    // what a compiler takes for divergent flow.
    let number = at.group.x + at.group.y * at.groups.x;
    let item = PLAN_HEADER + min(number, extra(1u) - 1u) * 2u;
    let sequence = extra(item);
    let first = extra(item + 1u);
    let kv_head = at.group.z;
    let queries = sequence_queries(sequence);
    let context = sequence_kv_len(sequence) - queries;
    let rows = min(QUADS * 4u, queries * call.group - first);
    let written = select(0u, rows, number < extra(1u));
    let lo = keys_of(sequence, first / call.group).x;
    let hi = keys_of(sequence, (first + rows - 1u) / call.group).y;

    // Rows of an item lie in order of query, then head of the group.
    if (thread < QUADS) {
        var firsts = vec4<u32>();
        var ends = vec4<u32>();
        var places = vec4<u32>();
        var slopes = vec4<f32>();
        for (var r = 0u; r < 4u; r++) {
            let row = thread * 4u + r;
            if (row < rows) {
                let seen = keys_of(sequence, (first + row) / call.group);
                firsts[r] = seen.x;
                ends[r] = seen.y;
                places[r] = (first + row) / call.group;
                slopes[r] = slope_of(kv_head * call.group + (first + row) % call.group);
            }
        }
        row_first[thread] = firsts;
        row_end[thread] = ends;
        row_query[thread] = places;
        row_slope[thread] = slopes;
    }
    for (var i = thread; i < HEAD_DIM * QUADS; i += THREADS) {
        var elements = vec4<f32>();
        for (var r = 0u; r < 4u; r++) {
            let row = (i % QUADS) * 4u + r;
            if (row < rows) {
                let query = sequence_start(sequence) + (first + row) / call.group;
                let head = kv_head * call.group + (first + row) % call.group;
                elements[r] = call.scale * q_at((query * call.heads + head) * HEAD_DIM + i / QUADS);
            }
        }
        scratch[i] = elements;
    }
    workgroupBarrier();

    // Of this thread's slice: the highest logits so far; of its own keys: the sum of weights; of its elements: the
    // weighted sums of the slice's values.
    var highest: array<vec4<f32>, QUADS>;
    var total: array<vec4<f32>, QUADS>;
    var sums: array<vec4<f32>, QUADS * 8u>;
    for (var quad = 0u; quad < QUADS; quad++) { highest[quad] = vec4<f32>(LOWEST); }
    // The last threads of a slice wider than the head repeat its last elements; nobody merges theirs.
    let column = min(thread % LANES * 8u, VALUE_DIM - 8u);

    for (var tile = lo / THREADS * THREADS; tile < hi; tile += THREADS) {
        let key = tile + thread;
        let slice_key = tile + slice * LANES;
        // Whether a row may see a key of the slice.
        let busy = slice_key < hi && slice_key + LANES > lo;
        var cached = 0u;
        var x: array<vec4<f32>, QUADS>;
        if (busy) {
            // Keys that no row sees give way to one that some row sees: what lies there may be anything, even under a
            // weight of zero.
            cached = cache_row(slot(sequence, clamp(key, lo, hi - 1u)), kv_head, call.kv_heads);
            let place = cached * HEAD_DIM;
            for (var d = 0u; d < HEAD_DIM; d += 8u) {
                let elements = k_load8(place + d);
                let a = elements[0];
                let b = elements[1];
                for (var quad = 0u; quad < QUADS; quad++) {
                    let q = d * QUADS + quad;
                    var sum = x[quad];
                    sum = fma(vec4<f32>(a.x), scratch[q], sum);
                    sum = fma(vec4<f32>(a.y), scratch[q + QUADS], sum);
                    sum = fma(vec4<f32>(a.z), scratch[q + 2u * QUADS], sum);
                    sum = fma(vec4<f32>(a.w), scratch[q + 3u * QUADS], sum);
                    sum = fma(vec4<f32>(b.x), scratch[q + 4u * QUADS], sum);
                    sum = fma(vec4<f32>(b.y), scratch[q + 5u * QUADS], sum);
                    sum = fma(vec4<f32>(b.z), scratch[q + 6u * QUADS], sum);
                    x[quad] = fma(vec4<f32>(b.w), scratch[q + 7u * QUADS], sum);
                }
            }
        }
        places[thread] = cached * VALUE_DIM;
        var value_scale = 1.0;
        if (SCALED && busy) {
            let key_scale = k_scale_of(cached);
            value_scale = v_scale_of(cached);
            for (var quad = 0u; quad < QUADS; quad++) { x[quad] *= key_scale; }
        }
        for (var quad = 0u; quad < QUADS; quad++) {
            var seen = vec4<u32>(key) >= row_first[quad] & vec4<u32>(key) < row_end[quad];
            if (TREE) {
                for (var r = 0u; r < 4u; r++) {
                    if (seen[r] && key >= context) {
                        seen[r] = tree_bit(sequence_start(sequence) + row_query[quad][r], key - context);
                    }
                }
            }
            if (SOFTCAP || ALIBI) {
                let slope = row_slope[quad];
                let position = vec4<u32>(context) + row_query[quad];
                let product = x[quad];
                x[quad] = vec4<f32>(
                    logit(product.x, slope.x, key, position.x), logit(product.y, slope.y, key, position.y),
                    logit(product.z, slope.z, key, position.z), logit(product.w, slope.w, key, position.w),
                );
            }
            x[quad] = select(vec4<f32>(LOWEST), x[quad], seen);
            offer_score(quad * THREADS + thread, x[quad]);
        }
        SCORE_BARRIER

        for (var quad = 0u; quad < QUADS; quad++) {
            let before = highest[quad];
            let top = max(before, slice_max(x[quad], quad * THREADS + thread));
            // A row that sees nothing of the slice keeps its bits, whatever the driver's exp(0) is.
            let shrink = select(exp(before - top), vec4<f32>(1.0), before == top);
            x[quad] = select(vec4<f32>(), exp(x[quad] - top), x[quad] > vec4<f32>(MASKED));
            highest[quad] = top;
            total[quad] = fma(total[quad], shrink, x[quad]);
            for (var i = 0u; i < 8u; i++) { sums[quad * 8u + i] *= shrink; }
        }
        SCORE_BARRIER
        for (var quad = 0u; quad < QUADS; quad++) {
            // The scale of a key's values goes into its weight, once for all of them.
            if (SCALED) { x[quad] *= value_scale; }
            exchange[quad * THREADS + thread] = x[quad];
        }
        workgroupBarrier();

        if (busy) {
            for (var j = 0u; j < LANES; j++) {
                let elements = v_load8(places[slice * LANES + j] + column);
                let a = elements[0];
                let b = elements[1];
                for (var quad = 0u; quad < QUADS; quad++) {
                    let weight = exchange[quad * THREADS + slice * LANES + j];
                    let s = quad * 8u;
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
        workgroupBarrier();
    }

    // Merging, in order of the slices. The quad to merge is moved to the front each time: an index that depends on this
    // loop, which few compilers unroll, would keep the sums out of registers from the start. Slices behind the last key
    // have nothing to add.
    let rounds = (min(hi, THREADS) + THREADS / ROUNDS - 1u) / (THREADS / ROUNDS);
    for (var quad = 0u; quad < QUADS; quad++) {
        offer_score(thread, total[0]);
        if (thread % LANES == 0u) { slice_highest[slice] = highest[0]; }
        workgroupBarrier();
        var top = vec4<f32>(LOWEST);
        for (var s = 0u; s < SLICES; s++) { top = max(top, slice_highest[s]); }
        let share = select(vec4<f32>(), exp(highest[0] - top), highest[0] > vec4<f32>(MASKED));
        let slice_weights = slice_sum(total[0], thread);
        if (thread % LANES == 0u) { slice_total[slice] = slice_weights * share; }

        var merged: array<vec4<f32>, COLUMNS>;
        for (var round = 0u; round < rounds; round++) {
            if (slice / (SLICES / ROUNDS) == round) {
                for (var i = 0u; i < 8u; i++) {
                    scratch[thread % (THREADS / ROUNDS) * 8u + i] = sums[i] * share;
                }
            }
            workgroupBarrier();
            for (var c = 0u; c < COLUMNS; c++) {
                let i = thread + c * THREADS;
                if (i < VALUE_DIM) {
                    for (var s = 0u; s < SLICES / ROUNDS; s++) { merged[c] += scratch[s * LANES * 8u + i]; }
                }
            }
            workgroupBarrier();
        }
        var denominator = vec4<f32>();
        for (var s = 0u; s < SLICES; s++) { denominator += slice_total[s]; }

        for (var r = 0u; r < 4u; r++) {
            let row = quad * 4u + r;
            if (row < written) {
                let head = kv_head * call.group + (first + row) % call.group;
                let place = (sequence_start(sequence) + (first + row) / call.group) * call.heads + head;
                var base = top[r];
                var divisor = denominator[r];
                var factor = 1.0;
                if (SINKS) {
                    // One more logit, that of no key.
                    base = max(base, sink_of(head));
                    factor = exp(top[r] - base);
                    divisor = fma(divisor, factor, exp(sink_of(head) - base));
                }
                for (var c = 0u; c < COLUMNS; c++) {
                    let i = thread + c * THREADS;
                    if (i < VALUE_DIM) {
                        out[place * VALUE_DIM + i] = select(0.0, merged[c][r] * factor / divisor, divisor > 0.0);
                    }
                }
                if (thread == 0u) {
                    write_lse(place, select(call.nothing, fma(log2(divisor), LN_2, base), divisor > 0.0));
                }
            }
        }
        // The next quad's highest logits may be written now: all have read these before the last barrier.
        for (var next = 1u; next < QUADS; next++) {
            highest[next - 1u] = highest[next];
            total[next - 1u] = total[next];
        }
        for (var next = 8u; next < QUADS * 8u; next++) { sums[next - 8u] = sums[next]; }
    }
}
