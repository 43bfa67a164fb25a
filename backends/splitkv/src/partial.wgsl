// Attention of one chunk of a sequence's keys; lib.rs tells the structure. Vectors of four hold the rows of a tile.
//
// A row's bits must not depend on the rows beside it, so sums are spelled as fma: nothing is left for a compiler to
// contract in one specialisation and not in another.

const ELEMENTS: u32 = 8u * EIGHTS;

var<workgroup> sums_of: array<vec4<f32>, TILES * ((STREAMS + 1u) / 2u) * HEAD_DIM>;
var<workgroup> highest_of: array<vec4<f32>, TILES * STREAMS>;
var<workgroup> total_of: array<vec4<f32>, TILES * STREAMS>;

@compute @workgroup_size(TILES * TILE_THREADS)
fn attend(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) width: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
) {
    // Threads are numbered along their subgroups: nothing else says where an invocation lies in one.
    let thread = subgroup * width + invocation;
    let tile = thread / TILE_THREADS;
    let stream = thread % TILE_THREADS / LANES;
    let lane = thread % LANES;
    // A workgroup beyond the last item repeats the last one without writing: an early return would leave barriers in
    // what a compiler takes for divergent flow.
    let number = (workgroup.x + workgroup.y * workgroups.x) / call.kv_heads;
    let kv_head = (workgroup.x + workgroup.y * workgroups.x) % call.kv_heads;
    let item = call.first + min(number, call.items - 1u) * 4u;
    let sequence = extra(item);
    let chunk = extra(item + 2u);
    let context = sequence_kv_len(sequence) - sequence_queries(sequence);
    let all = sequence_queries(sequence) * call.group;
    let first = extra(item + 1u) + tile * 4u;

    // What the rows of this tile see. The last rows of a tile may be nobody's; they see nothing.
    var row_first = vec4<u32>(0xffffffffu);
    var row_end = vec4<u32>();
    var row_query = vec4<u32>();
    var row_slope = vec4<f32>();
    var row_place = vec4<u32>();
    for (var r = 0u; r < 4u; r++) {
        let row = first + r;
        if (row < all) {
            let seen = keys_of(sequence, row / call.group);
            let head = kv_head * call.group + row % call.group;
            row_first[r] = seen.x;
            row_end[r] = seen.y;
            row_query[r] = row / call.group;
            row_slope[r] = slope_of(head);
            row_place[r] = (row / call.group) * call.heads + head;
        }
    }
    let rows = select(0u, min(4u, all - min(all, first)), number < call.items);

    // This lane's elements of each row's query, and of the weighted sum of values.
    var query: array<vec4<f32>, ELEMENTS>;
    var sums: array<vec4<f32>, ELEMENTS>;
    for (var i = 0u; i < ELEMENTS; i++) {
        let element = (i / 8u * LANES + lane) * 8u + i % 8u;
        var elements = vec4<f32>();
        for (var r = 0u; r < 4u; r++) {
            if (first + r < all) {
                let place = sequence_start(sequence) * call.heads + row_place[r];
                elements[r] = call.scale * q_at(place * HEAD_DIM + element);
            }
        }
        query[i] = elements;
    }
    var highest = vec4<f32>(LOWEST);
    var total = vec4<f32>();

    // All tiles of the workgroup take the same steps: a tile's own keys are a part of the item's.
    let item_lo = keys_of(sequence, extra(item + 1u) / call.group).x;
    let item_last = min(extra(item + 1u) + TILES * 4u, all) - 1u;
    let item_hi = keys_of(sequence, item_last / call.group).y;
    let begin = chunk * CHUNK;
    let end = min(begin + CHUNK, item_hi);
    let step = STREAMS * KEYS;
    // Steps begin at the same positions whatever the window: a row that sees none of a step keeps its bits.
    for (var base = begin + (max(item_lo, begin) - begin) / step * step; base < end; base += step) {
        var x: array<vec4<f32>, KEYS>;
        var cached: array<u32, KEYS>;
        var places: array<u32, KEYS>;
        for (var u = 0u; u < KEYS; u++) {
            // Keys that no row sees give way to one that some row sees: what lies there may be anything, even under a
            // weight of zero.
            let key = clamp(base + u * STREAMS + stream, item_lo, item_hi - 1u);
            cached[u] = place_of(sequence, key, kv_head);
            places[u] = cached[u] * HEAD_DIM + lane * 8u;
        }
        for (var e = 0u; e < EIGHTS; e++) {
            var keys: array<array<vec4<f32>, 2>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { keys[u] = k_load8(places[u] + e * LANES * 8u); }
            for (var u = 0u; u < KEYS; u++) {
                let a = keys[u][0];
                let b = keys[u][1];
                var sum = x[u];
                sum = fma(vec4<f32>(a.x), query[e * 8u], sum);
                sum = fma(vec4<f32>(a.y), query[e * 8u + 1u], sum);
                sum = fma(vec4<f32>(a.z), query[e * 8u + 2u], sum);
                sum = fma(vec4<f32>(a.w), query[e * 8u + 3u], sum);
                sum = fma(vec4<f32>(b.x), query[e * 8u + 4u], sum);
                sum = fma(vec4<f32>(b.y), query[e * 8u + 5u], sum);
                sum = fma(vec4<f32>(b.z), query[e * 8u + 6u], sum);
                x[u] = fma(vec4<f32>(b.w), query[e * 8u + 7u], sum);
            }
        }
        for (var hop = 1u; hop < LANES; hop <<= 1u) {
            for (var u = 0u; u < KEYS; u++) { x[u] += subgroupShuffleXor(x[u], hop); }
        }

        if (SCALED) {
            for (var u = 0u; u < KEYS; u++) { x[u] *= k_scale_of(cached[u]); }
        }

        var top = highest;
        for (var u = 0u; u < KEYS; u++) {
            let key = base + u * STREAMS + stream;
            var seen = vec4<u32>(key) >= row_first & vec4<u32>(key) < row_end & vec4<bool>(key < begin + CHUNK);
            if (TREE) {
                for (var r = 0u; r < 4u; r++) {
                    if (seen[r] && key >= context) {
                        seen[r] = tree_bit(sequence_start(sequence) + row_query[r], key - context);
                    }
                }
            }
            if (SOFTCAP || ALIBI) {
                let position = vec4<u32>(context) + row_query;
                let product = x[u];
                x[u] = vec4<f32>(
                    logit(product.x, row_slope.x, key, position.x), logit(product.y, row_slope.y, key, position.y),
                    logit(product.z, row_slope.z, key, position.z), logit(product.w, row_slope.w, key, position.w),
                );
            }
            x[u] = select(vec4<f32>(LOWEST), x[u], seen);
            top = max(top, x[u]);
        }
        // A row that sees nothing here keeps its bits, whatever the driver's exp(0) is.
        let shrink = select(exp(highest - top), vec4<f32>(1.0), highest == top);
        highest = top;
        total *= shrink;
        for (var u = 0u; u < KEYS; u++) {
            x[u] = select(vec4<f32>(), exp(x[u] - top), x[u] > vec4<f32>(MASKED));
            total = fma(x[u], vec4<f32>(1.0), total);
            // The scale of a key's values goes into its weight, once for all of them.
            if (SCALED) { x[u] *= v_scale_of(cached[u]); }
        }
        for (var i = 0u; i < ELEMENTS; i++) { sums[i] *= shrink; }
        for (var e = 0u; e < EIGHTS; e++) {
            var values: array<array<vec4<f32>, 2>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { values[u] = v_load8(places[u] + e * LANES * 8u); }
            for (var u = 0u; u < KEYS; u++) {
                let a = values[u][0];
                let b = values[u][1];
                sums[e * 8u] = fma(x[u], vec4<f32>(a.x), sums[e * 8u]);
                sums[e * 8u + 1u] = fma(x[u], vec4<f32>(a.y), sums[e * 8u + 1u]);
                sums[e * 8u + 2u] = fma(x[u], vec4<f32>(a.z), sums[e * 8u + 2u]);
                sums[e * 8u + 3u] = fma(x[u], vec4<f32>(a.w), sums[e * 8u + 3u]);
                sums[e * 8u + 4u] = fma(x[u], vec4<f32>(b.x), sums[e * 8u + 4u]);
                sums[e * 8u + 5u] = fma(x[u], vec4<f32>(b.y), sums[e * 8u + 5u]);
                sums[e * 8u + 6u] = fma(x[u], vec4<f32>(b.z), sums[e * 8u + 6u]);
                sums[e * 8u + 7u] = fma(x[u], vec4<f32>(b.w), sums[e * 8u + 7u]);
            }
        }
    }

    // Streams of a tile become one: the upper half hands its sums to the lower half, until one is left.
    if (lane == 0u) {
        highest_of[tile * STREAMS + stream] = highest;
        total_of[tile * STREAMS + stream] = total;
    }
    workgroupBarrier();
    var top = vec4<f32>(LOWEST);
    for (var s = 0u; s < STREAMS; s++) { top = max(top, highest_of[tile * STREAMS + s]); }
    let share = select(vec4<f32>(), exp(highest - top), highest > vec4<f32>(MASKED));
    for (var i = 0u; i < ELEMENTS; i++) { sums[i] *= share; }
    for (var half = STREAMS / 2u; half > 0u; half /= 2u) {
        let place = (tile * ((STREAMS + 1u) / 2u) + stream % half) * HEAD_DIM + lane;
        if (stream >= half && stream < 2u * half) {
            for (var i = 0u; i < ELEMENTS; i++) { sums_of[place + i * LANES] = sums[i]; }
        }
        workgroupBarrier();
        if (stream < half) {
            for (var i = 0u; i < ELEMENTS; i++) { sums[i] += sums_of[place + i * LANES]; }
        }
        workgroupBarrier();
    }
    if (stream == 0u) {
        var weights = vec4<f32>();
        for (var s = 0u; s < STREAMS; s++) {
            let above = highest_of[tile * STREAMS + s];
            let part = select(vec4<f32>(), exp(above - top), above > vec4<f32>(MASKED));
            weights = fma(total_of[tile * STREAMS + s], part, weights);
        }
        let only = is_only_chunk(sequence);
        // Counted to four, not to the number of rows: an index that no compiler can unroll would keep the sums out of
        // registers from the start.
        for (var r = 0u; r < 4u; r++) {
            if (r < rows && only) {
                let place = sequence_start(sequence) * call.heads + row_place[r];
                let end = ending(top[r], weights[r], row_place[r] % call.heads);
                for (var i = 0u; i < ELEMENTS; i++) {
                    write_out(place * HEAD_DIM + (i / 8u * LANES + lane) * 8u + i % 8u, answer(sums[i][r], end));
                }
                if (lane == 0u) { write_lse(place, lse_of(end)); }
            } else if (r < rows) {
                let state = first_state(sequence, chunk) + row_place[r];
                for (var i = 0u; i < ELEMENTS; i++) {
                    partials[state * HEAD_DIM + (i / 8u * LANES + lane) * 8u + i % 8u] = sums[i][r];
                }
                if (lane == 0u) {
                    partials[call.states * HEAD_DIM + state * 2u] = top[r];
                    partials[call.states * HEAD_DIM + state * 2u + 1u] = weights[r];
                }
            }
        }
    }
}
