// Norm and rotation of one head by a workgroup of 64, in workgroup memory. What is normed and rotated, and by what, is
// in the bindings and the immediates `p` of the kernel that this stands before.
var<workgroup> head: array<f32, HEAD_ROOM>;
var<workgroup> squares: array<f32, 64>;

// How many elements of a head are normed, the first ones.
fn normed_dim(query: bool) -> u32 {
    return select(p.k_normed, p.q_normed, query);
}

// What the norm multiplies by: one over the root of the mean square. `square` is the sum of squares of those elements
// to be normed that this invocation put into `head`, which is complete afterwards.
fn head_scale(local: u32, query: bool, square: f32, eps: f32) -> f32 {
    if (!NORM) {
        workgroupBarrier();
        return 1.0;
    }
    squares[local] = square;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            squares[local] += squares[local + half];
        }
        workgroupBarrier();
    }
    return inverseSqrt(squares[0] / f32(normed_dim(query)) + eps);
}

// Norms and rotates in place; a barrier has to follow. Each invocation has pairs to itself, rotated ones first.
fn turn_head(local: u32, row: u32, query: bool, scale: f32) {
    let pairs = p.dim >> 1u;
    let turns = min(positions[row], p.positions - 1u) * pairs;
    for (var pair = local; pair < HEAD_DIM / 2u; pair += 64u) {
        if (pair < pairs) {
            let i = p.first + select(pair, pair * 2u, INTERLEAVED);
            let j = i + select(pairs, 1u, INTERLEAVED);
            let turn = table[turns + pair];
            let left = normed(i, query, scale);
            let right = normed(j, query, scale);
            head[i] = left * turn.x - right * turn.y;
            head[j] = right * turn.x + left * turn.y;
        } else if (NORM) {
            let rest = (pair - pairs) * 2u;
            let i = rest + select(0u, p.dim, rest >= p.first);
            head[i] = normed(i, query, scale);
            head[i + 1u] = normed(i + 1u, query, scale);
        }
    }
}
