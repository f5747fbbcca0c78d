#!/usr/bin/env python3
"""Runs `speed` (crates/gpu/examples/speed) and the same work in PyTorch bf16 on the same GPU, and prints both.

    python3 bench/gpu.py [--speed FILE] [--json FILE]

Needs Python 3.10 or newer and a PyTorch with CUDA. `--speed` names a built binary; without, cargo builds it. PyTorch's times
are medians over replays of CUDA graphs, with dense bf16 weights rotated beyond the caches, like ours; our attention is
enqueued launch by launch.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
# Bytes that no cache holds.
BEYOND_CACHE = 256 << 20
# Query heads, heads of keys and values, head size; as in `speed`.
ATTENTION = (32, 8, 128)


def graph_seconds(launches: int, launch) -> float:
    """Seconds a launch: the median of 9 samples (3 where a launch takes more than 0.1 s) of a graph of `launches`, replayed
    for 10 ms each."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(launches):
            launch(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)

    def sample(replays: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / (replays * launches)

    sample(1)
    once = sample(2)
    replays = max(1, math.ceil(0.01 / (once * launches)))
    return statistics.median(sample(replays) for _ in range(3 if once > 0.1 else 9))


def matmul_seconds(m: int, n: int, k: int) -> float:
    """A dense bf16 linear layer, `[M, K] x [N, K]^T`."""
    count = max(2, -(-BEYOND_CACHE // (2 * n * k)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    return graph_seconds(2 * count, lambda i: torch.matmul(x, weights[i % count].T, out=out))


def attention_seconds(queries: int, context: int) -> float:
    """torch SDPA of the last `queries` positions of a context, causal: one of them or all."""
    heads, kv_heads, size = ATTENTION
    count = max(2, -(-BEYOND_CACHE // (4 * kv_heads * context * size)))
    shape = (1, kv_heads, context, size)
    keys, values = ([torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)] for _ in "kv")
    q = torch.randn(1, heads, queries, size, device="cuda", dtype=torch.bfloat16)
    causal = queries == context

    def launch(i: int) -> None:
        F.scaled_dot_product_attention(q, keys[i % count], values[i % count], is_causal=causal, enable_gqa=True)

    return graph_seconds(count, launch)


def run_speed(binary: str | None) -> dict:
    """What `speed` measures."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "speed.json")
        cargo = ["cargo", "run", "--release", "-p", "marlin-gpu", "--features", "cuda", "--example", "speed", "--"]
        subprocess.run([*([binary] if binary else cargo), "--json", file], check=True, cwd=ROOT)
        return json.loads(Path(file).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", metavar="FILE", help="a built `speed`")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device")

    report = run_speed(options.speed and str(Path(options.speed).resolve()))
    shapes = {(row["m"], row["n"], row["k"]): None for row in report["products"]}
    dense = {shape: matmul_seconds(*shape) for shape in shapes}
    print(f"\nPyTorch {torch.__version__} bf16 on {torch.cuda.get_device_name()}\n")
    print("| format | M | N | K | ours, us | torch, us | torch / ours | ours, GB/s | ours, TFLOP/s | torch, TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in report["products"]:
        m, n, k = row["m"], row["n"], row["k"]
        seconds = row["torch_seconds"] = dense[m, n, k]
        print(
            f"| {row['format']} | {m} | {n} | {k} | {row['seconds'] * 1e6:.2f} | {seconds * 1e6:.2f} "
            f"| {seconds / row['seconds']:.2f} | {row['bytes_per_second'] / 1e9:.0f} "
            f"| {row['flops_per_second'] / 1e12:.1f} | {2e-12 * m * n * k / seconds:.1f} |"
        )

    heads, kv_heads, size = ATTENTION
    print(f"\nAttention, {heads} query heads, {kv_heads} heads of keys and values of {size}, bf16, causal:\n")
    print("| queries | context | ours, us | torch SDPA, us | torch / ours |")
    print("|---|---|---|---|---|")
    for row in report["attention"]:
        seconds = row["torch_seconds"] = attention_seconds(row["queries"], row["context"])
        ours = row["seconds"]
        print(f"| {row['queries']} | {row['context']} | {ours * 1e6:.1f} | {seconds * 1e6:.1f} | {seconds / ours:.2f} |")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
