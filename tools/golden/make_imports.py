#!/usr/bin/env python3
"""Writes small quantized modules and tiny models with the original tools, and what those tools decode them to.

modules/NAME.safetensors: the stored tensors of module `m`, `expected` [out, in] as the tool dequantizes them, and metadata with
`config` (the quantization_config or MLX's `quantization`), and `limit`, the largest difference relative to the largest weight
(0: bit for bit after rounding to the dtype of `expected`).
models/NAME: config.json, model.safetensors and golden.safetensors with `tokens` and the f32 `logits` that transformers
computes with the weights that the tool decodes, in f32 and without rounding.
"""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import mlx.core as mx
import numpy as np
import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.utils.packing_utils import dequantize_gemm
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]


def integer_grid(weight: torch.Tensor, bits: int, group: int, symmetric: bool, order: torch.Tensor | None = None):
    """f16 scales and whole zero points [N, G] by range, groups of consecutive channels of `order`."""
    w = weight.float() if order is None else weight.float()[:, order]
    w = w.reshape(len(w), -1, group)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    levels = 2**bits - 1
    if symmetric:
        scale = (2 * torch.maximum(-low, high) / levels).half()
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / levels).half()
    return scale, (-low / scale.float()).round().clamp(0, levels).half()


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer


def gptq(weight, bits=4, group=32, symmetric=True, v1=True, order=None, planar=False, bias=None):
    """GPTQModel's packing. Returns stored tensors, f16 values, f32 values."""
    n, k = weight.shape
    group = k if group == -1 else group
    form = FORMAT.GPTQ_P if planar else FORMAT.GPTQ_V2
    module = TorchLinear(
        bits=bits, group_size=group, sym=symmetric, desc_act=order is not None, in_features=k, out_features=n,
        bias=bias is not None, format=form,
    )
    scale, zero = integer_grid(weight, bits, group, symmetric, order)
    index = torch.arange(k, dtype=torch.int32) // group
    if order is not None:
        index = index[torch.argsort(order)]
    module.pack(linear(weight.float(), bias), scale.float(), zero.float(), index)
    module.post_init()
    values = module.dequantize_weight().T.contiguous()
    scales = module.scales
    module.scales = scales.float()
    exact = module.dequantize_weight().T.contiguous()
    module.scales = scales
    if v1:
        convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    stored = {name: getattr(module, name).contiguous() for name in ("qweight", "qzeros", "scales", "g_idx")}
    if bias is not None:
        stored["bias"] = module.bias
    return stored, values.half(), exact.float()


def gptq_config(bits=4, group=32, v1=True, planar=False, **more):
    name = "gptq_p" if planar else "gptq" if v1 else "gptq_v2"
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": name, **more}


