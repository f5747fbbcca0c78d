#!/usr/bin/env python3
"""Writes tiny random models and their logits, computed by transformers in f32 on the CPU with eager attention and eager experts.

Each folder holds config.json, the weights (one or several safetensors files) and golden.safetensors with
`tokens` I64 [T] and `logits` F32 [T, vocab_size] of one full forward pass. See README.md.
"""

import argparse
import json
import shutil
import sys
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from configurations import GOLDEN, Golden

EAGER = dict(attn_implementation="eager", experts_implementation="eager")
# A routing decision closer than this could fall either way under a different summation order.
MIN_ROUTING_GAP = 5e-4
# The reference's own f32 rounding must stay an order of magnitude under the parity tolerance of 1e-4.
MAX_REFERENCE_ERROR = 1e-5
# The same weights in other memory may be multiplied in another order; a detail lost in writing shows above 1e-3.
MAX_RELOAD_ERROR = 1e-6
WEIGHT_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def build_config(golden: Golden) -> transformers.PretrainedConfig:
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in golden.config.items()}
    return AutoConfig.for_model(golden.model_type, **config)


def randomise(model: torch.nn.Module, golden: Golden, generator: torch.Generator) -> None:
    """Gives every tensor a scale at which it matters: unit-gain matrices, norm weights away from 1, visible biases."""

    def normal(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    def uniform(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=generator) * (high - low) + low

    for name, tensor in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("e_score_correction_bias"):
            value = golden.bias_center + uniform(tensor, -0.3, 0.3)
        elif name.endswith("norm.weight"):
            value = uniform(tensor, 0.5, 1.5)
        elif name.endswith("bias"):
            value = normal(tensor, 0.3)
        elif name.endswith("embed_tokens.weight"):
            # Tied: a smaller embedding keeps the own token from dominating the logits.
            value = normal(tensor, 0.3 if model.config.tie_word_embeddings else 1.0)
        else:
            # Sharper queries and routers keep attention and expert choice far from uniform.
            gain = 1.5 if any(part in name for part in ("q_proj", "q_b_proj", "mlp.gate.weight")) else 1.0
            if golden.small_latent and ("q_a_proj" in name or "kv_a_proj" in name):
                gain = 2e-3
            value = normal(tensor, gain / tensor.shape[-1] ** 0.5)
            if golden.small_latent and "kv_a_proj" in name:
                value[model.config.kv_lora_rank :] /= gain
        tensor.copy_(value)


def routing_gap(router: torch.nn.Module, hidden: torch.Tensor) -> float:
    """The smallest score difference between a chosen and a rejected expert (or group) over all tokens."""
    logits = hidden.reshape(-1, hidden.shape[-1]).double() @ router.weight.double().T
    sigmoid = hasattr(router, "e_score_correction_bias")
    scores = logits.sigmoid() + router.e_score_correction_bias if sigmoid else logits.softmax(-1)

    def gap(values: torch.Tensor, k: int) -> float:
        if k >= values.shape[-1]:
            return float("inf")
        top = values.topk(k + 1, dim=-1).values
        return (top[:, k - 1] - top[:, k]).min().item()

    groups = getattr(router, "num_group", None) or 1
    grouped = sigmoid or getattr(router, "topk_method", "greedy") == "group_limited_greedy"
    if not grouped or groups == 1:
        return gap(scores, router.top_k)
    by_group = scores.view(len(scores), groups, -1)
    group_scores = by_group.topk(2, dim=-1).values.sum(-1) if sigmoid else by_group.amax(-1)
    kept = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(router.topk_group, dim=-1).indices, 1).bool()
    available = by_group[kept].view(len(scores), -1)
    return min(gap(group_scores, router.topk_group), gap(available, router.top_k))


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits [T, V] of one forward pass and the smallest routing gap seen."""
    gaps = [float("inf")]
    hooks = [
        module.register_forward_hook(lambda router, args, _: gaps.append(routing_gap(router, args[0])))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    logits = model(tokens[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, min(gaps)


def choose_tokens(model: torch.nn.Module, golden: Golden, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws token sequences until no routing decision is a near tie."""
    for _ in range(200):
        tokens = torch.randint(0, model.config.vocab_size, (golden.tokens,), generator=generator)
        logits, gap = forward(model, tokens)
        if gap >= MIN_ROUTING_GAP:
            return tokens, logits
    raise RuntimeError(f"{golden.name}: no token sequence keeps routing gaps above {MIN_ROUTING_GAP}; try another seed")


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def decode(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] token by token through transformers' cache."""
    cache, rows = None, []
    for token in tokens:
        output = model(token[None, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1])
    return torch.stack(rows)


def classic_config(config: dict, golden: Golden) -> dict:
    """Rewrites a transformers 5 config.json into the form that published checkpoints have."""
    config = dict(config)
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    # DeepSeek publishes "type", Qwen and Llama publish "rope_type".
    key = "type" if golden.model_type.startswith("deepseek") else "rope_type"
    config["rope_scaling"] = None if kind == "default" else {**scaling, key: kind}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    for derived in ("layer_types", "qk_head_dim"):
        config.pop(derived, None)
    if golden.model_type.startswith("deepseek"):
        config.pop("head_dim")
        if config.pop("rope_interleave", True) is False:
            config["rope_interleave"] = False
    if golden.model_type == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    # transformers reads only mlp_layer_types, whose default is one dense layer.
    if config.get("first_k_dense_replace") == 1:
        config.pop("mlp_layer_types", None)
    config.update(golden.published)
    return dict(sorted(config.items()))


