// The threads of a slice are neighbours in one subgroup: maximum and sum go by shuffles. Weights still go through
// workgroup memory, which all threads of a slice read alike: that is cheaper than a shuffle for each (on an H100 by a
// third of the whole kernel at head_dim 64, and more where slices are wider).
struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) width: u32,
    @builtin(subgroup_invocation_id) lane: u32,
}

// Threads are numbered along their subgroups: nothing else says where an invocation lies in one.
fn thread_of(at: Invocation) -> u32 { return at.subgroup * at.width + at.lane; }

fn offer_score(at: u32, value: vec4<f32>) {}

fn slice_max(own: vec4<f32>, at: u32) -> vec4<f32> {
    var all = own;
    for (var step = 1u; step < LANES; step <<= 1u) { all = max(all, subgroupShuffleXor(all, step)); }
    return all;
}

fn slice_sum(own: vec4<f32>, at: u32) -> vec4<f32> {
    var all = own;
    for (var step = 1u; step < LANES; step <<= 1u) { all += subgroupShuffleXor(all, step); }
    return all;
}
