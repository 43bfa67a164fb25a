// Products of few rows. A group of $LANES lanes splits the columns among itself and computes $OUTS outputs (pairs of a
// gate and an up output, if PAIRED) for $ROWS rows; nothing is shared between groups. Each weight is read once.
//
// The order in which a row's sum is formed depends on the number of columns and lanes alone, never on $ROWS: chunks
// c, c + lanes, … in one lane, then the halving of `reduce`. That gives a row the same bits in every variant.
//
// HEADS and EXPERTS: the matrix is one of several. With HEADS `workgroup.z` says which, and rows of x and y are made of
// `p.count` parts, one for each matrix. With EXPERTS the row tiles lie in memory: a matrix and some of its pairs of a row
// of x, which `p.count` pairs share, and a row of y.
//
// Norm: the weights are multiplied with the norm's, and the row's scale is applied to the finished sum.

// Which row of the matrix is the i-th that this group reads.
fn weight_row(out: u32, i: u32) -> u32 {
//if PAIRED
    return min(out + (i >> 1u), p.outs - 1u) + (i & 1u) * p.outs;
//end
//if !PAIRED
    return min(out + i, p.outs - 1u);
//end
}

// Chunks beyond the last repeat it, and count for nothing.
fn x_inside(row: u32, col: u32, inside: bool) -> Chunk {
    let chunk = x_chunk(row, col);
    return Chunk(select(vec4<f32>(), chunk[0], inside), select(vec4<f32>(), chunk[1], inside));
}

@compute @workgroup_size($WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
//if SUBGROUPS
    @builtin(subgroup_id) group: u32,
    @builtin(subgroup_invocation_id) lane: u32,
//end
//if !SUBGROUPS
    @builtin(local_invocation_index) local: u32,
//end
) {
//if !SUBGROUPS
    let group = local / $LANESu;
    let lane = local % $LANESu;
//end
    let tile = workgroup.x + workgroup.y * workgroups.x;
//if EXPERTS
    let work = tiles[tile % p.row_tiles];
    if (work.z == 0u) {
        return;
    }
    let matrix = work.x;
//end
//if HEADS
    let matrix = workgroup.z;
//end
//if !EXPERTS
    let row0 = (tile % p.row_tiles) * $ROWSu;
//end
    let out0 = ((tile / p.row_tiles) * $GROUPSu + group) * $OUTSu;

    // Rows and outputs beyond the last repeat it and are not stored.
//for r ROWS
//if SINGLE
    let x_row_$r = min(row0 + $ru, p.rows - 1u) * p.cols;
//end
//if HEADS
    let x_row_$r = (min(row0 + $ru, p.rows - 1u) * p.count + matrix) * p.x_stride;
//end
//if EXPERTS
    let x_row_$r = order[work.y + min($ru, work.z - 1u)] / p.count * p.x_stride;
//end
//for i WEIGHTS
    var sum_$r_$i = 0.0;
//end
//if NORM
    var square_$r = 0.0;
//end
//end
//for i WEIGHTS
//if SINGLE
    let w_row_$i = weight_row(out0, $iu) * p.cols;
//end
//if !SINGLE
    let w_row_$i = p.base + (matrix * p.outs * $PARTSu + weight_row(out0, $iu)) * p.cols;
//end
//end

    let last = (p.cols - 1u) / 8u;
    for (var c = lane; c <= last; c += $UNROLLu * $LANESu) {
        // All loads of weights first: they come from far away, and all at once.
//for u UNROLL
        let col_$u = min(c + $uu * $LANESu, last) * 8u;
        let inside_$u = c + $uu * $LANESu <= last;
//for i WEIGHTS
        let held_$u_$i = w_chunk(w_row_$i, col_$u);
//end
//end
//for u UNROLL
//if NORM
        let norm_$u = norm_chunk(col_$u);
//end
//for i WEIGHTS
//if NORM
        let w_$u_$i = Chunk(held_$u_$i[0] * norm_$u[0], held_$u_$i[1] * norm_$u[1]);
//end
//if !NORM
        let w_$u_$i = held_$u_$i;
//end
//end
//for r ROWS
        let x_$u_$r = x_inside(x_row_$r, col_$u, inside_$u);
//if NORM
        square_$r = fma8(square_$r, x_$u_$r, x_$u_$r);
//end
//for i WEIGHTS
        sum_$r_$i = fma8(sum_$r_$i, w_$u_$i, x_$u_$r);
//end
//end
//end
    }

//reduce
    // After the halving, neighbouring lanes hold neighbouring outputs.
    let stores = (lane & $IDLEu) == 0u;
//for j STORES
    {
        let index = (lane >> $SHIFTu) * $STORESu + $ju;
        let out = out0 + index % $OUTSu;
//if SINGLE
        let row = row0 + index / $OUTSu;
        if (stores && row < p.rows && out < p.outs) {
            put(row, out, total_$j, scale_$j);
        }
//end
//if HEADS
        let row = row0 + index / $OUTSu;
        if (stores && row < p.rows && out < p.outs) {
            put(row * p.count + matrix, out, total_$j, scale_$j);
        }
//end
//if EXPERTS
        let place = index / $OUTSu;
        if (stores && place < work.z && out < p.outs) {
            put(order[work.y + place], out, total_$j, scale_$j);
        }
//end
    }
//end
}
