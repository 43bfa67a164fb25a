// Attention of a run of chunks of a sequence's keys by cooperative matrices; lib.rs tells the structure.
//
// A row's bits must not depend on the rows beside it: every row takes the same products in the same order, whatever the
// number of tiles and of threads that serve a row. Scores are summed over each half of a head and then added. Weights
// are summed by sixteens of a block, four keys each. Sums are spelled as fma, as in partial.wgsl.

@group(0) @binding(1) var<storage, read> q: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> k: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> v: array<vec4<u32>>;

const ROWS: u32 = 16u * TILES;
const ROWS_AT_ONCE: u32 = THREADS / ROW_THREADS;
const PASSES: u32 = ROWS / ROWS_AT_ONCE;
const STRETCH: u32 = 4u * ROW_THREADS;             // elements of a row of which each of its threads has a vector
const PARTS: u32 = KEYS / STRETCH;
const VECTORS: u32 = (HEAD_DIM + STRETCH - 1u) / STRETCH;
const UNITS: u32 = HEAD_DIM / 8u;                  // of 16 bytes, in a row of queries, keys or values
const PIECES: u32 = KEYS * UNITS / THREADS;        // units of a block that a thread carries
const SHARING: u32 = THREADS / WIDTH / TILES;      // subgroups that share a tile of rows
const HALF: u32 = HEAD_DIM / 8u;                   // of a row of a tile, in vectors
const SLICES: u32 = HEAD_DIM / SLICE;
const SLICE_VECTORS: u32 = (SLICE + STRETCH - 1u) / STRETCH;
// From row to row in workgroup memory, in vectors of four; a little more than a row, so that rows lie in other banks.
const TILE_STRIDE: u32 = (HEAD_DIM + 8u) / 4u;
const WEIGHT_STRIDE: u32 = (KEYS + 8u) / 4u;
const SCORE_STRIDE: u32 = (KEYS + 8u) / 4u;
const SUM_STRIDE: u32 = (SLICE + 8u) / 4u;
const SCORES: u32 = ROWS * SCORE_STRIDE;
// Values lie behind the keys and weights in the keys' place, or values there and weights behind them.
const VALUES: u32 = select(0u, KEYS * TILE_STRIDE, APART);
const WEIGHTS: u32 = select(KEYS * TILE_STRIDE, 0u, APART);
const BLOCK_END: u32 = KEYS * TILE_STRIDE + select(ROWS * WEIGHT_STRIDE, KEYS * TILE_STRIDE, APART);
// Queries that stay lie behind all of them; others are in registers before the first keys come.
const QUERIES: u32 = select(0u, BLOCK_END, STAY);

// The block's keys, values and weights, and the rows' queries.
var<workgroup> tile: array<vec4<f16>, BLOCK_END + select(0u, ROWS * TILE_STRIDE, STAY)>;
// The block's scores, those of the halves apart where a subgroup has one half; then its sums.
var<workgroup> products: array<vec4<f32>, max(SCORES * select(1u, 2u, SPLIT), ROWS * SUM_STRIDE)>;
// Where the keys of this block and of the next one lie, in units.
var<workgroup> places: array<u32, 2u * KEYS>;

fn lay(at: u32, unit: vec4<u32>) {
    tile[at] = vec4<f16>(vec2<f16>(unpack2x16float(unit.x)), vec2<f16>(unpack2x16float(unit.y)));
    tile[at + 1u] = vec4<f16>(vec2<f16>(unpack2x16float(unit.z)), vec2<f16>(unpack2x16float(unit.w)));
}

