// From the states of a row's chunks to that of a span, and from a row's whole state to its answer.

const LN_2: f32 = 0.6931471805599453;

// What the states so far and one more weigh under the highest logit of both.
struct Joint {
    highest: f32,
    before: f32,
    later: f32,
}

fn join(before: f32, later: f32) -> Joint {
    let top = max(before, later);
    return Joint(top, weight_of(before, top), weight_of(later, top));
}

// Of a state in sums whose highest logit is `top`. One is exact, whatever the driver's exp(0) is; a state that has seen
// nothing weighs nothing.
fn weight_of(highest: f32, top: f32) -> f32 {
    return select(0.0, select(exp(highest - top), 1.0, highest == top), highest > MASKED);
}

struct Ending {
    base: f32,
    factor: f32,
    divisor: f32,
}

fn ending(highest: f32, total: f32, head: u32) -> Ending {
    var end = Ending(highest, 1.0, total);
    if (SINKS) {
        // One more logit, that of no key.
        end.base = max(highest, sink_of(head));
        end.factor = exp(highest - end.base);
        end.divisor = fma(total, end.factor, exp(sink_of(head) - end.base));
    }
    return end;
}

fn answer(sum: f32, end: Ending) -> f32 { return select(0.0, sum * end.factor / end.divisor, end.divisor > 0.0); }

fn lse_of(end: Ending) -> f32 { return select(call.nothing, fma(log2(end.divisor), LN_2, end.base), end.divisor > 0.0); }
