// An element of a query head whose first elements and the rest lie apart.
fn of_parts(at: u32, i: u32) -> f32 {
    if (i < p.front_dim) {
        return q_front[p.front_offset + at * p.front_stride + i];
    }
    return q_back[p.back_offset + at * p.back_stride + i - p.front_dim];
}
