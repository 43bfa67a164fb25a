// C = Aᵀ · B of square matrices, the side a multiple of 128: what arithmetic a device reaches without cooperative
// matrices. A workgroup computes 128 × 128 elements, a thread 8 × 8 of them: rows 4r.. and 64 + 4r.., columns alike.
// `T` is put before: f32 or f16.

alias V = vec4<T>;

const DEPTH = 8u;

var<immediate> side: u32;
@group(0) @binding(0) var<storage, read> a: array<V>;
@group(0) @binding(1) var<storage, read> b: array<V>;
@group(0) @binding(2) var<storage, read_write> c: array<V>;

var<workgroup> a_tile: array<V, 256>;
var<workgroup> b_tile: array<V, 256>;

@compute @workgroup_size(256)
fn product(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let stride = side / 4u;
    let row = thread / 16u;
    let column = thread % 16u;
    // Each thread loads one vector of each tile: 8 rows of 32 vectors.
    let load = thread / 32u * stride + thread % 32u;
    var c00 = V();
    var c01 = V();
    var c10 = V();
    var c11 = V();
    var c20 = V();
    var c21 = V();
    var c30 = V();
    var c31 = V();
    var c40 = V();
    var c41 = V();
    var c50 = V();
    var c51 = V();
    var c60 = V();
    var c61 = V();
    var c70 = V();
    var c71 = V();
    for (var k = 0u; k < side; k += DEPTH) {
        a_tile[thread] = a[k * stride + group.y * 32u + load];
        b_tile[thread] = b[k * stride + group.x * 32u + load];
        workgroupBarrier();
        for (var i = 0u; i < DEPTH; i++) {
            let a0 = a_tile[i * 32u + row];
            let a1 = a_tile[i * 32u + 16u + row];
            let b0 = b_tile[i * 32u + column];
            let b1 = b_tile[i * 32u + 16u + column];
            c00 = fma(V(a0.x), b0, c00);
            c01 = fma(V(a0.x), b1, c01);
            c10 = fma(V(a0.y), b0, c10);
            c11 = fma(V(a0.y), b1, c11);
            c20 = fma(V(a0.z), b0, c20);
            c21 = fma(V(a0.z), b1, c21);
            c30 = fma(V(a0.w), b0, c30);
            c31 = fma(V(a0.w), b1, c31);
            c40 = fma(V(a1.x), b0, c40);
            c41 = fma(V(a1.x), b1, c41);
            c50 = fma(V(a1.y), b0, c50);
            c51 = fma(V(a1.y), b1, c51);
            c60 = fma(V(a1.z), b0, c60);
            c61 = fma(V(a1.z), b1, c61);
            c70 = fma(V(a1.w), b0, c70);
            c71 = fma(V(a1.w), b1, c71);
        }
        workgroupBarrier();
    }
    let upper = (group.y * 128u + row * 4u) * stride + group.x * 32u + column;
    let lower = upper + 64u * stride;
    c[upper + 0u * stride] = c00;
    c[upper + 0u * stride + 16u] = c01;
    c[upper + 1u * stride] = c10;
    c[upper + 1u * stride + 16u] = c11;
    c[upper + 2u * stride] = c20;
    c[upper + 2u * stride + 16u] = c21;
    c[upper + 3u * stride] = c30;
    c[upper + 3u * stride + 16u] = c31;
    c[lower + 0u * stride] = c40;
    c[lower + 0u * stride + 16u] = c41;
    c[lower + 1u * stride] = c50;
    c[lower + 1u * stride + 16u] = c51;
    c[lower + 2u * stride] = c60;
    c[lower + 2u * stride + 16u] = c61;
    c[lower + 3u * stride] = c70;
    c[lower + 3u * stride + 16u] = c71;
}
