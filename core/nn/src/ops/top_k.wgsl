// The largest elements of a row with the logarithms of their shares in the softmax; one row by workgroup.

struct Params { rows: u32, cols: u32, k: u32 }
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> logs: array<f32>;

var<workgroup> sums: array<f32, $WORKGROUP>;

@compute @workgroup_size($WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = workgroup.x + workgroup.y * workgroups.x;
    if (row >= p.rows) {
        return;
    }
    let base = row * p.cols;
    // Each round finds the next in the order of falling keys, then rising places.
    var last_key = 0xffffffffu;
    var last_place = 0u;
    var largest = 0.0;
    var total = 0.0;
    for (var round = 0u; round < p.k; round++) {
        var best = 0u;
        var place = 0xffffffffu;
        for (var i = local; i < p.cols; i += $WORKGROUPu) {
            let k = key(x[base + i]);
            let follows = k < last_key || (k == last_key && i > last_place);
            if (follows && k > best) {
                best = k;
                place = i;
            }
        }
        keys[local] = best;
        places[local] = place;
        find_largest(local);
        last_key = keys[0];
        last_place = places[0];
        workgroupBarrier();
        let found = last_key != 0u;
        let value = x[base + select(0u, last_place, found)];
        if (round == 0u) {
            largest = value;
            var sum = 0.0;
            for (var i = local; i < p.cols; i += $WORKGROUPu) {
                let v = x[base + i];
                if (key(v) != 0u) {
                    sum += exp(v - largest);
                }
            }
            sums[local] = sum;
            workgroupBarrier();
            for (var half = $WORKGROUPu / 2u; half > 0u; half >>= 1u) {
                if (local < half) {
                    sums[local] += sums[local + half];
                }
                workgroupBarrier();
            }
            total = log(sums[0]);
        }
        if (local == 0u) {
            ids[row * p.k + round] = select(0xffffffffu, last_place, found);
            // −∞ has no literal: it is made of a word that no compiler folds.
            let infinity = bitcast<f32>(0xff800000u | (p.rows & 0u));
            logs[row * p.k + round] = select(infinity, value - largest - total, found);
        }
    }
}
