"""The tiny GGUF models: metadata, tensors and random weights."""

from dataclasses import dataclass, field

import numpy as np
from gguf import GGMLQuantizationType as Type

from gguf_vocabularies import byte_level, sentence_piece

TEMPLATE = (
    "{% for message in messages %}{{ bos_token if loop.first else '' }}[{{ message['role'] }}] {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass
class Model:
    """One file. `keys` are below the architecture's prefix."""

    name: str
    arch: str
    vocabulary: dict
    keys: dict
    hidden: int = 32
    layers: int = 2
    tied: bool = False
    types: dict = field(default_factory=dict)
    # Factors of NVFP4 tensors.
    scales: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)

    def metadata(self) -> dict:
        keys = {
            "context_length": 256, "embedding_length": self.hidden, "block_count": self.layers,
            "attention.layer_norm_rms_epsilon": 1e-6,
        } | self.keys
        return {f"{self.arch}.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": TEMPLATE}

    def vocabulary_size(self) -> int:
        return len(self.vocabulary["tokenizer.ggml.tokens"])

    def tensors(self):
        hidden, vocabulary = self.hidden, self.vocabulary_size()
        yield "token_embd.weight", (vocabulary, hidden)
        yield "output_norm.weight", (hidden,)
        if not self.tied:
            yield "output.weight", (vocabulary, hidden)
        for name, shape in self.extra.items():
            yield name, shape
        for i in range(self.layers):
            block = f"blk.{i}."
            yield block + "attn_norm.weight", (hidden,)
            yield block + "ffn_norm.weight", (hidden,)
            attention = self.latent_attention() if self.arch == "deepseek2" else self.attention()
            for name, shape in (attention | self.feed_forward(i)).items():
                yield block + name, shape

    def attention(self) -> dict:
        heads, kv = self.keys["attention.head_count"], self.keys["attention.head_count_kv"]
        head, hidden = self.keys["attention.key_length"], self.hidden
        tensors = {
            "attn_q.weight": (heads * head, hidden), "attn_k.weight": (kv * head, hidden),
            "attn_v.weight": (kv * head, hidden), "attn_output.weight": (hidden, heads * head),
        }
        if self.arch != "llama":
            tensors |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
        return tensors

    def latent_attention(self) -> dict:
        keys, hidden = self.keys, self.hidden
        heads, rank, rope = keys["attention.head_count"], keys["attention.kv_lora_rank"], keys["rope.dimension_count"]
        split = "attention.key_length_mla" in keys
        key = keys["attention.key_length_mla" if split else "attention.key_length"]
        value = keys["attention.value_length_mla" if split else "attention.value_length"]
        q_rank = keys["attention.q_lora_rank"]
        tensors = {
            "attn_q_a.weight": (q_rank, hidden), "attn_q_a_norm.weight": (q_rank,),
            "attn_q_b.weight": (heads * key, q_rank), "attn_kv_a_mqa.weight": (rank + rope, hidden),
            "attn_kv_a_norm.weight": (rank,), "attn_output.weight": (hidden, heads * value),
        }
        if split:
            return tensors | {"attn_k_b.weight": (heads, rank, key - rope), "attn_v_b.weight": (heads, value, rank)}
        return tensors | {"attn_kv_b.weight": (heads * (key - rope + value), rank)}

    def feed_forward(self, layer: int) -> dict:
        keys, hidden = self.keys, self.hidden
        if "expert_count" not in keys or layer < keys.get("leading_dense_block_count", 0):
            width = keys["feed_forward_length"]
            return self.gated("", (), width)
        experts = keys["expert_count"]
        tensors = {"ffn_gate_inp.weight": (experts, hidden)}
        tensors |= self.gated("_exps", (experts,), keys["expert_feed_forward_length"])
        if shared := keys.get("expert_shared_count"):
            tensors |= self.gated("_shexp", (), shared * keys["expert_feed_forward_length"])
        if keys.get("expert_gating_func") == 2:
            tensors["exp_probs_b.bias"] = (experts,)
        return tensors

    def gated(self, suffix: str, lead: tuple, width: int) -> dict:
        return {
            f"ffn_gate{suffix}.weight": (*lead, width, self.hidden),
            f"ffn_up{suffix}.weight": (*lead, width, self.hidden),
            f"ffn_down{suffix}.weight": (*lead, self.hidden, width),
        }

    def random(self, name: str, shape: tuple, rng: np.random.Generator) -> np.ndarray:
        """Scales at which every tensor matters."""
        if name == "rope_freqs.weight":
            return llama3_factors(self.keys["rope.freq_base"], 2 * shape[0]).astype(np.float32)
        if name.endswith("norm.weight"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        if name.endswith("exp_probs_b.bias"):
            return rng.uniform(-0.3, 0.3, shape).astype(np.float32)
        if name == "token_embd.weight":
            return rng.normal(0, 0.3 if self.tied else 1.0, shape).astype(np.float32)
        gain = 1.5 if any(part in name for part in ("attn_q", "ffn_gate_inp")) else 1.0
        # The key half is stored transposed: its inputs are along the second axis.
        inputs = shape[1] if "attn_k_b" in name else shape[-1]
        return rng.normal(0, gain / inputs**0.5, shape).astype(np.float32)


def llama3_factors(theta: float, width: int, factor: float = 8.0, low: float = 1.0, high: float = 4.0,
                   context: float = 64.0) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3's bands."""
    frequencies = theta ** -(np.arange(0, width, 2) / width)
    lengths = 2 * np.pi / frequencies
    smooth = (context / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(lengths < context / high, 1.0, np.where(lengths > context / low, factor, between))


GQA = {
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
    "feed_forward_length": 48, "rope.dimension_count": 16, "rope.freq_base": 10000.0,
}
EXPERTS = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 8}
MLA = {
    "attention.head_count": 4, "attention.q_lora_rank": 24, "attention.kv_lora_rank": 16, "rope.dimension_count": 8,
    "feed_forward_length": 48, "rope.freq_base": 10000.0, "leading_dense_block_count": 1, "expert_shared_count": 1,
    "vocab_size": 0,
}
# Every block type once; the width of 256 suits them all.
BLOCKS = {
    "token_embd.weight": Type.Q6_K,
    "blk.0.attn_q.weight": Type.Q2_K, "blk.0.attn_k.weight": Type.Q3_K, "blk.0.attn_v.weight": Type.Q4_K,
    "blk.0.attn_output.weight": Type.Q4_0, "blk.0.ffn_gate.weight": Type.Q5_K, "blk.0.ffn_up.weight": Type.IQ4_XS,
    "blk.0.ffn_down.weight": Type.Q4_1,
    "blk.1.attn_q.weight": Type.Q5_0, "blk.1.attn_k.weight": Type.Q5_1, "blk.1.attn_v.weight": Type.IQ4_NL,
    "blk.1.attn_output.weight": Type.Q8_0, "blk.1.ffn_gate.weight": Type.MXFP4, "blk.1.ffn_up.weight": Type.NVFP4,
    "blk.1.ffn_down.weight": Type.NVFP4,
}

MODELS = [
    Model("llama-spm", "llama", sentence_piece(merges=40), GQA),
    Model(
        "llama-bpe", "llama", byte_level("llama-bpe", merges=40), GQA | {"rope.freq_base": 500.0}, tied=True,
        extra={"rope_freqs.weight": (8,)},
        types={"blk.0.attn_q.weight": Type.BF16, "blk.0.attn_k.weight": Type.F16},
    ),
    Model(
        "qwen3", "qwen3", byte_level("qwen2", merges=40, eot_token_id=257), GQA | {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
        }, tied=True,
    ),
    Model("qwen3moe", "qwen3moe", byte_level("qwen2", merges=40), GQA | EXPERTS, tied=True),
    Model(
        "deepseek2-split", "deepseek2", byte_level("deepseek-v3", merges=40), MLA | EXPERTS | {
            "attention.head_count_kv": 1, "attention.key_length": 24, "attention.value_length": 16,
            "attention.key_length_mla": 24, "attention.value_length_mla": 12,
            "expert_count": 8, "expert_used_count": 3, "expert_group_count": 4, "expert_group_used_count": 2,
            "expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 2.5,
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        }, tied=True,
    ),
    Model(
        "deepseek2-joined", "deepseek2", byte_level("deepseek-llm", merges=40), MLA | EXPERTS | {
            "attention.head_count_kv": 4, "attention.key_length": 24, "attention.value_length": 12,
            "expert_weights_scale": 1.5,
        }, tied=True,
    ),
    Model(
        "blocks", "llama", sentence_piece(merges=10), GQA | {
            "attention.key_length": 16, "attention.value_length": 16, "feed_forward_length": 64,
        }, hidden=256, tied=True, types=BLOCKS, scales={"blk.1.ffn_up.weight": 0.37, "blk.1.ffn_down.weight": 0.5},
    ),
    Model(
        "experts", "qwen3moe", byte_level("qwen2", merges=20), GQA | EXPERTS | {"expert_feed_forward_length": 32}, tied=True, layers=1,
        types={
            f"blk.{i}.ffn_{part}_exps.weight": kind
            for i in range(2) for part, kind in (("gate", Type.Q4_0), ("up", Type.Q5_0), ("down", Type.Q8_0))
        },
    ),
]
for model in MODELS:
    if "vocab_size" in model.keys:
        model.keys["vocab_size"] = model.vocabulary_size()
