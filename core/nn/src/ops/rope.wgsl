// One head of one row by workgroup: norm, rotate (`rotary_wgsl`), and to the queries or back in place.

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
    // Elements of a head that are normed.
    q_normed: u32,
    k_normed: u32,
    q_eps: f32,
    k_eps: f32,
    front_offset: u32,
    front_stride: u32,
    front_dim: u32,
    back_offset: u32,
    back_stride: u32,
    back_dim: u32,
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
//if PARTS
@group(0) @binding(4) var<storage, read> q_front: array<f32>;
@group(0) @binding(5) var<storage, read> q_back: array<f32>;
//end
//if Q_NORM
@group(0) @binding($Q_NORM_AT) var<storage, read> q_norm: array<f32>;
//end
//if K_NORM
@group(0) @binding($K_NORM_AT) var<storage, read> k_norm: array<f32>;
//end

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
//if PARTS
    let base = row * p.stride + p.offset + (place - p.query_heads) * HEAD_DIM;
//end
//if !PARTS
    let base = row * p.stride + p.offset + place * HEAD_DIM;
//end
    var square = 0.0;
    for (var i = local; i < HEAD_DIM; i += 64u) {
//if PARTS
        var v: f32;
        if (query) {
            v = of_parts(row * p.query_heads + place, i);
        } else {
            v = qkv[base + i];
        }
//end
//if !PARTS
        let v = qkv[base + i];
//end
        head[i] = v;
        if (i < normed_dim(query)) {
            square = fma(v, v, square);
        }
    }
    let scale = head_scale(local, query, square, select(p.k_eps, p.q_eps, query));
    turn_head(local, row, query, scale);
    workgroupBarrier();
    for (var pair = local; pair < HEAD_DIM / 2u; pair += 64u) {
        let i = pair * 2u;
        let both = vec2<f32>(head[i], head[i + 1u]);
//if QUERIES
        if (query) {
            let at = (row * p.query_heads + place) * HEAD_DIM + i;
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
