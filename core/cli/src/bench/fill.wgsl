// Random numbers by index, as `value` on the host makes them.

struct Params { words: u32, format: u32, seed: u32, unused: u32 }

var<immediate> params: Params;
@group(0) @binding(0) var<storage, read_write> data: array<u32>;

fn value(index: u32) -> f32 {
    let state = (index + params.seed * 0x9e3779b9u) * 747796405u + 2891336453u;
    let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
    let bits = (word >> 22u) ^ word;
    return f32(i32(bits >> 24u) * 2 - 255) / 128.0;
}

@compute @workgroup_size(256)
fn fill(@builtin(global_invocation_id) thread: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var word = thread.x; word < params.words; word += groups.x * 256u) {
        switch params.format {
            case 0u: { data[word] = bitcast<u32>(value(word)); }
            case 1u: { data[word] = pack2x16float(vec2<f32>(value(word * 2u), value(word * 2u + 1u))); }
            case 2u: {
                let low = bitcast<u32>(value(word * 2u)) >> 16u;
                data[word] = low | (bitcast<u32>(value(word * 2u + 1u)) & 0xffff0000u);
            }
            default: { data[word] = 0x7fc00000u; }
        }
    }
}