def extra_tensors(model: torch.nn.Module, golden: Golden, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tensors of published checkpoints that the base model does not use."""
    hidden, layers, vocab = model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size
    tensors = {}
    if "mtp" in golden.extra:
        shapes = {
            "embed_tokens.weight": (vocab, hidden), "enorm.weight": (hidden,), "hnorm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden), "shared_head.norm.weight": (hidden,),
            "shared_head.head.weight": (vocab, hidden), "input_layernorm.weight": (hidden,),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{layers}.{name}"] = torch.randn(shape, generator=generator)
    if "inv_freq" in golden.extra:
        for layer in range(layers):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.randn(
                model.config.head_dim // 2, generator=generator
            )
    return tensors


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Appends tensors to a saved checkpoint: as one more shard of an index, or into the single file."""
    if not tensors:
        return
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        save_file({**load_file(folder / WEIGHT_FILE), **tensors}, folder / WEIGHT_FILE, metadata={"format": "pt"})
        return
    shard = "model-extra.safetensors"
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = json.loads(index_path.read_text())
    index["weight_map"].update({name: shard for name in tensors})
    index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write(golden: Golden, folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{golden.name}".encode()))
    model = AutoModelForCausalLM.from_config(build_config(golden), dtype=torch.float32, **EAGER).eval()
    randomise(model, golden, generator)
    tokens, logits = choose_tokens(model, golden, generator)

    if folder.exists():
        shutil.rmtree(folder)
    sharding = {"max_shard_size": golden.shard} if golden.shard else {}
    model.save_pretrained(folder, save_original_format=not golden.fused_experts, **sharding)
    # Sampling defaults are no part of a parity fixture.
    (folder / "generation_config.json").unlink(missing_ok=True)
    add_tensors(folder, extra_tensors(model, golden, generator))
    if golden.classic:
        path = folder / "config.json"
        path.write_text(json.dumps(classic_config(json.loads(path.read_text()), golden), indent=2) + "\n")
    # One key only: safetensors writes several in random order, and equal seeds must give equal files.
    metadata = {"reference": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, seed {seed}"}
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "golden.safetensors", metadata=metadata)
    verify(golden, folder, model, logits, tokens)


def verify(golden: Golden, folder: Path, written: torch.nn.Module, logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """transformers must reload the folder as written, and agree with itself well within the parity tolerance."""
    expected = {name: value.clone() for name, value in written.state_dict().items()}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **EAGER)
    model.eval()
    problems = []
    if info["missing_keys"] or info["mismatched_keys"]:
        problems.append(f"reload: missing {info['missing_keys']}, mismatched {info['mismatched_keys']}")
    ignorable = (f"model.layers.{model.config.num_hidden_layers}.", "rotary_emb.inv_freq")
    unexpected = [name for name in info["unexpected_keys"] if not any(part in name for part in ignorable)]
    if unexpected:
        problems.append(f"reload: unexpected {unexpected}")
    found = model.state_dict()
    changed = [name for name, value in expected.items() if name not in found or not torch.equal(found[name], value)]
    if changed or found.keys() != expected.keys():
        problems.append(f"reload: other values of {changed}, other names {sorted(found.keys() ^ expected.keys())}")
    reload_error = relative_difference(forward(model, tokens)[0], logits)
    if not reload_error <= MAX_RELOAD_ERROR:
        problems.append(f"reloaded logits differ by {reload_error:.1e}")
    decode_error = relative_difference(decode(model, tokens), logits)
    double_error = relative_difference(forward(model.double(), tokens)[0], logits)
    for label, error in (("decode", decode_error), ("f64", double_error)):
        if not error <= MAX_REFERENCE_ERROR:
            problems.append(f"{label} logits differ by {error:.1e}")
    if problems:
        raise RuntimeError(f"{golden.name}: " + "; ".join(problems))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{golden.name:34} {'classic' if golden.classic else 'v5':7} {size / 1024:6.0f} KiB  max|logit| {logits.abs().max():6.2f}  "
        f"decode {decode_error:.0e}  f64 {double_error:.0e}"
    )


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all weights and tokens (default 0)")
    parser.add_argument("--out", type=Path, default=root / "crates/models/tests/golden", help="folder to write into")
    parser.add_argument("--only", metavar="NAME", action="append", help="write only this configuration (may be repeated)")
    parser.add_argument("--list", action="store_true", help="print the configuration names and stop")
    args = parser.parse_args()
    names = [golden.name for golden in GOLDEN]
    if args.list:
        print("\n".join(names))
        return 0
    unknown = set(args.only or []) - set(names)
    if unknown:
        parser.error(f"unknown configuration {', '.join(sorted(unknown))}; known: {', '.join(names)}")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    args.out.mkdir(parents=True, exist_ok=True)
    for golden in GOLDEN:
        if not args.only or golden.name in args.only:
            write(golden, args.out / golden.name, args.seed)
    total = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{total / 1e6:.2f} MB in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
