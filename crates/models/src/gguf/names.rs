//! GGUF tensor names as Hugging Face names.

/// Names outside the blocks.
const WHOLE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Names inside a block, without `blk.{i}.` and suffix.
const BLOCK: [(&str, &str); 31] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_k_b", "self_attn.k_b_proj"),
    ("attn_v_b", "self_attn.v_b_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_exps", "mlp.experts.gate_proj"),
    ("ffn_up_exps", "mlp.experts.up_proj"),
    ("ffn_down_exps", "mlp.experts.down_proj"),
    ("ffn_gate_up_exps", "mlp.experts.gate_up_proj"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    ("nextn.eh_proj", "eh_proj"),
    ("nextn.enorm", "enorm"),
    ("nextn.hnorm", "hnorm"),
];

/// The counterpart of `stem`.
fn known<'a>(table: &[(&str, &'a str)], stem: &str) -> Option<&'a str> {
    table.iter().find(|(gguf, _)| *gguf == stem).map(|(_, hugging_face)| *hugging_face)
}

/// The Hugging Face name of a tensor, `None` for one that no architecture knows.
///
/// Expert stacks get names of their own, `...mlp.experts.{gate,up,down}_proj.weight` `[E, N, K]`, and so do the fused
/// `self_attn.qkv_proj` and `mlp.experts.gate_up_proj` and the split `self_attn.{k,v}_b_proj`.
pub(crate) fn hugging_face(name: &str) -> Option<String> {
    let Some((layer, rest)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
        let (stem, suffix) = name.split_once('.')?;
        return Some(format!("{}.{suffix}", known(&WHOLE, stem)?));
    };
    let layer: u32 = layer.parse().ok()?;
    if let "exp_probs_b.bias" | "exp_probs_b" = rest {
        return Some(format!("model.layers.{layer}.mlp.gate.e_score_correction_bias"));
    }
    let (stem, suffix) = rest.rsplit_once('.')?;
    match known(&BLOCK, stem) {
        Some(hf) => Some(format!("model.layers.{layer}.{hf}.{suffix}")),
        // Multi-token-prediction tensors are not used; they belong to their layer.
        None if stem.starts_with("nextn.") => Some(format!("model.layers.{layer}.{stem}.{suffix}")),
        None => None,
    }
}
