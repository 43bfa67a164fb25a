// Attention of one chunk of a sequence's keys by cooperative matrices; lib.rs tells the structure.
//
// A row's bits must not depend on the rows beside it: every row takes the same products in the same order, whatever the
// number of tiles, and eight threads serve it alone in between. Sums are spelled as fma, as in partial.wgsl.

struct Eight {
    low: vec4<f16>,
    high: vec4<f16>,
}
@group(0) @binding(1) var<storage, read> q: array<Eight>;
@group(0) @binding(2) var<storage, read> k: array<Eight>;
@group(0) @binding(3) var<storage, read> v: array<Eight>;

const ROWS: u32 = 16u * TILES;
const ROW_THREADS: u32 = 8u;
const ROWS_AT_ONCE: u32 = THREADS / ROW_THREADS;
const PASSES: u32 = ROWS / ROWS_AT_ONCE;
const UNITS: u32 = HEAD_DIM / 8u;                  // of 16 bytes, in a row of queries, keys or values
const PIECES: u32 = KEYS * UNITS / THREADS;        // units of a block that a thread carries
const VECTORS: u32 = HEAD_DIM / 32u;               // of four sums that a thread keeps for a row
const SHARING: u32 = THREADS / WIDTH / TILES;      // subgroups that share a tile of rows
const SLICES: u32 = HEAD_DIM / SLICE;
const SLICE_VECTORS: u32 = SLICE / 32u;
// From row to row in workgroup memory, in vectors of four; a little more than a row, so that rows lie in other banks.
const TILE_STRIDE: u32 = (HEAD_DIM + 8u) / 4u;
const WEIGHT_STRIDE: u32 = (KEYS + 8u) / 4u;
const SCORE_STRIDE: u32 = (KEYS + 8u) / 4u;
const SUM_STRIDE: u32 = (SLICE + 8u) / 4u;

