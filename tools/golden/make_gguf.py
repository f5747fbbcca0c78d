#!/usr/bin/env python3
"""Writes the GGUF goldens: blocks of every type with the values that the gguf package decodes, tiny random models with
llama.cpp's logits, and vocabularies with llama.cpp's token ids. See README.md.
"""

import argparse
import ctypes
import json
import os
import tempfile
from pathlib import Path

import gguf
import llama_cpp as lib
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from gguf_models import MODELS, Model
from gguf_vocabularies import TEXTS, VOCABULARIES

# Where the half floats of each block type are.
HALVES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0], Type.Q2_K: [80, 82],
    Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208], Type.IQ4_NL: [0], Type.IQ4_XS: [0],
    Type.MXFP4: [], Type.NVFP4: [],
}
BLOCKS = 4


def random_blocks(kind: Type, count: int, rng: np.random.Generator, scale: float | None = None) -> np.ndarray:
    """Blocks of random bytes with finite scales: every field takes every value."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[kind]:
        # Small and large, of both signs, one subnormal and one zero among them.
        values = rng.normal(0, 1, count) * 2.0 ** rng.integers(-12, 6, count)
        values[:2] = [2.0**-20, 0.0]
        blocks[:, at:at + 2] = values.astype("<f2").view(np.uint8).reshape(count, 2)
    if kind == Type.MXFP4:
        blocks[:, 0] = np.resize([0, 1, 2, 250], count)
    if kind == Type.NVFP4:
        blocks[:, :4] %= 0x80
        blocks[0, :2] = [0x7F, 0x00]
    return blocks


def write_types(out: Path) -> None:
    """`{type}.blocks` U8 [blocks, bytes] and `{type}.values` F32 [blocks, elements] of every type."""
    rng = np.random.default_rng(1)
    tensors = {}
    for kind in HALVES:
        blocks = random_blocks(kind, BLOCKS, rng)
        tensors[f"{kind.name}.blocks"] = blocks
        with np.errstate(all="ignore"):
            tensors[f"{kind.name}.values"] = gguf.quants.dequantize(blocks, kind).astype(np.float32)
    save_file(tensors, out / "types.safetensors")


@lib.llama_log_callback
def log(level: int, text: bytes, _data) -> None:
    """Lets warnings and errors through."""
    if level in (3, 4):
        print(text.decode(errors="replace"), end="")


class LlamaCpp:
    """A loaded file."""

    def __init__(self, path: Path, vocabulary_only: bool = False):
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocabulary_only
        self.model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocabulary = lib.llama_model_get_vocab(self.model)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """`[tokens, vocabulary]` of one pass; f32 weights, activations and cache."""
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.type_k = params.type_v = 0
        params.flash_attn_type = 0
        params.n_threads = params.n_threads_batch = 1
        context = lib.llama_init_from_model(self.model, params)
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
            batch.seq_id[i][0] = 0
        if lib.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        pointer = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        size = lib.llama_vocab_n_tokens(self.vocabulary)
        logits = np.ctypeslib.as_array(pointer, (len(tokens), size)).copy()
        lib.llama_free(context)
        return logits

    def encode(self, text: str) -> list[int]:
        """Token ids, start token and special tokens included."""
        raw = text.encode()
        ids = (lib.llama_token * (len(raw) + 8))()
        count = lib.llama_tokenize(self.vocabulary, raw, len(raw), ids, len(ids), True, True)
        if count < 0:
            raise SystemExit(f"llama.cpp cannot tokenize {text!r}")
        return list(ids[:count])


def quantized(values: np.ndarray, kind: Type, rng: np.random.Generator) -> np.ndarray:
    """`values` in blocks, by llama.cpp's own encoders."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    rows, columns = int(np.prod(values.shape[:-1])), values.shape[-1]
    if kind == Type.NVFP4:
        blocks = random_blocks(kind, rows * columns // block, rng)
        # Scales near 2^-6 keep the weights in range.
        blocks[:, :4] = 0x08 + blocks[:, :4] % 16
        return blocks.reshape(*values.shape[:-1], columns // block * size)
    ggml = ctypes.CDLL(str(Path(lib.__file__).parent / "lib" / "libggml-base.so"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]
    source = np.ascontiguousarray(values, dtype=np.float32)
    out = np.zeros(rows * columns // block * size, dtype=np.uint8)
    ggml.ggml_quantize_chunk(int(kind), source.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    return out.reshape(*values.shape[:-1], columns // block * size)


def write_model(model: Model, path: Path, twin: Path) -> None:
    """The file, and the same model with every weight decoded to f32."""
    rng = np.random.default_rng(sum(model.name.encode()))
    files = [gguf.GGUFWriter(p, model.arch) for p in (path, twin)]
    for file in files:
        for key, value in (model.metadata() | model.vocabulary).items():
            add_value(file, key, value)
    for name, shape in model.tensors():
        values = model.random(name, shape, rng)
        kind = model.types.get(name, Type.F32)
        stored, decoded = values, values
        if kind in (Type.F16,):
            stored = values.astype(np.float16)
            decoded = stored.astype(np.float32)
        elif kind == Type.BF16:
            stored = gguf.quants.quantize(values, kind)
            decoded = gguf.quants.dequantize(stored, kind)
        elif kind != Type.F32:
            stored = quantized(values, kind, rng)
            decoded = gguf.quants.dequantize(stored, kind)
        if scale := model.scales.get(name):
            decoded = decoded * np.float32(scale)
            files[0].add_tensor(name.replace(".weight", ".scale"), np.array([scale], dtype=np.float32))
        files[0].add_tensor(name, stored, raw_dtype=kind)
        files[1].add_tensor(name, np.ascontiguousarray(decoded, dtype=np.float32))
    for file in files:
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()


def add_value(file: gguf.GGUFWriter, key: str, value) -> None:
    if key == "general.architecture":
        return
    match value:
        case bool():
            file.add_bool(key, value)
        case int():
            file.add_uint32(key, value)
        case float():
            file.add_float32(key, value)
        case str():
            file.add_string(key, value)
        case list():
            file.add_array(key, value)


def write_vocabulary(path: Path, vocabulary: dict) -> None:
    """A file without tensors."""
    file = gguf.GGUFWriter(path, "llama")
    for key, value in vocabulary.items():
        add_value(file, key, value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=here.parents[1] / "crates/models/tests/golden_gguf")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    lib.llama_log_set(log, ctypes.c_void_p(0))
    lib.llama_backend_init()

    write_types(out)
    for model in MODELS:
        path = out / f"{model.name}.gguf"
        with tempfile.TemporaryDirectory() as temporary:
            twin = Path(temporary) / "twin.gguf"
            write_model(model, path, twin)
            rng = np.random.default_rng(2)
            tokens = rng.integers(3, model.vocabulary_size(), 10).tolist()
            logits = LlamaCpp(twin).logits(tokens)
        assert np.isfinite(logits).all() and logits.std() > 0.1, model.name
        golden = {"tokens": np.array(tokens, dtype=np.int32), "logits": logits}
        save_file(golden, out / f"{model.name}.safetensors")
        print(f"{model.name}: {os.path.getsize(path)} bytes, largest logit {abs(logits).max():.2f}")

    encodings = {}
    for name, vocabulary in VOCABULARIES.items():
        path = out / f"tokenizer-{name}.gguf"
        write_vocabulary(path, vocabulary)
        llama = LlamaCpp(path, vocabulary_only=True)
        encodings[path.name] = [{"text": text, "ids": llama.encode(text)} for text in TEXTS]
        print(f"{name}: {os.path.getsize(path)} bytes")
    lines = [f"{json.dumps(name)}: {json.dumps(cases)}" for name, cases in encodings.items()]
    (out / "encodings.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