def awq(weight, group=32, gemv=False):
    scale, zero = integer_grid(weight, 4, group, False)
    # Its packer does not clamp: it is given weights on the grid, as after its own quantizer.
    s, z = (v.float().repeat_interleave(group, 1) for v in (scale, zero))
    layer = linear((((weight.float() / s).round() + z).clamp(0, 15) - z).mul(s).half())
    module = WQLinear_GEMM.from_linear(layer, 4, group, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
    decode = lambda scales: dequantize_gemm(module.qweight, module.qzeros, scales, 4, group).T.contiguous()
    values, exact = decode(module.scales), decode(module.scales.float())
    if gemv:
        module = WQLinear_GEMV.from_linear(layer, 4, group, scales=scale, zeros=zero)
    return {name: getattr(module, name).contiguous() for name in ("qweight", "qzeros", "scales")}, values, exact


def awq_config(group=32, gemv=False):
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemv" if gemv else "gemm"}


def compressed(weight, form, dtype=torch.bfloat16, **args):
    """compressed-tensors' own compressor; scales by range."""
    args = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    n, k = weight.shape
    weight = weight.to(dtype)
    state = {"weight": weight}
    if form == "nvfp4-pack-quantized":
        amax = weight.float().abs().amax()
        state["weight_global_scale"] = (448 * 6 / amax).reshape(1)
        block = weight.float().reshape(n, -1, 16).abs().amax(-1)
        state["weight_scale"] = (state["weight_global_scale"] * block / 6).to(torch.float8_e4m3fn).to(dtype)
    elif form == "mxfp4-pack-quantized":
        block = weight.float().reshape(n, -1, 32).abs().amax(-1)
        state["weight_scale"] = 2.0 ** (torch.floor(torch.log2(block)) - 2)
    elif form == "mxfp8-quantized":
        block = weight.float().reshape(n, -1, 32).abs().amax(-1)
        state["weight_scale"] = 2.0 ** (torch.floor(torch.log2(block)) - 8)
    elif form == "float-quantized":
        groups = weight.float().reshape(n, -1) if args.strategy == "channel" else weight.float().reshape(1, -1)
        scale = (groups.abs().amax(-1) / 448).to(dtype)
        state["weight_scale"] = scale.reshape(n, 1) if args.strategy == "channel" else scale
    else:
        group = args.group_size or k
        blocks = weight.float().reshape(n, -1, group)
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        top, bottom = 2 ** (args.num_bits - 1) - 1, -(2 ** (args.num_bits - 1))
        if args.symmetric:
            state["weight_scale"] = (torch.maximum(-low, high) / max((top - bottom) / 2, 1)).to(dtype)
        else:
            scale = ((high - low) / (top - bottom)).to(dtype)
            state["weight_scale"] = scale
            state["weight_zero_point"] = (bottom - low / scale.float()).round().clamp(bottom, top).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    values = compressor.decompress(dict(stored), scheme)["weight"]
    wide = {name: t.float() if t.is_floating_point() and t.element_size() > 1 else t for name, t in stored.items()}
    exact = compressor.decompress(wide, scheme)["weight"].float()
    config = {"num_bits": args.num_bits, "type": str(getattr(args.type, "value", args.type)), "symmetric": args.symmetric,
              "strategy": str(getattr(args.strategy, "value", args.strategy)), "group_size": args.group_size}
    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": config}}}
    return {name: t.contiguous() for name, t in stored.items()}, values, exact, config


def fp8(weight, block=(32, 32)):
    """transformers' block layout; the scale of a block is amax / 448."""
    n, k = weight.shape
    tiles = weight.float().reshape(n // block[0], block[0], k // block[1], block[1])
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).clamp(-448, 448).reshape(n, k).to(torch.float8_e4m3fn)
    exact = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    return {"weight": codes, "weight_scale_inv": scale}, exact, exact


def fp8_config(block=(32, 32)):
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}


def to_mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.float().numpy()).astype({torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}.get(tensor.dtype, mx.float32))


def from_mlx(array: mx.array) -> torch.Tensor:
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def mlx(weight, bits=4, group=64, mode="affine", dtype=torch.bfloat16):
    parts = mx.quantize(to_mlx(weight.to(dtype)), group_size=group, bits=bits, mode=mode)
    stored = {name: from_mlx(part) for name, part in zip(("weight", "scales", "biases"), parts)}
    wide = [part.astype(mx.float32) if part.dtype in (mx.bfloat16, mx.float16) else part for part in parts]
    exact = from_mlx(mx.dequantize(*wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32))
    return stored, exact, exact


def bnb4(weight, kind="nf4", double=False, dtype=torch.bfloat16, block=64):
    codes, state = bnb.quantize_4bit(weight.to(dtype), blocksize=block, compress_statistics=double, quant_type=kind)
    stored = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    # Its CPU kernel decodes rows that are no whole blocks wrongly; blocks run through the flat matrix.
    state.shape = torch.Size([1, weight.numel()])
    values = bnb.dequantize_4bit(codes, state).reshape(weight.shape)
    state.dtype = torch.float32
    return {"weight": codes, **stored}, values, bnb.dequantize_4bit(codes, state).reshape(weight.shape)


def bnb8(weight):
    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    values = bnb.int8_vectorwise_dequant(codes, scale)
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, values, values


