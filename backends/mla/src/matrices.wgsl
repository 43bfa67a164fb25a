// Cooperative matrices of 16 by 16, as cooperative.wgsl takes and gives them. Places count vectors of four.
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sum = coop_mat16x16<f32, C>;

fn queries_tile(at: u32) -> Left { return coopLoadT<coop_mat16x16<f16, A>>(&stage[at], STRIDE); }
fn weights_tile(at: u32) -> Left { return coopLoadT<coop_mat16x16<f16, A>>(&weights[at], WEIGHT_STRIDE); }
// Keys in columns.
fn keys_tile(at: u32) -> Right { return coopLoad<coop_mat16x16<f16, B>>(&stage[at], STRIDE); }
fn values_tile(at: u32) -> Right { return coopLoadT<coop_mat16x16<f16, B>>(&stage[at], STRIDE); }
fn multiply(left: Left, right: Right, sum: Sum) -> Sum { return coopMultiplyAdd(left, right, sum); }
fn no_sum() -> Sum { return coop_mat16x16<f32, C>(); }
fn load_sum(at: u32) -> Sum { return coopLoadT<coop_mat16x16<f32, C>>(&scratch[at], 4u); }
fn store_sum(sum: Sum, at: u32) { coopStoreT(sum, &scratch[at], 4u); }
