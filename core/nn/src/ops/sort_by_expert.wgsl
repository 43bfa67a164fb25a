// Pairs of a token and one of its experts, sorted by expert, and cut into tiles of one expert each. One workgroup;
// within an expert pairs keep their order.

struct Params {
    pairs: u32,
    experts: u32,
    // Pairs of a tile at the most, and tiles to write: those that are not needed become empty.
    tile: u32,
    tiles: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read_write> order: array<u32>;
// Expert, first place in `order`, pairs.
@group(0) @binding(2) var<storage, read_write> tiles: array<vec4<u32>>;

var<workgroup> counts: array<u32, $EXPERTS>;
var<workgroup> firsts: array<u32, $EXPERTS>;
var<workgroup> tile_firsts: array<u32, $EXPERTS>;
var<workgroup> used: u32;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
    for (var e = local; e < p.experts; e += 256u) {
        var count = 0u;
        for (var i = 0u; i < p.pairs; i++) {
            count += u32(ids[i] == e);
        }
        counts[e] = count;
    }
    workgroupBarrier();
    if (local == 0u) {
        var first = 0u;
        var tile = 0u;
        for (var e = 0u; e < p.experts; e++) {
            firsts[e] = first;
            tile_firsts[e] = tile;
            first += counts[e];
            tile += (counts[e] + p.tile - 1u) / p.tile;
        }
        used = tile;
    }
    workgroupBarrier();
    for (var e = local; e < p.experts; e += 256u) {
        var at = firsts[e];
        for (var i = 0u; i < p.pairs && at < firsts[e] + counts[e]; i++) {
            if (ids[i] == e) {
                order[at] = i;
                at++;
            }
        }
        for (var done = 0u; done < counts[e]; done += p.tile) {
            tiles[tile_firsts[e] + done / p.tile] = vec4<u32>(e, firsts[e] + done, min(p.tile, counts[e] - done), 0u);
        }
    }
    for (var tile = used + local; tile < p.tiles; tile += 256u) {
        tiles[tile] = vec4<u32>();
    }
}
