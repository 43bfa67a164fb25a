// The place of a row's largest element; one row by workgroup.

// Rows from `first` on, up to `end`.
struct Params { first: u32, end: u32, cols: u32 }
var<immediate> p: Params;

//if ALIGNED
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
//end
//if !ALIGNED
@group(0) @binding(0) var<storage, read> x: array<f32>;
//end
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;

@compute @workgroup_size($WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = p.first + workgroup.x + workgroup.y * workgroups.x;
    if (row >= p.end) {
        return;
    }
    // An invocation meets its elements in rising order, so the first of equals stays.
    var best = 0u;
    var place = 0xffffffffu;
//if ALIGNED
    let count = p.cols >> 2u;
    let base = row * count;
    for (var i = local; i < count; i += 4u * $WORKGROUPu) {
//for u 4
        let v_$u = x[base + min(i + $uu * $WORKGROUPu, count - 1u)];
//end
//for u 4
//for j 4
        {
            let k = key(v_$u[$j]);
            if (k > best) {
                best = k;
                place = min(i + $uu * $WORKGROUPu, count - 1u) * 4u + $ju;
            }
        }
//end
//end
    }
//end
//if !ALIGNED
    let base = row * p.cols;
    for (var i = local; i < p.cols; i += $WORKGROUPu) {
        let k = key(x[base + i]);
        if (k > best) {
            best = k;
            place = i;
        }
    }
//end
    keys[local] = best;
    places[local] = place;
    find_largest(local);
    if (local == 0u) {
        ids[row] = select(places[0], 0xffffffffu, keys[0] == 0u);
    }
}
