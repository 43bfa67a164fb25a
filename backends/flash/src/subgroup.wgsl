// The threads of a slice are neighbours in one subgroup.
struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) width: u32,
    @builtin(subgroup_invocation_id) lane: u32,
}

var<private> first_lane: u32;

// Threads are numbered along their subgroups: nothing else says where an invocation lies in one.
fn thread_of(at: Invocation) -> u32 {
    first_lane = at.lane & ~(LANES - 1u);
    return at.subgroup * at.width + at.lane;
}

fn offer(at: u32, value: vec4<f32>) {}
fn offer_place(thread: u32, place: u32) {}

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

// What thread j of the slice offered.
fn offered(own: vec4<f32>, at: u32, j: u32) -> vec4<f32> { return subgroupShuffle(own, first_lane + j); }
fn offered_place(own: u32, thread: u32, j: u32) -> u32 { return subgroupShuffle(own, first_lane + j); }
