"""Glm4MoeLite (MLA attention, sigmoid-routed experts with a shared one) for training.

The arithmetic is that of transformers' `Glm4MoeLiteForCausalLM`; the parameters of a
layer's experts are kept fused so that all of them run as one matrix product, with a
routing weight of zero for the experts that a token does not use. At this size that is
faster than gathering tokens, and exact.
"""

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": [0],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "max_position_embeddings": 2048,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 128,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "routed_scaling_factor": 1.8,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 2048,
}
LATENT_NORM_EPS = 1e-6  # the latent norms ignore rms_norm_eps in this architecture


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rotate_interleaved(x, cos, sin):
    """Rotates the pairs (2i, 2i+1); the result is written as two halves."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.nope, self.rope, self.v = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.rank = c["kv_lora_rank"]
        self.q_a_proj = linear(c["hidden_size"], c["q_lora_rank"])
        self.q_a_layernorm = RMSNorm(c["q_lora_rank"], LATENT_NORM_EPS)
        self.q_b_proj = linear(c["q_lora_rank"], self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(c["hidden_size"], self.rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = linear(self.rank, self.heads * (self.nope + self.v))
        self.o_proj = linear(self.heads * self.v, c["hidden_size"])

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, length, self.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, self.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.v], dim=-1)
        k_rope = rotate_interleaved(k_rope.unsqueeze(1), cos, sin).expand(-1, self.heads, -1, -1)
        q = torch.cat([q_nope, rotate_interleaved(q_rope, cos, sin)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(hidden, inner), linear(hidden, inner), linear(inner, hidden)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
        self.experts, self.top_k, self.scale = c["n_routed_experts"], c["num_experts_per_tok"], c["routed_scaling_factor"]
        self.router = nn.Parameter(torch.empty(self.experts, hidden))
        self.register_buffer("bias", torch.zeros(self.experts))
        self.gate_proj = nn.Parameter(torch.empty(self.experts * inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(self.experts * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.experts, inner, hidden))
        self.shared = MLP(hidden, inner * c["n_shared_experts"])

    def forward(self, x):
        """Returns the output and the number of tokens that chose each expert."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.router).sigmoid()
            chosen = (scores + self.bias).topk(self.top_k, dim=-1).indices
            mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
            weights = scores * mask
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale
        inner = F.silu(F.linear(x, self.gate_proj)) * F.linear(x, self.up_proj)
        inner = inner.unflatten(-1, (self.experts, -1)) * weights.to(inner.dtype).unsqueeze(-1)
        routed = inner.flatten(-2) @ self.down_proj.flatten(0, 1)
        return routed + self.shared(x), mask.detach().sum((0, 1))


class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.is_moe = index >= c["first_k_dense_replace"]
        self.mlp = MoE(c) if self.is_moe else MLP(c["hidden_size"], c["intermediate_size"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out = self.mlp(self.post_attention_layernorm(x))
        return (x + out[0], out[1]) if self.is_moe else (x + out, None)


class Model(nn.Module):
    def __init__(self, c=None):
        super().__init__()
        self.config = c = dict(CONFIG if c is None else c)
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.lm_head = linear(c["hidden_size"], c["vocab_size"])
        dim = c["qk_rope_head_dim"]
        frequency = 1.0 / c["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(c["max_position_embeddings"]).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self._initialize(c["initializer_range"])

    def _initialize(self, std):
        residual = std / (2 * len(self.layers)) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() > 1:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
                nn.init.normal_(p, std=residual if is_output else std)

    def forward(self, tokens):
        """tokens [batch, length] to logits [batch, length, vocab] and expert loads [moe layers, experts]."""
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        loads = []
        for layer in self.layers:
            x, load = layer(x, cos, sin)
            if load is not None:
                loads.append(load)
        return self.lm_head(self.norm(x)), torch.stack(loads)

    def moe_layers(self):
        return [layer.mlp for layer in self.layers if layer.is_moe]


def export_tensors(model):
    """The weights under their published names: bf16, the correction bias f32."""
    out = {}
    inner = model.config["moe_intermediate_size"]
    for name, p in model.state_dict().items():
        if ".mlp." in name and model.layers[int(name.split(".")[1])].is_moe:
            prefix, _, rest = name.partition(".mlp.")
            prefix = f"model.{prefix}.mlp."
            if rest == "router":
                out[prefix + "gate.weight"] = p
            elif rest == "bias":
                out[prefix + "gate.e_score_correction_bias"] = p
            elif rest.startswith("shared."):
                out[prefix + "shared_experts." + rest.removeprefix("shared.")] = p
            else:
                for e in range(model.config["n_routed_experts"]):
                    w = p[e].t() if rest == "down_proj" else p[e * inner:(e + 1) * inner]
                    out[f"{prefix}experts.{e}.{rest}.weight"] = w
        else:
            out[name if name.startswith("lm_head") else "model." + name] = p
    keep = "e_score_correction_bias"
    return {n: t.detach().to("cpu", torch.float32 if n.endswith(keep) else torch.bfloat16).contiguous() for n, t in out.items()}


def round_to_bf16(model):
    """Gives the model exactly the weights that `export_tensors` writes."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16).float())
