#!/usr/bin/env python3
"""One run of llama.cpp through its C interface: times a prefill and a decode, or compares logits. Prints one JSON object.

The run has the shape of `marlin bench`: the same tokens, the same warm-up, one row of logits for the last token of a
prefill and for every decoded token, an f16 KV cache, and the model loaded before the clock starts.
"""

import argparse
import ctypes
import json
import sys
import time

import llama_cpp as lib
import numpy as np

BATCH = 512
WARN = 3


@lib.llama_log_callback
def log(level: int, text: bytes, _data) -> None:
    """Lets warnings and errors through."""
    if level >= WARN and level != 5:
        sys.stderr.write(text.decode(errors="replace"))


class Model:
    """A loaded GGUF file with one context."""

    def __init__(self, path: str, context: int, threads: int):
        lib.llama_log_set(log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        # Flash attention and the f16 cache stay at llama.cpp's defaults.
        params = lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot create a context")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.position = 0

    def feed(self, tokens: list[int], all_logits: bool = False) -> None:
        """Appends tokens; logits for the last one, or for all."""
        batch, total = self.batch, len(tokens)
        for start in range(0, total, BATCH):
            piece = tokens[start:start + BATCH]
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i] = token
                batch.pos[i] = self.position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = all_logits or start + i == total - 1
            status = lib.llama_decode(self.context, batch)
            if status != 0:
                raise SystemExit(f"llama_decode failed with status {status}")
            self.position += len(piece)
        lib.llama_synchronize(self.context)

    def clear(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        self.position = 0

    def logits(self, rows: int) -> np.ndarray:
        pointer = lib.llama_get_logits(self.context)
        pointer = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (rows, self.vocab)).copy()


def bench(path: str, prompt: int, gen: int, threads: int) -> dict:
    """Tokens per second of a prefill of `prompt` tokens and of `gen` decoded ones after it."""
    model = Model(path, prompt + gen, threads)
    tokens = [(i * 2_654_435_761) % 2**32 % model.vocab for i in range(prompt + gen)]
    model.feed(tokens[:min(prompt, 8)])
    model.feed(tokens[:1])
    model.clear()
    start = time.perf_counter()
    model.feed(tokens[:prompt])
    prefilled = time.perf_counter()
    for token in tokens[prompt:]:
        model.feed([token])
    end = time.perf_counter()
    return {
        "prefill_tokens_per_s": prompt / (prefilled - start),
        "decode_tokens_per_s": gen / (end - prefilled),
        "version": lib.__version__,
        "system": lib.llama_print_system_info().decode(),
    }


def compare(path: str, threads: int, tokens: list[int], files: list[str]) -> dict:
    """The lowest cosine over the tokens between llama.cpp's logits and those in each file."""
    from safetensors.numpy import load_file

    model = Model(path, len(tokens), threads)
    model.feed(tokens, all_logits=True)
    theirs = model.logits(len(tokens)).astype(np.float64)
    cosines = {}
    for file in files:
        ours = load_file(file)["logits"].astype(np.float64)
        if ours.shape != theirs.shape:
            raise SystemExit(f"{file}: logits {ours.shape}, llama.cpp {theirs.shape}")
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines[file] = float(((ours * theirs).sum(axis=1) / norms).min())
    return cosines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--tokens", help="compare the logits of these ids, separated by commas")
    parser.add_argument("--compare", nargs="+", default=[], metavar="FILE", help="outputs of `marlin logits`")
    args = parser.parse_args()
    if args.tokens:
        result = compare(args.model, args.threads, [int(t) for t in args.tokens.split(",")], args.compare)
    else:
        result = bench(args.model, args.prompt_tokens, args.gen_tokens, args.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