// The rows' queries, then the block's keys, then its values.
var<workgroup> tile: array<vec4<f16>, KEYS * TILE_STRIDE>;
var<workgroup> weights: array<vec4<f16>, ROWS * WEIGHT_STRIDE>;
// The block's scores, then its sums.
var<workgroup> products: array<vec4<f32>, ROWS * max(SCORE_STRIDE, SUM_STRIDE)>;
// Where the keys of this block and of the next one lie, in units.
var<workgroup> places: array<u32, 2u * KEYS>;

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
    let item = call.first + min(number, call.items - 1u) * 3u;
    let sequence = extra(item);
    let first = extra(item + 1u);
    let chunk = extra(item + 2u);
    let context = sequence_kv_len(sequence) - sequence_queries(sequence);
    let all = sequence_queries(sequence) * call.group;

    let item_lo = keys_of(sequence, first / call.group).x;
    let item_hi = keys_of(sequence, (min(first + ROWS, all) - 1u) / call.group).y;
    let begin = chunk * CHUNK;
    let end = min(begin + CHUNK, item_hi);
    // Blocks begin at the same positions whatever the window: a row that sees none of a block keeps its bits.
    let start = begin + (max(item_lo, begin) - begin) / KEYS * KEYS;
    // Keys that no row sees give way to one that some row sees: what lies there may be anything, even under a weight of
    // zero.
    if (thread < KEYS) {
        let key = clamp(start + thread, item_lo, item_hi - 1u);
        places[thread] = cache_row(slot(sequence, key), kv_head, call.kv_heads) * UNITS;
    }
    for (var i = thread; i < ROWS * UNITS; i += THREADS) {
        let row = first + i / UNITS;
        var piece = Eight();
        if (row < all) {
            let head = kv_head * call.group + row % call.group;
            piece = q[((sequence_start(sequence) + row / call.group) * call.heads + head) * UNITS + i % UNITS];
        }
        tile[i / UNITS * TILE_STRIDE + i % UNITS * 2u] = piece.low;
        tile[i / UNITS * TILE_STRIDE + i % UNITS * 2u + 1u] = piece.high;
    }
    workgroupBarrier();

    // A subgroup multiplies one tile of rows, and shares it with SHARING - 1 others.
    let rows_at = subgroup % TILES * 16u;
    let share = subgroup / TILES;
    let queries_at = rows_at * TILE_STRIDE;
    LOAD_QUERIES

    // What this thread's rows see. The last rows may be nobody's; they see nothing.
    let lane = thread % ROW_THREADS;
    var row_first: array<u32, PASSES>;
    var row_end: array<u32, PASSES>;
    var highest: array<f32, PASSES>;
    var total: array<f32, PASSES>;
    var shrink: array<f32, PASSES>;
    var sums: array<vec4<f32>, PASSES * VECTORS>;
    for (var p = 0u; p < PASSES; p++) {
        let row = first + p * ROWS_AT_ONCE + thread / ROW_THREADS;
        row_first[p] = 0xffffffffu;
        row_end[p] = 0u;
        if (row < all) {
            let seen = keys_of(sequence, row / call.group);
            row_first[p] = seen.x;
            row_end[p] = min(seen.y, begin + CHUNK);
        }
        highest[p] = LOWEST;
    }

    // Each thread carries its units of the next keys or values in registers while what came before is computed with.
    var held: array<Eight, PIECES>;
    for (var p = 0u; p < PIECES; p++) {
        let i = thread + p * THREADS;
        held[p] = k[places[i / UNITS] + i % UNITS];
    }
    workgroupBarrier();

    var here = 0u;
    for (var base = start; base < end; base += KEYS) {
        for (var p = 0u; p < PIECES; p++) {
            let i = thread + p * THREADS;
            tile[i / UNITS * TILE_STRIDE + i % UNITS * 2u] = held[p].low;
            tile[i / UNITS * TILE_STRIDE + i % UNITS * 2u + 1u] = held[p].high;
        }
        for (var p = 0u; p < PIECES; p++) {
            let i = thread + p * THREADS;
            held[p] = v[places[here + i / UNITS] + i % UNITS];
        }
        here = KEYS - here;
        if (thread < KEYS) {
            let key = clamp(base + KEYS + thread, item_lo, item_hi - 1u);
            places[here + thread] = cache_row(slot(sequence, key), kv_head, call.kv_heads) * UNITS;
        }
        workgroupBarrier();

        for (var t = share; t < KEYS / 16u; t += SHARING) {
            let keys_at = t * 16u * TILE_STRIDE;
            var score = coop_mat16x16<f32, C>();
            SCORE
            let to = rows_at * SCORE_STRIDE + t * 4u;
            coopStoreT(score, &products[to], SCORE_STRIDE);
        }
        workgroupBarrier();

        for (var p = 0u; p < PASSES; p++) {
            let row = p * ROWS_AT_ONCE + thread / ROW_THREADS;
            // Eight keys of the row: four of each half of the block.
            var x: array<vec4<f32>, 2>;
            var top = highest[p];
            for (var h = 0u; h < 2u; h++) {
                let key = vec4<u32>(base + h * KEYS / 2u + lane * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
                x[h] = products[row * SCORE_STRIDE + h * KEYS / 8u + lane] * call.scale;
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
            var sum = 0.0;
            for (var h = 0u; h < 2u; h++) {
                x[h] = select(vec4<f32>(), exp(x[h] - top), x[h] > vec4<f32>(MASKED));
                sum += (x[h].x + x[h].y) + (x[h].z + x[h].w);
                weights[row * WEIGHT_STRIDE + h * KEYS / 8u + lane] = vec4<f16>(x[h]);
            }
            total[p] = fma(total[p], shrink[p], sum);
        }
        for (var p = 0u; p < PIECES; p++) {
            let i = thread + p * THREADS;
            tile[i / UNITS * TILE_STRIDE + i % UNITS * 2u] = held[p].low;
            tile[i / UNITS * TILE_STRIDE + i % UNITS * 2u + 1u] = held[p].high;
        }
        for (var p = 0u; p < PIECES; p++) {
            let i = thread + p * THREADS;
            held[p] = k[places[here + i / UNITS] + i % UNITS];
        }
        workgroupBarrier();

        let weights_at = rows_at * WEIGHT_STRIDE;
        LOAD_WEIGHTS
        for (var s = 0u; s < SLICES; s++) {
            for (var t = share; t < SLICE / 16u; t += SHARING) {
                let values_at = s * SLICE / 4u + t * 4u;
                var sum = coop_mat16x16<f32, C>();
                SUM
                let to = rows_at * SUM_STRIDE + t * 4u;
                coopStoreT(sum, &products[to], SUM_STRIDE);
            }
            workgroupBarrier();
            for (var p = 0u; p < PASSES; p++) {
                let row = p * ROWS_AT_ONCE + thread / ROW_THREADS;
                for (var i = 0u; i < SLICE_VECTORS; i++) {
                    let at = p * VECTORS + s * SLICE_VECTORS + i;
                    sums[at] = fma(sums[at], vec4<f32>(shrink[p]), products[row * SUM_STRIDE + i * 8u + lane]);
                }
            }
            if (s + 1u < SLICES) { workgroupBarrier(); }
        }
    }

    let only = is_only_chunk(sequence);
    for (var p = 0u; p < PASSES; p++) {
        let row = first + p * ROWS_AT_ONCE + thread / ROW_THREADS;
        var weight = total[p];
        for (var hop = 1u; hop < ROW_THREADS; hop <<= 1u) { weight += subgroupShuffleXor(weight, hop); }
        if (row < all && number < call.items) {
            let head = kv_head * call.group + row % call.group;
            let place = row / call.group * call.heads + head;
            if (only) {
                let end = ending(highest[p], weight, head);
                let answered = sequence_start(sequence) * call.heads + place;
                for (var i = 0u; i < VECTORS * 4u; i++) {
                    write_out(answered * HEAD_DIM + i / 4u * 32u + lane * 4u + i % 4u, answer(sums[p * VECTORS + i / 4u][i % 4u], end));
                }
                if (lane == 0u) { write_lse(answered, lse_of(end)); }
            } else {
                let state = first_state(sequence, chunk) + place;
                for (var i = 0u; i < VECTORS * 4u; i++) {
                    partials[state * HEAD_DIM + i / 4u * 32u + lane * 4u + i % 4u] = sums[p * VECTORS + i / 4u][i % 4u];
                }
                if (lane == 0u) {
                    partials[call.states * HEAD_DIM + state * 2u] = highest[p];
                    partials[call.states * HEAD_DIM + state * 2u + 1u] = weight;
                }
            }
        }
    }
}
