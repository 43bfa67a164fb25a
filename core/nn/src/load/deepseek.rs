//! What `config.json` of a DeepSeek-V2 model says beyond that of the Llama family: latent attention and experts.

use super::LoadError;
use super::config::{ExpertChoice, ExpertsConfig, Json, LatentConfig, RopeConfig, RopePairing, RopeScaling};
use super::gguf::excerpt;

/// The rotations of the heads' last elements, and the latent attention.
pub(super) fn latent(json: &Json, query_heads: u32, kv_heads: u32) -> Result<(RopeConfig, LatentConfig), LoadError> {
    if kv_heads != query_heads {
        let reason =
            format!("{kv_heads} differs from the {query_heads} query heads, which latent attention does not have");
        return Err(json.error("num_key_value_heads", reason));
    }
    let dim = |field: &str| match json.u32(field)? {
        0 => Err(json.error(field, "0 is out of range, at least 1")),
        // Sums and products of a few of them stay within 32 bits.
        dim if dim > 1 << 20 => Err(json.error(field, format!("{dim} is out of range, at most {}", 1 << 20))),
        dim => Ok(dim),
    };
    let query_latent_dim = if json.present("q_lora_rank") { Some(dim("q_lora_rank")?) } else { None };
    let (latent_dim, value_dim) = (dim("kv_lora_rank")?, dim("v_head_dim")?);
    let (nope_dim, rope_dim) = (dim("qk_nope_head_dim")?, dim("qk_rope_head_dim")?);
    for (field, dim) in [("kv_lora_rank", latent_dim), ("qk_rope_head_dim", rope_dim)] {
        if !dim.is_multiple_of(2) {
            return Err(json.error(field, format!("{dim} is odd")));
        }
    }
    let widest = (latent_dim + rope_dim).max(nope_dim + value_dim);
    if query_heads.checked_mul(widest).is_none() {
        return Err(json.error("num_attention_heads", format!("{query_heads} heads of {widest} elements are too wide")));
    }
    let (rope, factor) = rope(json, rope_dim)?;
    let scale = (factor / f64::from(nope_dim + rope_dim).sqrt()) as f32;
    Ok((rope, LatentConfig { query_latent_dim, latent_dim, nope_dim, rope_dim, value_dim, scale }))
}

/// The rotations, and YaRN's factor of the attention's scale.
fn rope(json: &Json, dim: u32) -> Result<(RopeConfig, f64), LoadError> {
    let parameters = json.optional_object("rope_parameters")?;
    let theta = match &parameters {
        Some(p) if p.present("rope_theta") => p.positive("rope_theta")?,
        _ if json.present("rope_theta") => json.positive("rope_theta")?,
        _ => 10_000.0,
    };
    // Released checkpoints store the rows of neighbours side by side.
    let mut rope = RopeConfig::new(theta, dim, RopePairing::Interleaved);
    let scaling = match parameters {
        Some(p) => Some(p),
        None => json.optional_object("rope_scaling")?,
    };
    let Some(s) = scaling else { return Ok((rope, 1.0)) };
    let field = if s.present("rope_type") { "rope_type" } else { "type" };
    match s.optional_str(field)? {
        None | Some("default") => Ok((rope, 1.0)),
        Some("yarn") => {
            let or = |field: &str, default: f64| if s.present(field) { s.positive(field) } else { Ok(default) };
            let factor = s.positive("factor")?;
            let (beta_fast, beta_slow) = (or("beta_fast", 32.0)?, or("beta_slow", 1.0)?);
            if beta_fast <= beta_slow {
                return Err(s.error("beta_fast", format!("{beta_fast} is not greater than beta_slow {beta_slow}")));
            }
            if theta <= 1.0 {
                return Err(json.error("rope_theta", format!("{theta} is not greater than 1, which YaRN needs")));
            }
            let original_context = s.u32("original_max_position_embeddings")?;
            if original_context == 0 {
                return Err(s.error("original_max_position_embeddings", "0 is out of range, at least 1"));
            }
            // Their quotient would scale the rotations, which no released model asks for.
            let all = s.optional_f64("mscale_all_dim")?.unwrap_or(0.0);
            let own = s.optional_f64("mscale")?.unwrap_or(1.0);
            if all != own {
                let reason = format!("{own} differs from mscale_all_dim {all}, which is not supported");
                return Err(s.error("mscale", reason));
            }
            rope.scaling = RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context };
            let scale = if factor <= 1.0 { 1.0 } else { 0.1 * all * factor.ln() + 1.0 };
            Ok((rope, scale * scale))
        }
        Some(other) => {
            Err(s
                .error(field, format!("RoPE scaling '{}' is not supported (supported: default, yarn)", excerpt(other))))
        }
    }
}

/// The experts, if there are any.
pub(super) fn experts(json: &Json) -> Result<Option<ExpertsConfig>, LoadError> {
    if !json.present("n_routed_experts") {
        return Ok(None);
    }
    let size = |field: &str| match json.u32(field)? {
        0 => Err(json.error(field, "0 is out of range, at least 1")),
        size => Ok(size),
    };
    let named = |field: &str, only: &str| match json.optional_str(field)? {
        Some(other) if other != only => {
            Err(json.error(field, format!("'{}' is not supported (supported: {only})", excerpt(other))))
        }
        _ => Ok(()),
    };
    named("scoring_func", "softmax")?;
    if let Some(every) = json.optional_u32("moe_layer_freq")?
        && every != 1
    {
        return Err(json.error("moe_layer_freq", format!("{every} is not supported (supported: 1)")));
    }
    let (experts, per_token) = (size("n_routed_experts")?, size("num_experts_per_tok")?);
    if per_token > experts {
        return Err(json.error("num_experts_per_tok", format!("{per_token} of {experts} experts cannot be chosen")));
    }
    let choice = match json.optional_str("topk_method")?.unwrap_or("greedy") {
        "greedy" => ExpertChoice::Greedy,
        "group_limited_greedy" => {
            let (groups, chosen) = (size("n_group")?, size("topk_group")?);
            if !experts.is_multiple_of(groups) {
                return Err(json.error("n_group", format!("{groups} groups do not divide {experts} experts")));
            }
            if chosen > groups || u64::from(chosen) * u64::from(experts / groups) < u64::from(per_token) {
                let reason = format!("{chosen} of {groups} groups do not hold {per_token} of {experts} experts");
                return Err(json.error("topk_group", reason));
            }
            ExpertChoice::GroupLimited { groups, chosen }
        }
        other => {
            return Err(json.error(
                "topk_method",
                format!("'{}' is not supported (supported: greedy, group_limited_greedy)", excerpt(other)),
            ));
        }
    };
    let intermediate_size = size("moe_intermediate_size")?;
    let shared_size = match json.optional_u32("n_shared_experts")?.unwrap_or(0) {
        0 => None,
        shared => Some(shared.checked_mul(intermediate_size).ok_or_else(|| {
            json.error("n_shared_experts", format!("{shared} experts of {intermediate_size} elements are too wide"))
        })?),
    };
    let normalize = json.optional_bool("norm_topk_prob")?.unwrap_or(false) && per_token > 1;
    let factor = if json.present("routed_scaling_factor") { json.positive("routed_scaling_factor")? } else { 1.0 };
    Ok(Some(ExpertsConfig {
        first_layer: json.optional_u32("first_k_dense_replace")?.unwrap_or(0),
        experts,
        per_token,
        intermediate_size,
        shared_size,
        choice,
        normalize,
        scale: if normalize { 1.0 } else { factor as f32 },
    }))
}
