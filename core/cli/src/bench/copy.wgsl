// Copies 16 KiB a workgroup, 16 bytes a load.

@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> copied: array<vec4<u32>>;

@compute @workgroup_size(256)
fn copy(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
    let first = (group.x + group.y * groups.x) * 1024u + thread;
    for (var i = 0u; i < 4u; i++) {
        copied[first + i * 256u] = source[first + i * 256u];
    }
}
