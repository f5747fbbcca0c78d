#!/usr/bin/env python3
"""Writes one set of random weights in the shape of Qwen3-0.6B three times: GGUF Q4_0, and our INT4 and FP4 (group 32).

Q4_0 and INT4 hold the same codes and the same f16 scales, hence the same weights bit for bit. FP4 holds those weights
rounded to E2M1 with scales of its own. The tied embedding, which is also the output matrix, is quantized everywhere.
"""

import argparse
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 1024, 16, 8, 128, 3072, 151_936
EPS, THETA, CONTEXT = 1e-6, 1e6, 40_960
GROUP = 32
Q4_0 = gguf.GGMLQuantizationType.Q4_0
# Raise when the weights or the files change, so that old files are written again.
VERSION = 1

# Our module, llama.cpp's tensor, out_features, in_features.
LAYER = [
    ("self_attn.q_proj", "attn_q", HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.k_proj", "attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.v_proj", "attn_v", KV_HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.o_proj", "attn_output", HIDDEN, HEADS * HEAD_DIM),
    ("mlp.gate_proj", "ffn_gate", FFN, HIDDEN),
    ("mlp.up_proj", "ffn_up", FFN, HIDDEN),
    ("mlp.down_proj", "ffn_down", HIDDEN, FFN),
]
LAYER_NORMS = [
    ("input_layernorm", "attn_norm", HIDDEN),
    ("post_attention_layernorm", "ffn_norm", HIDDEN),
    ("self_attn.q_norm", "attn_q_norm", HEAD_DIM),
    ("self_attn.k_norm", "attn_k_norm", HEAD_DIM),
]


def shapes(layers: int) -> tuple[list, list]:
    """The matrices (module, GGUF tensor, N, K) and the norms (module, GGUF tensor, length) of the model."""
    matrices = [("model.embed_tokens", "token_embd", VOCAB, HIDDEN)]
    norms = [("model.norm", "output_norm", HIDDEN)]
    for i in range(layers):
        matrices += [(f"model.layers.{i}.{ours}", f"blk.{i}.{theirs}", n, k) for ours, theirs, n, k in LAYER]
        norms += [(f"model.layers.{i}.{ours}", f"blk.{i}.{theirs}", n) for ours, theirs, n in LAYER_NORMS]
    return matrices, norms


def codes_and_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes U8 [N, K] and f16 scales [N, K/32] of Q4_0 rows U8 [N, K/32 * 18].

    A block is its scale and 16 bytes; byte j holds code j in the low nibble and code j + 16 in the high one.
    """
    blocks = blocks.reshape(blocks.shape[0], -1, 18)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]
    nibbles = blocks[:, :, 2:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    return codes.reshape(len(blocks), -1), scales


def encode_fp4(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E2M1 codes and f16 scales nearest to the weights `(code - 8) * scale`, ties to the even code."""
    weights = (codes.reshape(*scales.shape, GROUP).astype(np.float32) - 8) * scales.astype(np.float32)[..., None]
    fp4_scales = (np.abs(weights).max(axis=2) / np.float32(6)).astype(np.float16)
    if not fp4_scales.all():
        raise ValueError("a group's scale is zero in f16")
    ratio = weights / fp4_scales.astype(np.float32)[..., None]
    size, sign = np.abs(ratio), np.signbit(ratio).astype(np.uint8)
    fp4 = sign << 3
    for above in (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5):
        fp4 += above
    return fp4.reshape(codes.shape), fp4_scales


def pack(codes: np.ndarray) -> np.ndarray:
    """U32 [K/8, N] from codes [N, K]: eight consecutive k a word, the first in the lowest bits."""
    pairs = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return np.ascontiguousarray(pairs.view("<u4").T)


def gguf_writer(path: Path, layers: int) -> gguf.GGUFWriter:
    """A GGUF file with the metadata of the model and no vocabulary but its size."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCAB)
    return writer


def config(format_name: str, layers: int) -> dict:
    """Our config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "bos_token_id": None,
        "eos_token_id": None, "head_dim": HEAD_DIM, "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "max_position_embeddings": CONTEXT, "max_window_layers": layers,
        "num_attention_heads": HEADS, "num_hidden_layers": layers, "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": EPS, "rope_scaling": None, "rope_theta": THETA, "sliding_window": None,
        "tie_word_embeddings": True, "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False,
        "vocab_size": VOCAB,
        "quantization_config": {
            "quant_method": "metal_marlin", "format_version": 1, "modules": {}, "ignore": [],
            "default": {"format": format_name, "bits": 4, "group_size": GROUP, "sym": True, "scale_dtype": "f16",
                        "sparsity": "none"},
        },
    }


def build(layers: int, seed: int, path: Path) -> dict:
    """Writes all files below `path`; returns the bits per weight of each."""
    rng = np.random.default_rng(seed)
    matrices, norms = shapes(layers)
    writer = gguf_writer(path / "q4_0.gguf", layers)
    int4, fp4 = {}, {}
    weights = q4_0_bytes = 0
    for module, tensor, n, k in matrices:
        plain = rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))
        blocks = gguf.quants.quantize(plain, Q4_0)
        del plain
        writer.add_tensor(f"{tensor}.weight", blocks, raw_dtype=Q4_0)
        codes, scales = codes_and_scales(blocks)
        int4[f"{module}.mm.q"], int4[f"{module}.mm.s"] = pack(codes), np.ascontiguousarray(scales.T)
        # Rows in pieces: the embedding in f32 would take gigabytes of intermediates.
        pieces = [encode_fp4(codes[i:i + 4096], scales[i:i + 4096]) for i in range(0, n, 4096)]
        fp4[f"{module}.mm.q"] = pack(np.concatenate([codes for codes, _ in pieces]))
        fp4[f"{module}.mm.s"] = np.ascontiguousarray(np.concatenate([scales for _, scales in pieces]).T)
        weights += n * k
        q4_0_bytes += blocks.nbytes
    bits = {
        "llama.cpp": 8 * q4_0_bytes / weights,
        "int4": 8 * sum(t.nbytes for t in int4.values()) / weights,
        "fp4": 8 * sum(t.nbytes for t in fp4.values()) / weights,
    }
    for module, tensor, n in norms:
        norm = 1 + 0.1 * rng.standard_normal(n, dtype=np.float32)
        writer.add_tensor(f"{tensor}.weight", norm)
        int4[f"{module}.weight"] = fp4[f"{module}.weight"] = norm
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, format_name, tensors in (("int4", "int4_s4", int4), ("fp4", "fp4_e2m1", fp4)):
        (path / name).mkdir()
        save_file(tensors, path / name / "model.safetensors", metadata={"format": "pt"})
        (path / name / "config.json").write_text(json.dumps(config(format_name, layers), indent=2) + "\n")
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write: q4_0.gguf, int4/, fp4/, weights.json")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    wanted = {"version": VERSION, "layers": args.layers, "seed": args.seed}
    manifest = args.out / "weights.json"
    # The manifest is written last: a folder with one is complete.
    if manifest.exists():
        found = json.loads(manifest.read_text())
        if wanted == {key: found.get(key) for key in wanted}:
            print(json.dumps(found))
            return
        manifest.unlink()
        (args.out / "q4_0.gguf").unlink()
    for name in ("int4", "fp4"):
        shutil.rmtree(args.out / name, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    found = wanted | {"bits_per_weight": build(args.layers, args.seed, args.out)}
    manifest.write_text(json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
