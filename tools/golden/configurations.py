"""The table of tiny golden models: one entry per folder.

Sizes are deliberately odd (intermediate 40, head_dim 24, vocabulary 131 ...) so that a kernel's tail handling is exercised.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Golden:
    """One golden model.

    config: keyword arguments of the transformers configuration class of `model_type`.
    classic: rewrite config.json into the style of published checkpoints (rope_theta, rope_scaling, torch_dtype).
    fused_experts: keep transformers' in-memory expert tensors (gate_up_proj, down_proj) instead of one tensor per expert.
    shard: max_shard_size of save_pretrained; None writes a single file.
    small_latent: shrink the latent projections so that the latent norms' own epsilon (1e-6) is visible.
    bias_center: e_score_correction_bias is uniform around this value.
    extra: ignorable tensors to add: "mtp" (multi-token-prediction layer) or "inv_freq" (old Llama rotary buffers).
    published: further config.json fields that published checkpoints carry.
    """

    name: str
    model_type: str
    config: dict
    tokens: int = 32
    classic: bool = False
    fused_experts: bool = False
    shard: str | None = None
    small_latent: bool = False
    bias_center: float = 0.0
    extra: tuple[str, ...] = ()
    published: dict = field(default_factory=dict)


def rope(theta: float, **scaling) -> dict:
    """rope_parameters: `default` without arguments, else the given rope_type and its fields."""
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def yarn(theta: float, factor: float, original: int, **other) -> dict:
    return rope(theta, rope_type="yarn", factor=factor, original_max_position_embeddings=original, **other)


def llama3(theta: float, factor: float, original: int) -> dict:
    return rope(
        theta, rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=original,
    )


DENSE = dict(vocab_size=128, hidden_size=32, intermediate_size=56, num_hidden_layers=2, max_position_embeddings=512)
MLA = dict(
    vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=3, max_position_embeddings=512,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2,
)
PUBLISHED_V3 = dict(topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1, ep_size=1, aux_loss_alpha=0.001, seq_aux=True)
PUBLISHED_V2 = dict(scoring_func="softmax", moe_layer_freq=1, ep_size=1, aux_loss_alpha=0.001, seq_aux=True)
PUBLISHED_GLM = dict(topk_method="noaux_tc", partial_rotary_factor=1.0, num_nextn_predict_layers=1)

GLM = [
    Golden(
        "glm4_moe_lite-base", "glm4_moe_lite",
        {**MLA, "first_k_dense_replace": 1, "rope_parameters": rope(1e6), "rms_norm_eps": 1e-5, "n_shared_experts": 1},
        classic=True, shard="90KB", bias_center=7.0, extra=("mtp",), published=PUBLISHED_GLM,
    ),
    Golden(
        "glm4_moe_lite-no_q_lora_tied", "glm4_moe_lite",
        {
            **MLA, "num_hidden_layers": 2, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5,
            "q_lora_rank": None, "tie_word_embeddings": True, "first_k_dense_replace": 0, "mlp_layer_types": ["sparse"] * 2,
            "n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "rope_interleave": False,
            "attention_bias": True, "rms_norm_eps": 1e-2, "rope_parameters": rope(1e4), "vocab_size": 131,
        },
        tokens=27,
    ),
    Golden(
        "glm4_moe_lite-groups_yarn", "glm4_moe_lite",
        {
            **MLA, "first_k_dense_replace": 2, "mlp_layer_types": ["dense", "dense", "sparse"], "n_routed_experts": 16,
            "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "v_head_dim": 20, "qk_rope_head_dim": 16,
            "max_position_embeddings": 163840,
            "rope_parameters": yarn(1e4, 40.0, 4096, mscale=0.8, mscale_all_dim=1.0, beta_fast=32, beta_slow=1),
        },
        tokens=40, classic=True, small_latent=True, published=PUBLISHED_GLM,
    ),
    Golden(
        "glm4_moe_lite-fused_mixed_layers", "glm4_moe_lite",
        {
            **MLA, "mlp_layer_types": ["sparse", "dense", "sparse"], "n_group": 2, "topk_group": 1,
            "rope_parameters": rope(1e5), "attention_bias": True, "routed_scaling_factor": 2.0,
        },
        tokens=24, fused_experts=True, shard="120KB",
    ),
]

DEEPSEEK_V3 = [
    Golden(
        "deepseek_v3-base", "deepseek_v3",
        {
            **MLA, "first_k_dense_replace": 1, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
            "moe_intermediate_size": 16, "qk_rope_head_dim": 16,
            "max_position_embeddings": 163840,
            "rope_parameters": yarn(1e4, 40.0, 4096, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1),
        },
        tokens=40, classic=True, shard="80KB", extra=("mtp",), published=PUBLISHED_V3,
    ),
    Golden(
        "deepseek_v3-no_q_lora_tied", "deepseek_v3",
        {
            **MLA, "num_hidden_layers": 2, "q_lora_rank": None, "tie_word_embeddings": True, "first_k_dense_replace": 0,
            "norm_topk_prob": False, "n_shared_experts": 2, "attention_bias": True, "n_group": 2, "topk_group": 1,
            "routed_scaling_factor": 1.5, "rope_parameters": rope(1e4), "rms_norm_eps": 1e-2, "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        tokens=30,
    ),
    Golden(
        "deepseek_v3-mscale_half_split", "deepseek_v3",
        {
            **MLA, "first_k_dense_replace": 2, "rope_interleave": False, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3,
            "max_position_embeddings": 4096,
            "rope_parameters": yarn(1e3, 8.0, 512, mscale=0.707, mscale_all_dim=1.2, beta_fast=8, beta_slow=1),
            "moe_intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 6, "v_head_dim": 12,
        },
        tokens=36, small_latent=True,
    ),
    Golden(
        "deepseek_v3-fused_mscale_all_dim", "deepseek_v3",
        {
            **MLA, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 2, "attention_bias": True,
            "max_position_embeddings": 144,
            "rope_parameters": yarn(1e2, 6.0, 24, mscale_all_dim=0.9, beta_fast=3, beta_slow=1, truncate=False),
            "vocab_size": 136,
        },
        tokens=33, classic=True, fused_experts=True, published=PUBLISHED_V3,
    ),
]

DEEPSEEK_V2 = [
    Golden(
        "deepseek_v2-lite", "deepseek_v2",
        {
            **MLA, "q_lora_rank": None, "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
            "n_shared_experts": 2, "num_experts_per_tok": 3, "qk_rope_head_dim": 16, "routed_scaling_factor": 1.0,
            "max_position_embeddings": 163840,
            "rope_parameters": yarn(1e4, 40.0, 4096, mscale=0.707, mscale_all_dim=0.707, beta_fast=32, beta_slow=1),
        },
        tokens=40, classic=True, shard="100KB", published=PUBLISHED_V2,
    ),
    Golden(
        "deepseek_v2-groups", "deepseek_v2",
        {
            **MLA, "num_hidden_layers": 2, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "n_routed_experts": 20, "n_group": 5,
            "topk_group": 2, "num_experts_per_tok": 4, "n_shared_experts": 2, "routed_scaling_factor": 16.0,
            "moe_intermediate_size": 16, "rope_parameters": rope(1e4),
        },
        classic=True, small_latent=True, published=PUBLISHED_V2,
    ),
    Golden(
        "deepseek_v2-biases_tied", "deepseek_v2",
        {
            **MLA, "num_hidden_layers": 2, "first_k_dense_replace": 0, "norm_topk_prob": True, "attention_bias": True,
            "mlp_bias": True, "tie_word_embeddings": True, "n_shared_experts": 1, "routed_scaling_factor": 1.7,
            "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "rms_norm_eps": 1e-2, "rope_parameters": rope(1e3),
        },
        tokens=25,
    ),
    Golden(
        "deepseek_v2-fused_yarn_factor", "deepseek_v2",
        {
            **MLA, "first_k_dense_replace": 2, "mlp_bias": True, "topk_method": "group_limited_greedy", "n_group": 4,
            "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2, "routed_scaling_factor": 4.0,
            "max_position_embeddings": 4096,
            "rope_parameters": yarn(1e3, 8.0, 512, attention_factor=0.8, beta_fast=8, beta_slow=1),
        },
        tokens=34, fused_experts=True,
    ),
]

QWEN3 = [
    Golden(
        "qwen3-base", "qwen3",
        {
            **DENSE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
            "rope_parameters": rope(1e6), "num_hidden_layers": 3,
        },
        classic=True, shard="70KB",
    ),
    Golden(
        "qwen3-yarn_bias", "qwen3",
        {
            **DENSE, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24, "attention_bias": True,
            "max_position_embeddings": 2048,
            "rope_parameters": yarn(1e4, 4.0, 512), "intermediate_size": 40,
        },
        tokens=40, classic=True,
    ),
    Golden(
        "qwen3-sliding", "qwen3",
        {
            **DENSE, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
            "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "rope_parameters": rope(1e4),
        },
        tokens=40, classic=True,
    ),
    Golden(
        "qwen3-layer_types", "qwen3",
        {
            **DENSE, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 24,
            "use_sliding_window": True, "sliding_window": 5, "vocab_size": 131, "rms_norm_eps": 1e-2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "rope_parameters": rope(1e5),
        },
        tokens=29,
    ),
]

QWEN3_MOE = [
    Golden(
        "qwen3_moe-base", "qwen3_moe",
        {
            **DENSE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 16,
            "num_experts_per_tok": 4, "moe_intermediate_size": 16, "norm_topk_prob": True, "rope_parameters": rope(1e6),
        },
        classic=True, shard="100KB", published=dict(max_window_layers=2),
    ),
    Golden(
        "qwen3_moe-sparse_step", "qwen3_moe",
        {
            **DENSE, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24,
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": False,
            "decoder_sparse_step": 2, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-2,
            "rope_parameters": rope(1e4), "hidden_size": 40, "intermediate_size": 40,
        },
        tokens=28,
    ),
    Golden(
        "qwen3_moe-mlp_only_sliding_yarn", "qwen3_moe",
        {
            **DENSE, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16,
            "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True,
            "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": yarn(1e3, 4.0, 256, beta_fast=8, beta_slow=1),
        },
        tokens=38, classic=True,
    ),
    Golden(
        "qwen3_moe-fused", "qwen3_moe",
        {
            **DENSE, "num_attention_heads": 4, "num_key_value_heads": 1, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 24, "norm_topk_prob": True, "rope_parameters": rope(1e4), "hidden_size": 48,
        },
        tokens=24, fused_experts=True,
    ),
]

LLAMA = [
    Golden(
        "llama-base", "llama",
        {
            **DENSE, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "num_hidden_layers": 3,
            "rope_parameters": llama3(5e5, 8.0, 64), "rms_norm_eps": 1e-5,
        },
        tokens=40, classic=True, shard="100KB",
    ),
    Golden(
        "llama-biases", "llama",
        {
            **DENSE, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True,
            "rms_norm_eps": 1e-2, "rope_parameters": rope(1e4), "intermediate_size": 40, "vocab_size": 131,
        },
        tokens=26,
    ),
    Golden(
        "llama-head_dim", "llama",
        {
            **DENSE, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24, "rms_norm_eps": 1e-5,
            "rope_parameters": llama3(1e4, 32.0, 32),
        },
        tokens=40, classic=True, extra=("inv_freq",),
    ),
    Golden(
        "llama-yarn", "llama",
        {
            **DENSE, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 4096,
            "rope_parameters": yarn(1e3, 8.0, 512, mscale=1.0, mscale_all_dim=0.5, beta_fast=8, beta_slow=1),
        },
        tokens=36,
    ),
]

GOLDEN = GLM + DEEPSEEK_V3 + DEEPSEEK_V2 + QWEN3 + QWEN3_MOE + LLAMA
