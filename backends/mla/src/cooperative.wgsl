// Attention of one chunk by cooperative matrices: 16 rows, TILES times 16 keys a step. Lines that begin with
// EACH_PRODUCT or EACH_COLUMN stand once for each number that # takes, those with EACH_TILE for each that @ takes.
//
// A subgroup has its part of the rows' elements, whose products it adds up for 16 of the step's keys, and its own
// columns of the latents, whose weighted sums stay in registers from the first step to the last. There a row cannot be
// scaled by itself, so what the weights are taken relative to, a row's *base*, is not its highest score so far but one
// that no score has passed by more than MARGIN. Where one does, the sums go through workgroup memory once: rows whose
// base stays are multiplied by 1, so a row's bits do not depend on the others.

struct Eight {
    low: vec4<f16>,
    high: vec4<f16>,
}
@group(0) @binding(1) var<storage, read> q: array<Eight>;
@group(0) @binding(2) var<storage, read> cache: array<Eight>;

const ROWS: u32 = 16u;
const STEP: u32 = TILES * 16u;
const SUBGROUPS: u32 = PARTS * TILES;
const THREADS: u32 = SUBGROUPS * WIDTH;
// Elements of 16 bits travel by eight, two vectors of four.
const UNITS: u32 = DIM / 8u;
const PIECES: u32 = STEP * UNITS / THREADS;
// From row to row in workgroup memory, in vectors of four; a little more than a row, so that rows lie in other banks.
const STRIDE: u32 = (DIM + 8u) / 4u;
const WEIGHT_STRIDE: u32 = (STEP + 8u) / 4u;
// A matrix of sums, in vectors of four.
const MATRIX: u32 = 64u;
// Threads that make weights of a row's scores: four keys each.
const ROW_THREADS: u32 = STEP / 4u;
const ROWS_AT_ONCE: u32 = min(ROWS, THREADS / ROW_THREADS);
const PASSES: u32 = (ROWS + ROWS_AT_ONCE - 1u) / ROWS_AT_ONCE;
// A weight is at most e^MARGIN, well within 16 bits.
const MARGIN: f32 = 8.0;

// The rows' queries, then the latents of a step's keys.
var<workgroup> stage: array<vec4<f16>, STEP * STRIDE>;
var<workgroup> weights: array<vec4<f16>, ROWS * WEIGHT_STRIDE>;
// A matrix of each subgroup.
var<workgroup> scratch: array<vec4<f32>, SUBGROUPS * MATRIX>;
// Where the chunk's keys lie, in units. Found at the start: on the way to each step it would be waited for.
var<workgroup> places: array<u32, CHUNK>;
var<workgroup> states: array<u32, ROWS>;
// What the rows' sums are multiplied with, and whether any is.
var<workgroup> shrink: array<f32, ROWS>;
var<workgroup> rebase: u32;

fn put(i: u32, piece: Eight) {
    let at = i / UNITS * STRIDE + i % UNITS * 2u;
    stage[at] = piece.low;
    stage[at + 1u] = piece.high;
}

// Multiplies the rows of a subgroup's matrix.
fn shrink_scratch(first: u32, invocation: u32) {
    for (var v = invocation; v < MATRIX; v += WIDTH) { scratch[first + v] *= shrink[v / 4u]; }
}

// Writes a subgroup's matrix, of the columns from `column` on, to the rows' states.
fn write_scratch(first: u32, invocation: u32, column: u32) {
    for (var v = invocation; v < MATRIX; v += WIDTH) {
        let state = states[v / 4u];
        if (state != NO_STATE && column < LATENT) {
            let at = (state * LATENT + column) / 2u + v % 4u * 2u;
            partials[at] = scratch[first + v].xy;
            partials[at + 1u] = scratch[first + v].zw;
        }
    }
}

