// The threads of a slice see each other through workgroup memory.
struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
}

var<workgroup> exchange: array<vec4<f32>, QUADS * THREADS>;
var<workgroup> places: array<u32, THREADS>;

fn thread_of(at: Invocation) -> u32 { return at.thread; }

fn offer(at: u32, value: vec4<f32>) { exchange[at] = value; }
fn offer_place(thread: u32, place: u32) { places[thread] = place; }

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

// What thread j of the slice offered.
fn offered(own: vec4<f32>, at: u32, j: u32) -> vec4<f32> { return exchange[(at & ~(LANES - 1u)) + j]; }
fn offered_place(own: u32, thread: u32, j: u32) -> u32 { return places[(thread & ~(LANES - 1u)) + j]; }
