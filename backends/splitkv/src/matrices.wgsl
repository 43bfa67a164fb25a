// Cooperative matrices of 16 by 16, as cooperative.wgsl takes and gives them. Places count vectors of four.
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sum = coop_mat16x16<f32, C>;

fn queries_tile(at: u32) -> Left { return coopLoadT<coop_mat16x16<f16, A>>(&tile[at], TILE_STRIDE); }
fn weights_tile(at: u32) -> Left { return coopLoadT<coop_mat16x16<f16, A>>(&weights[at], WEIGHT_STRIDE); }
// Keys in columns.
fn keys_tile(at: u32) -> Right { return coopLoad<coop_mat16x16<f16, B>>(&tile[at], TILE_STRIDE); }
fn values_tile(at: u32) -> Right { return coopLoadT<coop_mat16x16<f16, B>>(&tile[at], TILE_STRIDE); }
fn multiply(left: Left, right: Right, sum: Sum) -> Sum { return coopMultiplyAdd(left, right, sum); }
fn both(a: Sum, b: Sum) -> Sum { return a + b; }
fn no_sum() -> Sum { return coop_mat16x16<f32, C>(); }
fn store_scores(sum: Sum, at: u32) { coopStoreT(sum, &products[at], SCORE_STRIDE); }
fn store_sum(sum: Sum, at: u32) { coopStoreT(sum, &products[at], SUM_STRIDE); }
