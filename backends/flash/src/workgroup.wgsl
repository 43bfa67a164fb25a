// The threads of a slice see each other's scores through workgroup memory.
struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
}

fn thread_of(at: Invocation) -> u32 { return at.thread; }

fn offer_score(at: u32, value: vec4<f32>) { exchange[at] = value; }

fn slice_max(own: vec4<f32>, at: u32) -> vec4<f32> {
    var all = own;
    for (var j = 0u; j < LANES; j++) { all = max(all, exchange[(at & ~(LANES - 1u)) + j]); }
    return all;
}

fn slice_sum(own: vec4<f32>, at: u32) -> vec4<f32> {
    var all = vec4<f32>();
    for (var j = 0u; j < LANES; j++) { all += exchange[(at & ~(LANES - 1u)) + j]; }
    return all;
}
