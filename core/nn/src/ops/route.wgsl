// Experts of a token: softmax over the scores, then the best of them, one after the other. One row by workgroup.

struct Params {
    rows: u32,
    experts: u32,
    per_token: u32,
    // Groups of experts, and how many of them a token may choose from.
    groups: u32,
    chosen: u32,
    normalize: u32,
    scale: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> scores: array<f32>;
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> weights: array<f32>;

// Probabilities; less than 0 where an expert cannot be chosen any more.
var<workgroup> share: array<f32, $EXPERTS>;
var<workgroup> values: array<f32, 64>;
var<workgroup> places: array<u32, 64>;
//if GROUPS
// The best of each group; -2 where the group is chosen.
var<workgroup> group_best: array<f32, $GROUPS>;
//end

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = workgroup.x + workgroup.y * workgroups.x;
    if (row >= p.rows) {
        return;
    }
    var most = -3.4028234663852886e38;
    for (var e = local; e < p.experts; e += 64u) {
        most = max(most, scores[row * p.experts + e]);
    }
    values[local] = most;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            values[local] = max(values[local], values[local + half]);
        }
        workgroupBarrier();
    }
    most = values[0];
    workgroupBarrier();
    var sum = 0.0;
    for (var e = local; e < p.experts; e += 64u) {
        let value = exp(scores[row * p.experts + e] - most);
        share[e] = value;
        sum += value;
    }
    values[local] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half >>= 1u) {
        if (local < half) {
            values[local] += values[local + half];
        }
        workgroupBarrier();
    }
    sum = values[0];
    for (var e = local; e < p.experts; e += 64u) {
        share[e] /= sum;
    }
    workgroupBarrier();
//if GROUPS
    // A few groups of a few experts: one invocation looks at them.
    if (local == 0u) {
        let size = p.experts / p.groups;
        for (var g = 0u; g < p.groups; g++) {
            var best = -1.0;
            for (var e = g * size; e < (g + 1u) * size; e++) {
                best = max(best, share[e]);
            }
            group_best[g] = best;
        }
        for (var c = 0u; c < p.chosen; c++) {
            var best = -1.5;
            var place = 0u;
            for (var g = 0u; g < p.groups; g++) {
                if (group_best[g] > best) {
                    best = group_best[g];
                    place = g;
                }
            }
            group_best[place] = -2.0;
        }
    }
    workgroupBarrier();
    for (var e = local; e < p.experts; e += 64u) {
        if (group_best[e / (p.experts / p.groups)] != -2.0) {
            share[e] = -1.0;
        }
    }
    workgroupBarrier();
//end
    var total = 0.0;
    for (var j = 0u; j < p.per_token; j++) {
        var best = -0.5;
        var place = 0xffffffffu;
        for (var e = local; e < p.experts; e += 64u) {
            if (share[e] > best) {
                best = share[e];
                place = e;
            }
        }
        values[local] = best;
        places[local] = place;
        workgroupBarrier();
        for (var half = 32u; half > 0u; half >>= 1u) {
            if (local < half) {
                let other = values[local + half];
                let behind = places[local + half];
                if (other > values[local] || (other == values[local] && behind < places[local])) {
                    values[local] = other;
                    places[local] = behind;
                }
            }
            workgroupBarrier();
        }
        if (local == 0u) {
            // Where the scores are NaN nobody is best; the weight then says so.
            let expert = min(places[0], p.experts - 1u);
            let weight = select(values[0], sum, places[0] == 0xffffffffu);
            ids[row * p.per_token + j] = expert;
            weights[row * p.per_token + j] = weight * select(p.scale, 1.0, p.normalize != 0u);
            total += weight;
            share[expert] = -1.0;
        }
        workgroupBarrier();
    }
    if (local == 0u && p.normalize != 0u) {
        for (var j = 0u; j < p.per_token; j++) {
            weights[row * p.per_token + j] /= total + 1e-20;
        }
    }
}
