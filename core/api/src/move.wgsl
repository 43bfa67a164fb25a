// Moves tokens within a cache. One invocation moves one word of a token, in all moves one after the other: nobody else
// reads or writes that word, so a slot may be moved to once it was moved away from.
struct Call {
    count: u32,
    parts: u32, // of a token
    words: u32, // of a part
    page_size: u32,
}
var<immediate> call: Call;
@group(0) @binding(0) var<storage, read> moves: array<u32>; // from slot, to slot
@group(0) @binding(1) var<storage, read_write> cache: array<u32>;

fn batch_page_size() -> u32 { return call.page_size; }

@compute @workgroup_size(64)
fn move_kv(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= call.parts * call.words) { return; }
    let part = id.x / call.words;
    let word = id.x % call.words;
    for (var i = 0u; i < call.count; i++) {
        let source = cache_row(moves[2u * i], part, call.parts) * call.words + word;
        let place = cache_row(moves[2u * i + 1u], part, call.parts) * call.words + word;
        cache[place] = cache[source];
    }
}
