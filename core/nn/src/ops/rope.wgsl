// One head of one row by workgroup: norm, rotate, and to the queries or back in place.

struct Params {
    rows: u32,
    stride: u32,
    offset: u32,
    query_heads: u32,
    heads: u32,
    positions: u32,
    // Elements that are rotated, and the first of them.
    dim: u32,
    first: u32,
    q_eps: f32,
    k_eps: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read_write> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> table: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
//if QUERIES
//if WIDE
@group(0) @binding(3) var<storage, read_write> q_out: array<f32>;
//end
//if !WIDE
@group(0) @binding(3) var<storage, read_write> q_out: array<u32>;
//end
//end
//if Q_NORM
@group(0) @binding(4) var<storage, read> q_norm: array<f32>;
//end
//if K_NORM
@group(0) @binding($K_NORM_AT) var<storage, read> k_norm: array<f32>;
//end

var<workgroup> head: array<f32, $HEAD_DIM>;
//if NORM
var<workgroup> squares: array<f32, 64>;
//end

fn value(i: u32, query: bool, scale: f32) -> f32 {
//if Q_NORM
    if (query) {
        return head[i] * scale * q_norm[i];
    }
//end
//if K_NORM
    if (!query) {
        return head[i] * scale * k_norm[i];
    }
//end
    return head[i];
}

fn rotated(i: u32, row: u32, query: bool, scale: f32) -> f32 {
    let own = value(i, query, scale);
    // Below the first it wraps round to a large number.
    let at = i - p.first;
    if (at >= p.dim) {
        return own;
    }
    let pairs = p.dim >> 1u;
//if INTERLEAVED
    let pair = at >> 1u;
    let other = i ^ 1u;
    let first = (at & 1u) == 0u;
//end
//if !INTERLEAVED
    let first = at < pairs;
    let pair = select(at - pairs, at, first);
    let other = select(i - pairs, i + pairs, first);
//end
    let turn = table[min(positions[row], p.positions - 1u) * pairs + pair];
    return own * turn.x + value(other, query, scale) * select(turn.y, -turn.y, first);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let id = workgroup.x + workgroup.y * workgroups.x;
    let row = id / p.heads;
    let place = id % p.heads;
    if (row >= p.rows) {
        return;
    }
    let query = place < p.query_heads;
    let base = row * p.stride + p.offset + place * $HEAD_DIMu;
    var square = 0.0;
    for (var i = local; i < $HEAD_DIMu; i += 64u) {
        let v = qkv[base + i];
        head[i] = v;
        square = fma(v, v, square);
    }
    var scale = 1.0;
//if NORM
    squares[local] = square;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            squares[local] += squares[local + half];
        }
        workgroupBarrier();
    }
    scale = inverseSqrt(squares[0] / $HEAD_DIM.0 + select(p.k_eps, p.q_eps, query));
//end
//if !NORM
    workgroupBarrier();
//end
    for (var pair = local; pair < $HEAD_DIMu / 2u; pair += 64u) {
        let i = pair * 2u;
        let both = vec2<f32>(rotated(i, row, query, scale), rotated(i + 1u, row, query, scale));
//if QUERIES
        if (query) {
            let at = (row * p.query_heads + place) * $HEAD_DIMu + i;
//if WIDE
            q_out[at] = both.x;
            q_out[at + 1u] = both.y;
//end
//if !WIDE
            q_out[at >> 1u] = $NARROW;
//end
            continue;
        }
//end
        qkv[base + i] = both.x;
        qkv[base + i + 1u] = both.y;
    }
}
