// Attention of one chunk of a sequence's keys; lib.rs tells the structure. Vectors of four hold the rows of a tile.
//
// A row's bits must not depend on the rows beside it, so sums are spelled as fma: nothing is left for a compiler to
// contract in one specialisation and not in another.
//
// Loops over what should stay in registers are written out (`// unroll`), because not every compiler does it.

var<workgroup> sums_of: array<vec4<f32>, GROUPS * ((STREAMS + 1u) / 2u) * HEAD_DIM>;
var<workgroup> highest_of: array<vec4<f32>, GROUPS * STREAMS>;
var<workgroup> total_of: array<vec4<f32>, GROUPS * STREAMS>;

// Of two keys' scores, each a part of the sum, the one that this thread goes on with: with its partner's part.
fn fold(even: vec4<f32>, odd: vec4<f32>, invocation: u32, hop: u32) -> vec4<f32> {
    let is_odd = (invocation & hop) != 0u;
    return select(even, odd, is_odd) + subgroupShuffleXor(select(odd, even, is_odd), hop);
}

@compute @workgroup_size(GROUPS * THREADS)
fn attend(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) width: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
) {
    // Threads are numbered along their subgroups: nothing else says where an invocation lies in one.
    let thread = subgroup * width + invocation;
    let group = thread / THREADS;
    let stream = thread % THREADS / LANES;
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
    let first = extra(item + 1u) + group * TILES * 4u;
    let queries_at = sequence_start(sequence) * call.heads;

    // What the rows of these tiles see. The last rows may be nobody's; they see nothing.
    var row_first: array<vec4<u32>, TILES>;
    var row_end: array<vec4<u32>, TILES>;
    var row_query: array<vec4<u32>, TILES>;
    var row_slope: array<vec4<f32>, TILES>;
    var row_place: array<vec4<u32>, TILES>;
    for (var t = 0u; t < TILES; t++) { // unroll
        row_first[t] = vec4<u32>(0xffffffffu);
        for (var r = 0u; r < 4u; r++) { // unroll
            let row = first + t * 4u + r;
            if (row < all) {
                let seen = keys_of(sequence, row / call.group);
                let head = kv_head * call.group + row % call.group;
                row_first[t][r] = seen.x;
                row_end[t][r] = seen.y;
                row_query[t][r] = row / call.group;
                row_slope[t][r] = slope_of(head);
                row_place[t][r] = (row / call.group) * call.heads + head;
            }
        }
    }

    // This lane's elements of each row's query, and of the weighted sum of values.
    var query: array<vec4<f32>, TILES * ELEMENTS>;
    var sums: array<vec4<f32>, TILES * ELEMENTS>;
    for (var t = 0u; t < TILES; t++) { // unroll
        for (var r = 0u; r < 4u; r++) { // unroll
            let is_there = first + t * 4u + r < all;
            let place = select(0u, queries_at + row_place[t][r], is_there) * HEAD_DIM + lane * 8u;
            for (var e = 0u; e < EIGHTS; e++) { // unroll
                let elements = q_load8(place + e * LANES * 8u);
                for (var i = 0u; i < 8u; i++) { // unroll
                    let element = call.scale * elements[i / 4u][i % 4u];
                    query[t * ELEMENTS + e * 8u + i][r] = select(0.0, element, is_there);
                }
            }
        }
    }
    var highest: array<vec4<f32>, TILES>;
    var total: array<vec4<f32>, TILES>;
    for (var t = 0u; t < TILES; t++) { highest[t] = vec4<f32>(LOWEST); } // unroll

    // All tiles of the workgroup take the same steps: a tile's own keys are a part of the item's.
    let item_lo = keys_of(sequence, extra(item + 1u) / call.group).x;
    let item_last = min(extra(item + 1u) + GROUPS * TILES * 4u, all) - 1u;
    let item_hi = keys_of(sequence, item_last / call.group).y;
    let begin = chunk * CHUNK;
    let end = min(begin + CHUNK, item_hi);
    let step = STREAMS * KEYS;
    // Steps begin at the same positions whatever the window: a row that sees none of a step keeps its bits.
    let start = begin + (max(item_lo, begin) - begin) / step * step;
    // A stream takes KEYS keys at once. Each of its threads looks up one of them, a step ahead, and weighs it.
    let own = lane % KEYS;
    let leader = invocation - own;
    // Keys that no row sees give way to one that some row sees: what lies there may be anything, even under a weight of
    // zero.
    var next = place_of(sequence, clamp(start + own * STREAMS + stream, item_lo, item_hi - 1u), kv_head);
    // Of the next keys and values, so that they are on their way into a processor's cache. WGSL has no other prefetch.
    var touched = 0u;
    for (var base = start; base < end; base += step) {
        let key = base + own * STREAMS + stream;
        let cached = next;
        next = place_of(sequence, clamp(key + step, item_lo, item_hi - 1u), kv_head);
        if (PREFETCH) {
            for (var line = 0u; line < HEAD_DIM; line += LINE) {
                touched |= bitcast<u32>(k_load8(next * HEAD_DIM + line)[0].x);
                touched |= bitcast<u32>(v_load8(next * HEAD_DIM + line)[0].x);
            }
        }
        var places: array<u32, KEYS>;
        for (var u = 0u; u < KEYS; u++) { // unroll
            places[u] = subgroupShuffle(cached, leader + u) * HEAD_DIM + lane * 8u;
        }

        var products: array<vec4<f32>, TILES * KEYS>;
        for (var e = 0u; e < EIGHTS; e++) { // unroll
            var keys: array<array<vec4<f32>, 2>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { keys[u] = k_load8(places[u] + e * LANES * 8u); } // unroll
            for (var t = 0u; t < TILES; t++) { // unroll
                for (var u = 0u; u < KEYS; u++) { // unroll
                    let q = t * ELEMENTS + e * 8u;
                    var sum = products[t * KEYS + u];
                    let elements = keys[u];
                    for (var i = 0u; i < 8u; i++) { // unroll
                        sum = fma(vec4<f32>(elements[i / 4u][i % 4u]), query[q + i], sum);
                    }
                    products[t * KEYS + u] = sum;
                }
            }
        }

        // Parts become sums: of KEYS keys a thread is left with its own one.
        var weights: array<vec4<f32>, TILES * KEYS>;
        for (var t = 0u; t < TILES; t++) { // unroll
            let p = t * KEYS;
            for (var u = 0u; u < KEYS / 2u; u++) { // unroll
                products[p + u] = fold(products[p + 2u * u], products[p + 2u * u + 1u], invocation, 1u);
            }
            for (var u = 0u; u < KEYS / 4u; u++) { // unroll
                products[p + u] = fold(products[p + 2u * u], products[p + 2u * u + 1u], invocation, 2u);
            }
            for (var u = 0u; u < KEYS / 8u; u++) { // unroll
                products[p + u] = fold(products[p + 2u * u], products[p + 2u * u + 1u], invocation, 4u);
            }
            var x = products[p];
            for (var hop = KEYS; hop < LANES; hop <<= 1u) { x += subgroupShuffleXor(x, hop); }

            if (SCALED) { x *= k_scale_of(cached); }
            var seen = vec4<u32>(key) >= row_first[t] & vec4<u32>(key) < row_end[t] & vec4<bool>(key < begin + CHUNK);
            if (TREE) {
                for (var r = 0u; r < 4u; r++) { // unroll
                    if (seen[r] && key >= context) {
                        seen[r] = tree_bit(sequence_start(sequence) + row_query[t][r], key - context);
                    }
                }
            }
            if (SOFTCAP || ALIBI) {
                let position = vec4<u32>(context) + row_query[t];
                let slope = row_slope[t];
                x = vec4<f32>(
                    logit(x.x, slope.x, key, position.x), logit(x.y, slope.y, key, position.y),
                    logit(x.z, slope.z, key, position.z), logit(x.w, slope.w, key, position.w),
                );
            }
            x = select(vec4<f32>(LOWEST), x, seen);
            var top = x;
            for (var hop = 1u; hop < KEYS; hop <<= 1u) { top = max(top, subgroupShuffleXor(top, hop)); }
            top = max(top, highest[t]);
            // A row that sees nothing here keeps its bits, whatever the driver's exp(0) is.
            let shrink = select(exp(highest[t] - top), vec4<f32>(1.0), highest[t] == top);
            highest[t] = top;
            x = select(vec4<f32>(), exp(x - top), x > vec4<f32>(MASKED));
            total[t] = fma(total[t], shrink, x);
            // The scale of a key's values goes into its weight, once for all of them.
            if (SCALED) { x *= v_scale_of(cached); }
            for (var u = 0u; u < KEYS; u++) { weights[p + u] = subgroupShuffle(x, leader + u); } // unroll
            for (var i = 0u; i < ELEMENTS; i++) { sums[t * ELEMENTS + i] *= shrink; } // unroll
        }

        for (var e = 0u; e < EIGHTS; e++) { // unroll
            var values: array<array<vec4<f32>, 2>, KEYS>;
            for (var u = 0u; u < KEYS; u++) { values[u] = v_load8(places[u] + e * LANES * 8u); } // unroll
            for (var t = 0u; t < TILES; t++) { // unroll
                for (var u = 0u; u < KEYS; u++) { // unroll
                    let weight = weights[t * KEYS + u];
                    let s = t * ELEMENTS + e * 8u;
                    let elements = values[u];
                    for (var i = 0u; i < 8u; i++) { // unroll
                        sums[s + i] = fma(weight, vec4<f32>(elements[i / 4u][i % 4u]), sums[s + i]);
                    }
                }
            }
        }
    }

    // What was touched has to count for something, or a compiler would leave it out.
    if (PREFETCH) { total[0] += vec4<f32>(f32(touched & call.zero)); }

    // Streams of a tile become one: the upper half hands its sums to the lower half, until one is left. The tile to end is
    // moved to the front each time, so that this is not written out for each.
    for (var t = 0u; t < TILES; t++) {
        for (var hop = 1u; hop < KEYS; hop <<= 1u) { total[0] += subgroupShuffleXor(total[0], hop); }
        if (lane == 0u) {
            highest_of[group * STREAMS + stream] = highest[0];
            total_of[group * STREAMS + stream] = total[0];
        }
        workgroupBarrier();
        var top = vec4<f32>(LOWEST);
        for (var s = 0u; s < STREAMS; s++) { top = max(top, highest_of[group * STREAMS + s]); }
        let share = select(vec4<f32>(), exp(highest[0] - top), highest[0] > vec4<f32>(MASKED));
        for (var i = 0u; i < ELEMENTS; i++) { sums[i] *= share; } // unroll
        for (var half = STREAMS / 2u; half > 0u; half /= 2u) {
            let place = (group * ((STREAMS + 1u) / 2u) + stream % half) * HEAD_DIM + lane;
            if (stream >= half && stream < 2u * half) {
                for (var i = 0u; i < ELEMENTS; i++) { sums_of[place + i * LANES] = sums[i]; } // unroll
            }
            workgroupBarrier();
            if (stream < half) {
                for (var i = 0u; i < ELEMENTS; i++) { sums[i] += sums_of[place + i * LANES]; } // unroll
            }
            workgroupBarrier();
        }
        if (stream == 0u) {
            var weight = vec4<f32>();
            for (var s = 0u; s < STREAMS; s++) {
                let above = highest_of[group * STREAMS + s];
                let part = select(vec4<f32>(), exp(above - top), above > vec4<f32>(MASKED));
                weight = fma(total_of[group * STREAMS + s], part, weight);
            }
            let only = is_only_chunk(sequence);
            let rows = select(0u, min(4u, all - min(all, first + t * 4u)), number < call.items);
            // Counted to four, not to the number of rows: an index that no compiler can unroll would keep the sums out of
            // registers from the start.
            for (var r = 0u; r < 4u; r++) { // unroll
                if (r < rows && only) {
                    let place = queries_at + row_place[0][r];
                    let end = ending(top[r], weight[r], row_place[0][r] % call.heads);
                    for (var i = 0u; i < ELEMENTS; i++) { // unroll
                        write_out(place * HEAD_DIM + (i / 8u * LANES + lane) * 8u + i % 8u, answer(sums[i][r], end));
                    }
                    if (lane == 0u) { write_lse(place, lse_of(end)); }
                } else if (r < rows) {
                    let state = first_state(sequence, chunk) + row_place[0][r];
                    for (var i = 0u; i < ELEMENTS; i++) { // unroll
                        partials[state * HEAD_DIM + (i / 8u * LANES + lane) * 8u + i % 8u] = sums[i][r];
                    }
                    if (lane == 0u) {
                        partials[call.states * HEAD_DIM + state * 2u] = top[r];
                        partials[call.states * HEAD_DIM + state * 2u + 1u] = weight[r];
                    }
                }
            }
        }
        if (TILES > 1u) {
            for (var next = 1u; next < TILES; next++) { // unroll
                highest[next - 1u] = highest[next];
                total[next - 1u] = total[next];
                row_place[next - 1u] = row_place[next];
            }
            for (var next = ELEMENTS; next < TILES * ELEMENTS; next++) { sums[next - ELEMENTS] = sums[next]; } // unroll
            // All have read what the next tile overwrites.
            workgroupBarrier();
        }
    }
}