@compute @workgroup_size(THREADS)
fn attend(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
) {
    let thread = subgroup * WIDTH + invocation;
    // A workgroup beyond the last item repeats the last one without writing.
    let number = (workgroup.x + workgroup.y * workgroups.x) / call.kv_heads;
    let kv_head = (workgroup.x + workgroup.y * workgroups.x) % call.kv_heads;
    let item = call.first + min(number, call.items - 1u) * 4u;
    let sequence = extra(item);
    let first = extra(item + 1u);
    let chunks = vec2<u32>(extra(item + 2u), extra(item + 3u));
    let context = sequence_kv_len(sequence) - sequence_queries(sequence);
    let all = sequence_queries(sequence) * call.group;

    let item_lo = keys_of(sequence, first / call.group).x;
    let item_hi = keys_of(sequence, (min(first + ROWS, all) - 1u) / call.group).y;
    let begin = chunks.x * CHUNK;
    // Blocks begin at the same positions whatever the window: a row that sees none of a block keeps its bits.
    let start = begin + (max(item_lo, begin) - begin) / KEYS * KEYS;
    // Keys that no row sees give way to one that some row sees: what lies there may be anything, even under a weight of
    // zero.
    if (thread < 2u * KEYS) {
        places[thread] = place_of(sequence, clamp(start + thread, item_lo, item_hi - 1u), kv_head) * UNITS;
    }
    for (var i = thread; i < ROWS * UNITS; i += THREADS) {
        let row = first + i / UNITS;
        var unit = vec4<u32>();
        if (row < all) {
            let head = kv_head * call.group + row % call.group;
            unit = q[((sequence_start(sequence) + row / call.group) * call.heads + head) * UNITS + i % UNITS];
        }
        lay(QUERIES + i / UNITS * TILE_STRIDE + i % UNITS * 2u, unit);
    }
    workgroupBarrier();

    // A subgroup multiplies one tile of rows, and shares it with others.
    let rows_at = subgroup % TILES * 16u;
    let share = subgroup / TILES;
    let half = select(0u, share / 4u, SPLIT);
    let queries_at = QUERIES + rows_at * TILE_STRIDE + half * HALF;
    LOAD_QUERIES

    // What this thread's rows see. The last rows may be nobody's; they see nothing.
    let lane = thread % ROW_THREADS;
    var row_first: array<u32, PASSES>;
    var row_end: array<u32, PASSES>;
    var highest: array<f32, PASSES>;
    var total: array<f32, PASSES * PARTS>;
    var shrink: array<f32, PASSES>;
    var sums: array<vec4<f32>, PASSES * VECTORS>;
    // Of the span's chunks so far.
    var span_highest: array<f32, PASSES>;
    var span_total: array<f32, PASSES>;
    var span_sums: array<vec4<f32>, PASSES * VECTORS>;
    for (var p = 0u; p < PASSES; p++) {
        let row = first + p * ROWS_AT_ONCE + thread / ROW_THREADS;
        row_first[p] = 0xffffffffu;
        row_end[p] = 0u;
        if (row < all) {
            let seen = keys_of(sequence, row / call.group);
            row_first[p] = seen.x;
            row_end[p] = seen.y;
        }
        highest[p] = LOWEST;
        span_highest[p] = LOWEST;
    }

    // Each thread carries its units of the next keys and values in registers while the block before is computed with.
    var next_keys: array<vec4<u32>, PIECES>;
    var next_values: array<vec4<u32>, PIECES>;
    for (var p = 0u; p < PIECES; p++) {
        let i = thread + p * THREADS;
        next_keys[p] = k[places[i / UNITS] + i % UNITS];
    }
    for (var p = 0u; p < PIECES; p++) {
        let i = thread + p * THREADS;
        next_values[p] = v[places[i / UNITS] + i % UNITS];
    }
    workgroupBarrier();

    let only = is_only_chunk(sequence);
    var base = start;
    var here = 0u;
    for (var chunk = chunks.x; chunk < chunks.y; chunk++) {
        let end = min((chunk + 1u) * CHUNK, item_hi);
        for (; base < end; base += KEYS) {
            // Looked up a block ahead of their use, and laid down behind the scores.
            var far_place = 0u;
            if (thread < KEYS) {
                far_place = place_of(sequence, clamp(base + 2u * KEYS + thread, item_lo, item_hi - 1u), kv_head) * UNITS;
            }
            for (var p = 0u; p < PIECES; p++) {
                let i = thread + p * THREADS;
                lay(i / UNITS * TILE_STRIDE + i % UNITS * 2u, next_keys[p]);
            }
            for (var p = 0u; p < PIECES; p++) {
                let i = thread + p * THREADS;
                next_keys[p] = k[places[KEYS - here + i / UNITS] + i % UNITS];
            }
            if (APART) {
                for (var p = 0u; p < PIECES; p++) {
                    let i = thread + p * THREADS;
                    lay(VALUES + i / UNITS * TILE_STRIDE + i % UNITS * 2u, next_values[p]);
                }
                for (var p = 0u; p < PIECES; p++) {
                    let i = thread + p * THREADS;
                    next_values[p] = v[places[KEYS - here + i / UNITS] + i % UNITS];
                }
            }
            workgroupBarrier();

            for (var t = share % 4u; t < KEYS / 16u; t += min(SHARING, 4u)) {
                let keys_at = t * 16u * TILE_STRIDE + half * HALF;
                SCORE
                let to = half * SCORES + rows_at * SCORE_STRIDE + t * 4u;
                coopStoreT(score, &products[to], SCORE_STRIDE);
            }
            workgroupBarrier();

            for (var p = 0u; p < PASSES; p++) {
                let row = p * ROWS_AT_ONCE + thread / ROW_THREADS;
                var x: array<vec4<f32>, PARTS>;
                var top = highest[p];
                for (var h = 0u; h < PARTS; h++) {
                    let key = vec4<u32>(base + h * STRETCH + lane * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
                    let at = row * SCORE_STRIDE + h * ROW_THREADS + lane;
                    x[h] = products[at];
                    if (SPLIT) { x[h] += products[SCORES + at]; }
                    x[h] *= call.scale;
                    var seen = key >= vec4<u32>(row_first[p]) & key < vec4<u32>(row_end[p]);
                    if (TREE || SOFTCAP || ALIBI) {
                        let query = (first + row) / call.group;
                        for (var i = 0u; i < 4u; i++) {
                            if (TREE && seen[i] && key[i] >= context) {
                                seen[i] = tree_bit(sequence_start(sequence) + query, key[i] - context);
                            }
                            let slope = slope_of(kv_head * call.group + (first + row) % call.group);
                            x[h][i] = logit(x[h][i], slope, key[i], context + query);
                        }
                    }
                    x[h] = select(vec4<f32>(LOWEST), x[h], seen);
                    top = max(top, max(max(x[h].x, x[h].y), max(x[h].z, x[h].w)));
                }
                for (var hop = 1u; hop < ROW_THREADS; hop <<= 1u) { top = max(top, subgroupShuffleXor(top, hop)); }
                // A row that sees nothing here keeps its bits, whatever the driver's exp(0) is.
                shrink[p] = select(exp(highest[p] - top), 1.0, highest[p] == top);
                highest[p] = top;
                for (var h = 0u; h < PARTS; h++) {
                    x[h] = select(vec4<f32>(), exp(x[h] - top), x[h] > vec4<f32>(MASKED));
                    let sum = (x[h].x + x[h].y) + (x[h].z + x[h].w);
                    total[p * PARTS + h] = fma(total[p * PARTS + h], shrink[p], sum);
                    tile[WEIGHTS + row * WEIGHT_STRIDE + h * ROW_THREADS + lane] = vec4<f16>(x[h]);
                }
            }
            if (!APART) {
                for (var p = 0u; p < PIECES; p++) {
                    let i = thread + p * THREADS;
                    lay(i / UNITS * TILE_STRIDE + i % UNITS * 2u, next_values[p]);
                }
                for (var p = 0u; p < PIECES; p++) {
                    let i = thread + p * THREADS;
                    next_values[p] = v[places[KEYS - here + i / UNITS] + i % UNITS];
                }
            }
            if (thread < KEYS) { places[here + thread] = far_place; }
            here = KEYS - here;
            workgroupBarrier();

            let weights_at = WEIGHTS + rows_at * WEIGHT_STRIDE;
            LOAD_WEIGHTS
            for (var s = 0u; s < SLICES; s++) {
                for (var t = share; t < SLICE / 16u; t += SHARING) {
                    let values_at = VALUES + s * SLICE / 4u + t * 4u;
                    SUM
                    let to = rows_at * SUM_STRIDE + t * 4u;
                    coopStoreT(sum, &products[to], SUM_STRIDE);
                }
                workgroupBarrier();
                for (var p = 0u; p < PASSES; p++) {
                    let row = p * ROWS_AT_ONCE + thread / ROW_THREADS;
                    for (var i = 0u; i < SLICE_VECTORS; i++) {
                        let at = p * VECTORS + s * SLICE_VECTORS + i;
                        if (SLICE % STRETCH == 0u || (i * ROW_THREADS + lane) * 4u < SLICE) {
                            let sum = products[row * SUM_STRIDE + i * ROW_THREADS + lane];
                            sums[at] = fma(sums[at], vec4<f32>(shrink[p]), sum);
                        }
                    }
                }
                if (s + 1u < SLICES) { workgroupBarrier(); }
            }
        }

        // The chunk joins its span; what is whole becomes a state, or the answer. The next chunk starts anew.
        let whole = (chunk + 1u) % call.per == 0u || chunk + 1u == chunks.y;
        for (var p = 0u; p < PASSES; p++) {
            let row = first + p * ROWS_AT_ONCE + thread / ROW_THREADS;
            for (var hop = 1u; hop < ROW_THREADS; hop <<= 1u) {
                for (var h = 0u; h < PARTS; h++) { total[p * PARTS + h] += subgroupShuffleXor(total[p * PARTS + h], hop); }
            }
            var weight = total[p * PARTS];
            for (var h = 1u; h < PARTS; h++) { weight += total[p * PARTS + h]; }
            let joint = join(span_highest[p], highest[p]);
            span_highest[p] = joint.highest;
            span_total[p] = fma(weight, joint.later, span_total[p] * joint.before);
            for (var i = 0u; i < VECTORS; i++) {
                let at = p * VECTORS + i;
                span_sums[at] = fma(sums[at], vec4<f32>(joint.later), span_sums[at] * joint.before);
            }
            if (whole && row < all && number < call.items) {
                let head = kv_head * call.group + row % call.group;
                let place = row / call.group * call.heads + head;
                let answered = sequence_start(sequence) * call.heads + place;
                let state = first_state(sequence, chunk) + place;
                let end = ending(span_highest[p], span_total[p], head);
                for (var i = 0u; i < VECTORS; i++) {
                    let column = (i * ROW_THREADS + lane) * 4u;
                    if (HEAD_DIM % STRETCH == 0u || column < HEAD_DIM) {
                        let sum = span_sums[p * VECTORS + i];
                        for (var j = 0u; j < 4u; j++) {
                            if (only) {
                                write_out(answered * HEAD_DIM + column + j, answer(sum[j], end));
                            } else {
                                partials[state * HEAD_DIM + column + j] = sum[j];
                            }
                        }
                    }
                }
                if (lane == 0u && only) { write_lse(answered, lse_of(end)); }
                if (lane == 0u && !only) {
                    partials[call.states * HEAD_DIM + state * 2u] = span_highest[p];
                    partials[call.states * HEAD_DIM + state * 2u + 1u] = span_total[p];
                }
            }
            highest[p] = LOWEST;
            for (var h = 0u; h < PARTS; h++) { total[p * PARTS + h] = 0.0; }
            for (var i = 0u; i < VECTORS; i++) { sums[p * VECTORS + i] = vec4<f32>(); }
            if (whole) {
                span_highest[p] = LOWEST;
                span_total[p] = 0.0;
                for (var i = 0u; i < VECTORS; i++) { span_sums[p * VECTORS + i] = vec4<f32>(); }
            }
        }
    }
}
