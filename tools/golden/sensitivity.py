#!/usr/bin/env python3
"""Checks that the golden models can catch mistakes: breaks one detail at a time in transformers and measures how far the logits move.

A detail whose loss moves the logits by less than ten times the parity tolerance would go unnoticed; the script fails then.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from make_models import EAGER, relative_difference

MIN_EFFECT = 1e-3


def config_changes(config: transformers.PretrainedConfig) -> Iterator[tuple[str, dict]]:
    """Configuration details of this model, each as (name, changed fields)."""
    rope = dict(config.rope_parameters)
    yield "rope_theta", {"rope_parameters": {**rope, "rope_theta": rope["rope_theta"] * 2}}
    if rope["rope_type"] != "default":
        yield "rope_scaling", {"rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}}
    for key in ("mscale", "mscale_all_dim", "attention_factor", "truncate", "beta_fast"):
        # With mscale equal to mscale_all_dim the two cancel in the table; only dropping mscale_all_dim shows.
        cancels = key == "mscale" and "mscale_all_dim" not in rope
        default_beta = key == "beta_fast" and rope.get(key) == 32
        if rope.get(key) is not None and not cancels and not default_beta:
            yield key, {"rope_parameters": {k: v for k, v in rope.items() if k != key}}
    if getattr(config, "use_sliding_window", False):
        yield "window + 1", {"sliding_window": config.sliding_window + 1}
        yield "window - 1", {"sliding_window": config.sliding_window - 1}
    if config.rms_norm_eps >= 1e-3:
        yield "rms_norm_eps", {"rms_norm_eps": 1e-6}
    if getattr(config, "rope_interleave", None) is not None:
        yield "rope_interleave", {"rope_interleave": not config.rope_interleave}
    if hasattr(config, "norm_topk_prob") and config.model_type != "deepseek_v2":
        yield "norm_topk_prob", {"norm_topk_prob": not config.norm_topk_prob}
    if getattr(config, "routed_scaling_factor", 1.0) != 1.0:
        yield "routed_scaling_factor", {"routed_scaling_factor": 1.0}
    grouped = config.model_type != "deepseek_v2" or config.topk_method == "group_limited_greedy"
    if grouped and (getattr(config, "n_group", None) or 1) > (getattr(config, "topk_group", None) or 1):
        yield "topk_group", {"topk_group": config.topk_group + 1}


def weight_changes(model: torch.nn.Module) -> Iterator[tuple[str, Callable[[torch.nn.Module], None]]]:
    """Details that live in weights or modules, each as (name, function that breaks it)."""

    def zero(suffix: str) -> Callable[[torch.nn.Module], None]:
        return lambda model: [t.zero_() for n, t in model.state_dict().items() if n.endswith(suffix)]

    def one(suffix: str) -> Callable[[torch.nn.Module], None]:
        return lambda model: [t.fill_(1.0) for n, t in model.state_dict().items() if n.endswith(suffix)]

    def epsilon(suffix: str) -> Callable[[torch.nn.Module], None]:
        return lambda model: [setattr(m, "variance_epsilon", 0.0) for n, m in model.named_modules() if n.endswith(suffix)]

    names = list(model.state_dict())
    suffixes = {name.split(".", 3)[-1] if name.startswith("model.layers") else name for name in names}
    for suffix in sorted(suffixes):
        if suffix.endswith("bias"):
            yield suffix, zero(suffix)
        elif suffix.endswith("norm.weight"):
            yield suffix, one(suffix)
    if any("shared_experts" in name for name in names):
        yield "shared_experts", zero("shared_experts.down_proj.weight")
    latent = [m for n, m in model.named_modules() if n.endswith("kv_a_proj_with_mqa")]
    if latent and latent[0].weight[: model.config.kv_lora_rank].abs().mean() < 1e-2:
        yield "kv_a_layernorm eps", epsilon("kv_a_layernorm")
        if model.config.q_lora_rank is not None:
            yield "q_a_layernorm eps", epsilon("q_a_layernorm")


def load(folder: Path, config: transformers.PretrainedConfig) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, **EAGER).eval()


def check(folder: Path) -> list[str]:
    golden = load_file(folder / "golden.safetensors")
    config = AutoConfig.from_pretrained(folder)
    effects = {}

    def measure(name: str, model: torch.nn.Module) -> None:
        effects[name] = relative_difference(model(golden["tokens"][None]).logits[0], golden["logits"])

    for name, fields in config_changes(config):
        changed = copy.deepcopy(config)
        for key, value in fields.items():
            setattr(changed, key, value)
        measure(name, load(folder, changed))
    for name, break_it in weight_changes(load(folder, config)):
        model = load(folder, config)
        break_it(model)
        measure(name, model)
    print(f"{folder.name}: " + ", ".join(f"{name} {effect:.0e}" for name, effect in effects.items()))
    return [f"{folder.name}: {name} moves the logits by only {effect:.1e}" for name, effect in effects.items() if not effect >= MIN_EFFECT]


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=root / "crates/models/tests/golden", help="folder of golden models")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    failures = [line for folder in sorted(args.dir.iterdir()) if (folder / "golden.safetensors").exists() for line in check(folder)]
    print("\n".join(failures) or "every detail is visible")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