def module_cases(random):
    """name -> stored tensors, expected values, config, limit."""
    w = lambda n, k: random(n, k)
    for bits in (2, 3, 4, 8):
        stored, values, _ = gptq(w(64, 96), bits, symmetric=False, v1=False)
        yield f"gptq_v2-{bits}", stored, values, gptq_config(bits, v1=False), 0
    for bits in (3, 4, 8):
        stored, values, _ = gptq(w(64, 96) + 0.02, bits, symmetric=False)
        yield f"gptq_v1-{bits}", stored, values, gptq_config(bits), 0
    # Groups without negative weights: zero points of 0, where the subtraction of 1 borrows from the next field.
    stored, values, _ = gptq(w(64, 64).abs() * torch.where(torch.arange(64) % 3 == 0, 1.0, -1.0)[:, None], 4, symmetric=False)
    yield "gptq_v1-zeros", stored, values, gptq_config(meta={"quantizer": ["gptqmodel:7.7.0"]}), 0
    for bits in (3, 5, 6, 7):
        stored, values, _ = gptq(w(64, 96), bits, symmetric=False, v1=False, planar=True)
        yield f"gptq_p-{bits}", stored, values, gptq_config(bits, planar=True), 0
    stored, values, _ = gptq(w(64, 96), order=torch.randperm(96), bias=torch.randn(64))
    yield "gptq_act_order", stored, values, gptq_config(desc_act=True), 0
    stored, values, _ = gptq(w(64, 96), group=-1)
    yield "gptq_channel", stored, values, gptq_config(group=-1), 0
    for gemv in (False, True):
        stored, values, _ = awq(w(64, 128), gemv=gemv)
        yield f"awq_{'gemv' if gemv else 'gemm'}", stored, values, awq_config(gemv=gemv), 0
    for bits in range(1, 9):
        for symmetric in (True, False):
            if bits == 1 and not symmetric:
                continue
            name = f"ct_int{bits}-{'sym' if symmetric else 'asym'}"
            stored, values, _, config = compressed(
                w(24, 96), "pack-quantized", num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
            yield name, stored, values, config, 0
    stored, values, _, config = compressed(
        w(24, 96), "pack-quantized", torch.float32, num_bits=4, type="int", symmetric=True, strategy="channel")
    yield "ct_int4-channel-f32", stored, values, config, 0
    for symmetric in (True, False):
        stored, values, _, config = compressed(
            w(24, 96), "int-quantized", num_bits=8, type="int", symmetric=symmetric, strategy="channel")
        yield f"ct_int8-{'sym' if symmetric else 'asym'}", stored, values, config, 0
    stored, values, _, config = compressed(
        w(24, 96), "nvfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    yield "ct_nvfp4", stored, values, config, 0
    stored, values, _, config = compressed(
        w(24, 96), "mxfp4-pack-quantized", num_bits=4, type="float", symmetric=True, strategy="group", group_size=32)
    yield "ct_mxfp4", stored, values, config, 0
    stored, values, _, config = compressed(
        w(24, 96), "mxfp8-quantized", num_bits=8, type="float", symmetric=True, strategy="group", group_size=32)
    yield "ct_mxfp8", stored, values, config, 0
    for strategy in ("channel", "tensor"):
        stored, values, _, config = compressed(
            w(24, 96), "float-quantized", num_bits=8, type="float", symmetric=True, strategy=strategy)
        yield f"ct_fp8-{strategy}", stored, values, config, 0
    stored, values, _ = fp8(w(192, 64), (64, 64))
    yield "fp8_block", stored, values, fp8_config((64, 64)), 0
    stored, values, _ = fp8(w(48, 64), (48, 64))
    stored["weight_scale"] = stored.pop("weight_scale_inv").reshape(())
    yield "fp8_tensor", stored, values, {"quant_method": "fp8", "activation_scheme": "static"}, 0
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64):
            dtype = torch.bfloat16 if group == 64 else torch.float16
            stored, values, _ = mlx(w(16, 128), bits, group, dtype=dtype)
            yield f"mlx-{bits}-{group}", stored, values, {"mlx": {"group_size": group, "bits": bits, "mode": "affine"}}, 0
    for mode, bits, group in (("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)):
        stored, values, _ = mlx(w(16, 128), bits, group, mode)
        yield f"mlx-{mode}", stored, values, {"mlx": {"group_size": group, "bits": bits, "mode": mode}}, 0
    bits_and_bytes = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            stored, values, _ = bnb4(w(64, 128), kind, double)
            yield f"bnb_{kind}{'-double' if double else ''}", stored, values, bits_and_bytes, 0
    stored, values, _ = bnb4(w(24, 96), dtype=torch.float16)
    yield "bnb_nf4-rows", stored, values, bits_and_bytes, 0
    stored, values, _ = bnb8(w(24, 96))
    yield "bnb_int8", stored, values, {"quant_method": "bitsandbytes", "load_in_8bit": True}, 2.0**-22


def gpt_oss_experts(out: Path, generator: torch.Generator) -> None:
    """Stacked MXFP4 experts as gpt-oss stores them, with transformers' values."""
    stored = {}
    for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        blocks = torch.randint(0, 256, (2, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 128, (2, rows, columns // 32), dtype=torch.uint8, generator=generator)
        stored |= {f"e.{name}_blocks": blocks, f"e.{name}_scales": scales}
        stored[f"e.{name}_bias"] = torch.randn(2, rows, generator=generator).bfloat16()
        # Their layout of the result is [experts, in, out].
        stored[f"{name}.expected"] = convert_moe_packed_tensors(blocks, scales).transpose(1, 2).contiguous()
    save_file(stored, out / "gpt_oss_experts.safetensors")


LLAMA = dict(model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, vocab_size=64, tie_word_embeddings=False, max_position_embeddings=256,
             rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
MOE = dict(LLAMA, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
           decoder_sparse_step=1, norm_topk_prob=True, mlp_only_layers=[])


def tiny_models(random):
    """name -> config fields, quantizer of one matrix, quantization fields, matrices that are quantized."""
    projection = lambda name: name.endswith("_proj.weight")
    yield "gptq", LLAMA, lambda w: gptq(w, symmetric=False), {"quantization_config": gptq_config()}, projection

    act_order = lambda w: gptq(w, order=torch.randperm(w.shape[1]))
    yield "gptq_act_order", LLAMA, act_order, {"quantization_config": gptq_config(desc_act=True)}, projection
    yield "awq", LLAMA, awq, {"quantization_config": awq_config()}, projection
    args = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    packed = lambda w: compressed(w, "pack-quantized", **args)
    yield "compressed_tensors", LLAMA, packed, {"quantization_config": packed(random(32, 32))[3]}, projection
    yield "fp8", LLAMA, fp8, {"quantization_config": fp8_config()}, projection
    everything = lambda name: not name.endswith(("norm.weight", "mlp.gate.weight"))
    group = {"group_size": 32, "bits": 4, "mode": "affine"}
    yield "mlx", LLAMA, lambda w: mlx(w, 4, 32), {"quantization": group, "quantization_config": group}, everything
    yield "mlx_moe", MOE, lambda w: mlx(w, 4, 32), {"quantization": group, "quantization_config": group}, everything
    yield "bitsandbytes", dict(LLAMA, intermediate_size=128), lambda w: bnb4(w, block=64), {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, projection
    orders = []

    def paired_order(w):
        # Of gate and up of an expert, as of their common input, and of other matrices two by two.
        orders.append(orders[-1] if len(orders) % 2 else torch.randperm(w.shape[1]))
        return gptq(w, order=orders[-1])

    yield "gptq_moe_act_order", MOE, paired_order, {"quantization_config": gptq_config(desc_act=True)}, projection


def expert_parts(key: str, tensor: torch.Tensor, stacked: bool) -> Tensors:
    """The matrices of a layer's experts by the names that files have: MLX's stacks, or one expert after the other."""
    layer, name = key.split(".experts.")
    width = tensor.shape[1] // 2
    projections = {"gate_proj": tensor[:, :width], "up_proj": tensor[:, width:]} if name == "gate_up_proj" else {name: tensor}
    if stacked:
        return {f"{layer}.switch_mlp.{part}.weight": values for part, values in projections.items()}
    return {f"{layer}.experts.{e}.{part}.weight": values[e]
            for e in range(len(tensor)) for part, values in projections.items()}


def write_model(out: Path, name, fields, quantize, quantization, chosen, generator) -> None:
    folder = out / name
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").float()
    stored = {}
    half = lambda t: t.to(torch.bfloat16)
    state = model.state_dict()
    for key, tensor in sorted(state.items()):
        scale = 1 / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 0.3
        tensor.copy_(half(torch.randn(tensor.shape, generator=generator) * scale + (tensor.ndim == 1)).float())
        parts = {key: tensor}
        if ".experts." in key:
            parts = expert_parts(key, tensor, stacked="mlx" in name)
        for part, values in parts.items():
            if chosen(part):
                tensors, _, exact = quantize(values.contiguous())[:3]
                values.copy_(exact)
                stored |= {f"{part.removesuffix('weight')}{suffix}": t for suffix, t in tensors.items()}
            else:
                stored[part] = half(values).contiguous()
    model.load_state_dict(state)
    tokens = torch.randint(0, config.vocab_size, (24,), generator=generator)
    with torch.no_grad():
        logits = model.eval()(tokens[None], use_cache=False).logits[0]
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "golden.safetensors")
    (folder / "config.json").write_text(json.dumps({**fields, "torch_dtype": "bfloat16", **quantization}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "crates/models/tests/imports")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    random = lambda n, k: torch.randn(n, k, generator=generator) * 0.05
    for part in ("modules", "models"):
        shutil.rmtree(args.out / part, ignore_errors=True)
        (args.out / part).mkdir(parents=True)
    for name, stored, expected, config, limit in module_cases(random):
        tensors = {f"m.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
        metadata = {"config": json.dumps(config), "limit": repr(float(limit))}
        save_file(tensors | {"expected": expected.contiguous()}, args.out / f"modules/{name}.safetensors", metadata)
    gpt_oss_experts(args.out, generator)
    for case in tiny_models(random):
        write_model(args.out / "models", *case, generator)


if __name__ == "__main__":
    main()