@compute @workgroup_size(THREADS)
fn attend(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
) {
    // Threads are numbered along their subgroups: nothing else says where an invocation lies in one.
    let thread = subgroup * WIDTH + invocation;
    // A workgroup beyond the last item repeats the last one without writing.
    let number = workgroup.x + workgroup.y * workgroups.x;
    let item = call.first + min(number, call.items - 1u) * 3u;
    let sequence = extra(item);
    let first = extra(item + 1u);
    let chunk = extra(item + 2u);
    let begin = chunk * CHUNK;
    let count = min(ROWS, rows_of(sequence) - first);
    let lo = max(begin, keys_of(sequence, first / call.heads).x);
    let hi = min(begin + CHUNK, keys_of(sequence, (first + count - 1u) / call.heads).y);
    // Steps begin at the same positions whatever the window: a row that sees none of a step keeps its bits.
    let start = lo / STEP * STEP;

    for (var i = thread; i < CHUNK; i += THREADS) {
        // Keys that no row sees give way to one that some row sees: what lies there may be anything, even under a
        // weight of zero.
        places[i] = slot(sequence, clamp(begin + i, lo, hi - 1u)) * UNITS;
    }
    for (var i = thread; i < ROWS * UNITS; i += THREADS) {
        var piece = Eight();
        if (i / UNITS < count) { piece = q[(sequence_start(sequence) * call.heads + first) * UNITS + i]; }
        put(i, piece);
    }
    workgroupBarrier();

    let part = subgroup / TILES * (DIM / PARTS / 4u);
    let tile = subgroup % TILES * 16u * STRIDE;
    let own = subgroup * MATRIX;
    EACH_PRODUCT let query_# = queries_tile(part + #u * 4u);
    // The last subgroups may have columns beyond the latent: they do again what is there, and nobody takes it.
    EACH_COLUMN let column_# = (subgroup * COLUMNS + #u) * 16u;
    EACH_COLUMN let values_# = min(column_#, LATENT - 16u) / 4u;
    EACH_COLUMN var sum_# = no_sum();

    // What this thread's rows see, and their softmax.
    let lane = thread % ROW_THREADS;
    var row: array<Row, PASSES>;
    var base: array<f32, PASSES>;
    var total: array<f32, PASSES>;
    for (var p = 0u; p < PASSES; p++) {
        let r = (p * ROWS_AT_ONCE + thread / ROW_THREADS) % ROWS;
        // The last rows may be nobody's; they see nothing.
        row[p] = Row(0u, 0u, 0u, 0u, 0.0, NO_STATE);
        if (r < count) { row[p] = row_of(sequence, first + r, chunk); }
        if (number >= call.items) { row[p].state = NO_STATE; }
        if (lane == 0u) { states[r] = row[p].state; }
        base[p] = LOWEST;
    }

    // Each thread carries its pieces of the next step in registers while this one is computed with.
    var held: array<Eight, PIECES>;
    for (var p = 0u; p < PIECES; p++) {
        let i = thread + p * THREADS;
        held[p] = cache[places[start - begin + i / UNITS] + i % UNITS];
    }
    workgroupBarrier();

    for (var at = start; at < hi; at += STEP) {
        for (var p = 0u; p < PIECES; p++) { put(thread + p * THREADS, held[p]); }
        if (thread == 0u) { rebase = 0u; }
        workgroupBarrier();

        if (at + STEP < hi) {
            for (var p = 0u; p < PIECES; p++) {
                let i = thread + p * THREADS;
                held[p] = cache[places[at + STEP - begin + i / UNITS] + i % UNITS];
            }
        }
        var score = no_sum();
        EACH_PRODUCT score = multiply(query_#, keys_tile(tile + part + #u * 4u), score);
        store_sum(score, own);
        workgroupBarrier();

        for (var p = 0u; p < PASSES; p++) {
            let r = (p * ROWS_AT_ONCE + thread / ROW_THREADS) % ROWS;
            var products = vec4<f32>();
            let place = lane / 4u * MATRIX + r * 4u + lane % 4u;
            for (var part = 0u; part < PARTS; part++) { products += scratch[place + part * TILES * MATRIX]; }
            var x = products * call.scale;
            for (var i = 0u; i < 4u; i++) {
                let key = at + lane * 4u + i;
                x[i] = select(LOWEST, logit(x[i], row[p].slope, key, row[p].position), sees(row[p], sequence, key));
            }
            var top = max(max(x.x, x.y), max(x.z, x.w));
            for (var hop = 1u; hop < ROW_THREADS; hop <<= 1u) { top = max(top, subgroupShuffleXor(top, hop)); }
            let before = base[p];
            let raised = top > before + MARGIN;
            base[p] = select(before, top, raised);
            // The first score that a row sees has no sums before it.
            let factor = select(1.0, exp(before - top), raised && before > MASKED);
            let weight = vec4<f16>(select(vec4<f32>(), exp(x - base[p]), x > vec4<f32>(MASKED)));
            weights[r * WEIGHT_STRIDE + lane] = weight;
            // As the matrices have them.
            let rounded = vec4<f32>(weight);
            total[p] = fma(total[p], factor, (rounded.x + rounded.y) + (rounded.z + rounded.w));
            if (lane == 0u) {
                shrink[r] = factor;
                if (factor != 1.0) { rebase = 1u; }
            }
        }
        workgroupBarrier();

        if (rebase != 0u) {
            EACH_COLUMN store_sum(sum_#, own); workgroupBarrier(); shrink_scratch(own, invocation); \
                workgroupBarrier(); sum_# = load_sum(own); workgroupBarrier();
        }
        EACH_TILE let left_@ = weights_tile(@u * 4u);
        EACH_TILE EACH_COLUMN sum_# = multiply(left_@, values_tile(@u * 16u * STRIDE + values_#), sum_#);
        workgroupBarrier();
    }

    for (var p = 0u; p < PASSES; p++) {
        var weight = total[p];
        for (var hop = 1u; hop < ROW_THREADS; hop <<= 1u) { weight += subgroupShuffleXor(weight, hop); }
        if (lane == 0u && row[p].state != NO_STATE && thread / ROW_THREADS < ROWS) {
            partials[call.states * (LATENT / 2u) + row[p].state] = vec2<f32>(base[p], weight);
        }
    }
    EACH_COLUMN store_sum(sum_#, own); workgroupBarrier(); \
        write_scratch(own, invocation, column_#); workgroupBarrier();
}
