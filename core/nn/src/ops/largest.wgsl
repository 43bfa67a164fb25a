var<workgroup> keys: array<u32, $WORKGROUP>;
var<workgroup> places: array<u32, $WORKGROUP>;

// Integers in the order of the floats: compilers may take comparisons of floats to be free of NaN. NaN is 0, below
// everything; the two zeros are equal.
fn key(v: f32) -> u32 {
    var bits = bitcast<u32>(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0u;
    }
    if ((bits & 0x7fffffffu) == 0u) {
        bits = 0u;
    }
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

// Leaves the largest key of all invocations, and the first of its places, in element 0.
fn find_largest(local: u32) {
    workgroupBarrier();
    for (var half = $WORKGROUPu / 2u; half > 0u; half >>= 1u) {
        if (local < half) {
            let k = keys[local + half];
            let at = places[local + half];
            if (k > keys[local] || (k == keys[local] && at < places[local])) {
                keys[local] = k;
                places[local] = at;
            }
        }
        workgroupBarrier();
    }
}
