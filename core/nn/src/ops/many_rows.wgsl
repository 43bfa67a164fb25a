// Products of many rows: a workgroup computes a tile of 64 rows × 64 weight rows (half of them gates and half ups, if
// PAIRED), 32 columns at a time, each invocation 4 × 4 of it.

// Columns 32 × rows 64, four rows to an element.
var<workgroup> x_tile: array<vec4<f32>, 512>;
var<workgroup> w_tile: array<vec4<f32>, 512>;

// Which row of the matrix stands at place i of a tile. Each invocation's four are two gates and their ups, if PAIRED.
fn weight_row(out: u32, i: u32) -> u32 {
//if PAIRED
    return min(out + (i >> 2u) * 2u + (i & 1u), p.outs - 1u) + ((i >> 1u) & 1u) * p.outs;
//end
//if !PAIRED
    return min(out + i, p.outs - 1u);
//end
}

fn x_inside(row: u32, col: u32) -> Chunk {
    if (col < p.cols) {
        return x_chunk(row, col);
    }
    return Chunk();
}

fn w_inside(row: u32, col: u32) -> Chunk {
    if (col < p.cols) {
        let w = w_chunk(row, col);
//if NORM
        let n = norm_chunk(col);
        return Chunk(w[0] * n[0], w[1] * n[1]);
//end
//if !NORM
        return w;
//end
    }
    return Chunk();
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let row0 = workgroup.y * 64u;
    let out0 = workgroup.x * $OUTSu;

    // What it loads: 8 columns of one row of either tile.
    let load_row = local >> 2u;
    let load_col = (local & 3u) * 8u;
    let x_row = min(row0 + load_row, p.rows - 1u) * p.cols;
    let w_row = weight_row(out0, load_row) * p.cols;
    let place = load_col * 16u + (load_row >> 2u);
    let part = load_row & 3u;

    // What it computes.
    let my_row = local >> 4u;
    let my_out = local & 15u;
//for i 4
    var sum_$i = vec4<f32>();
//end
//if NORM
    var square = 0.0;
//end

    var x_next = x_inside(x_row, load_col);
    var w_next = w_inside(w_row, load_col);
    for (var col = 0u; col < p.cols; col += 32u) {
//for i 4
        x_tile[place + $iu * 16u][part] = x_next[0][$i];
        x_tile[place + ($iu + 4u) * 16u][part] = x_next[1][$i];
        w_tile[place + $iu * 16u][part] = w_next[0][$i];
        w_tile[place + ($iu + 4u) * 16u][part] = w_next[1][$i];
//end
//if NORM
        square = fma8(square, x_next, x_next);
//end
        workgroupBarrier();
        // The next tile is on its way while this one is used.
        x_next = x_inside(x_row, col + 32u + load_col);
        w_next = w_inside(w_row, col + 32u + load_col);
        for (var k = 0u; k < 512u; k += 128u) {
//for j 8
            {
                let a = x_tile[k + $ju * 16u + my_row];
                let b = w_tile[k + $ju * 16u + my_out];
                sum_0 = fma(vec4<f32>(a.x), b, sum_0);
                sum_1 = fma(vec4<f32>(a.y), b, sum_1);
                sum_2 = fma(vec4<f32>(a.z), b, sum_2);
                sum_3 = fma(vec4<f32>(a.w), b, sum_3);
            }
//end
        }
        workgroupBarrier();
    }

//if NORM
    // Four invocations have loaded each row.
    x_tile[local].x = square;
    workgroupBarrier();
//end
//for i 4
    {
        let row = row0 + my_row * 4u + $iu;
//if NORM
        let at = (my_row * 4u + $iu) * 4u;
        let squares = (x_tile[at].x + x_tile[at + 1u].x) + (x_tile[at + 2u].x + x_tile[at + 3u].x);
        let scale = inverseSqrt(squares / f32(p.cols) + p.eps);
//end
//if !NORM
        let scale = 1.0;
//end
        if (row < p.rows) {
//if PAIRED
//for j 2
            if (out0 + my_out * 2u + $ju < p.outs) {
                put(row, out0 + my_out * 2u + $ju, vec2<f32>(sum_$i[$j], sum_$i[$j + 2]), scale);
            }
//end
//end
//if !PAIRED
//for j 4
            if (out0 + my_out * 4u + $ju < p.outs) {
                put(row, out0 + my_out * 4u + $ju, sum_$i[$j], scale);
            }
//end
//end
        }
    }
//end
}
