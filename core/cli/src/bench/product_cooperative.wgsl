// C = Aᵀ · B of square f16 matrices, summed in f32, the side a multiple of 128, by cooperative matrices of 16 × 16. Each
// of a workgroup's 8 subgroups of 32 computes 32 × 64 of its 128 × 128 elements.

enable f16;
enable wgpu_cooperative_matrix;

const DEPTH = 32u;
// Vectors of a tile's row: 128 elements, and 8 more that spread rows over the banks.
const ROW = 34u;

var<immediate> side: u32;
@group(0) @binding(0) var<storage, read> a: array<vec4<f16>>;
@group(0) @binding(1) var<storage, read> b: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read_write> c: array<f32>;

var<workgroup> a_tile: array<vec4<f16>, 1088>;
var<workgroup> b_tile: array<vec4<f16>, 1088>;

@compute @workgroup_size(256)
fn product(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let stride = side / 4u;
    let subgroup = thread / 32u;
    let row = subgroup / 2u * 32u;
    let column = subgroup % 2u * 64u;
    var c00 = coop_mat16x16<f32, C>();
    var c01 = coop_mat16x16<f32, C>();
    var c02 = coop_mat16x16<f32, C>();
    var c03 = coop_mat16x16<f32, C>();
    var c10 = coop_mat16x16<f32, C>();
    var c11 = coop_mat16x16<f32, C>();
    var c12 = coop_mat16x16<f32, C>();
    var c13 = coop_mat16x16<f32, C>();
    for (var k = 0u; k < side; k += DEPTH) {
        for (var i = 0u; i < 4u; i++) {
            let depth = i * 8u + thread / 32u;
            let vector = thread % 32u;
            a_tile[depth * ROW + vector] = a[(k + depth) * stride + group.y * 32u + vector];
            b_tile[depth * ROW + vector] = b[(k + depth) * stride + group.x * 32u + vector];
        }
        workgroupBarrier();
        for (var depth = 0u; depth < DEPTH; depth += 16u) {
            let left = depth * ROW + row / 4u;
            let right = depth * ROW + column / 4u;
            // Rows of a tile are the product's inner dimension: columns of the left factor, rows of the right one.
            let a0 = coopLoad<coop_mat16x16<f16, A>>(&a_tile[left], ROW);
            let a1 = coopLoad<coop_mat16x16<f16, A>>(&a_tile[left + 4u], ROW);
            let b0 = coopLoadT<coop_mat16x16<f16, B>>(&b_tile[right], ROW);
            let b1 = coopLoadT<coop_mat16x16<f16, B>>(&b_tile[right + 4u], ROW);
            let b2 = coopLoadT<coop_mat16x16<f16, B>>(&b_tile[right + 8u], ROW);
            let b3 = coopLoadT<coop_mat16x16<f16, B>>(&b_tile[right + 12u], ROW);
            c00 = coopMultiplyAdd(a0, b0, c00);
            c01 = coopMultiplyAdd(a0, b1, c01);
            c02 = coopMultiplyAdd(a0, b2, c02);
            c03 = coopMultiplyAdd(a0, b3, c03);
            c10 = coopMultiplyAdd(a1, b0, c10);
            c11 = coopMultiplyAdd(a1, b1, c11);
            c12 = coopMultiplyAdd(a1, b2, c12);
            c13 = coopMultiplyAdd(a1, b3, c13);
        }
        workgroupBarrier();
    }
    // naga's SPIR-V writer wants both names bound before a store.
    let width = side;
    let at00 = (group.y * 128u + row) * side + group.x * 128u + column;
    let at01 = at00 + 16u;
    let at02 = at00 + 32u;
    let at03 = at00 + 48u;
    let at10 = at00 + 16u * side;
    let at11 = at10 + 16u;
    let at12 = at10 + 32u;
    let at13 = at10 + 48u;
    coopStoreT(c00, &c[at00], width);
    coopStoreT(c01, &c[at01], width);
    coopStoreT(c02, &c[at02], width);
    coopStoreT(c03, &c[at03], width);
    coopStoreT(c10, &c[at10], width);
    coopStoreT(c11, &c[at11], width);
    coopStoreT(c12, &c[at12], width);
    coopStoreT(c13, &c[at13], width);
}
