// What experts answered, weighted, onto the residual stream.

struct Params { rows: u32, cols: u32, per_token: u32, expert: u32 }
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> answers: array<f32>;
@group(0) @binding(1) var<storage, read> weights: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
//if ONE
@group(0) @binding(3) var<storage, read> ids: array<u32>;
//end

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (workgroup.x + workgroup.y * workgroups.x) * 128u + local;
    let row = i / p.cols;
    if (row >= p.rows) {
        return;
    }
    var sum = 0.0;
    for (var j = 0u; j < p.per_token; j++) {
        let pair = row * p.per_token + j;
//if ONE
        // Rows that another expert serves may hold anything.
        if (ids[pair] == p.expert) {
            sum = fma(weights[pair], answers[i], sum);
        }
//end
//if !ONE
        sum = fma(weights[pair], answers[pair * p.cols + i % p.cols], sum);
//end
    }
    y[i] += sum;
}
