// Each workgroup merges one state: its threads share the elements.
struct Call {
    first: u32, // state
    count: u32, // of states
    dim: u32,   // elements of a state
}
var<immediate> call: Call;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read_write> lse: array<f32>;
@group(0) @binding(2) var<storage, read> other_out: array<f32>;
@group(0) @binding(3) var<storage, read> other_lse: array<f32>;

const LN_2: f32 = 0.6931471805599453;
// The bits of -infinity: comparing bits is safe where a driver's arithmetic knows no infinities.
const NOTHING: u32 = 0xff800000u;

@compute @workgroup_size(64)
fn merge(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    // A workgroup beyond the last state reads it without writing: an early return would leave the barrier in what a
    // compiler takes for divergent flow.
    let number = workgroup.x + workgroup.y * workgroups.x;
    let state = call.first + min(number, call.count - 1u);
    let a = lse[state];
    let b = other_lse[state];
    // One thread writes what all have read.
    storageBarrier();
    workgroupBarrier();
    if (number < call.count && bitcast<u32>(b) != NOTHING) {
        let fresh = bitcast<u32>(a) == NOTHING;
        let top = max(a, b);
        let weight_a = exp(a - top);
        let weight_b = exp(b - top);
        let total = weight_a + weight_b;
        for (var i = thread; i < call.dim; i += 64u) {
            let place = state * call.dim + i;
            var merged = other_out[place];
            if (!fresh) { merged = (weight_a * out[place] + weight_b * merged) / total; }
            out[place] = merged;
        }
        if (thread == 0u) {
            var merged = b;
            if (!fresh) { merged = fma(log2(total), LN_2, top); }
            lse[state] = merged;
        }
    }
}
