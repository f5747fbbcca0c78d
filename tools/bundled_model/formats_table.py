#!/usr/bin/env python3
"""Measures every weight format and method on the bundled model: the table and the plot of models/README.md.

Usage, from the repository root: python3 tools/bundled_model/formats_table.py [--only TEXT]

Each row is one `marlin quantize` of models/marlin-stories followed by `marlin perplexity` on models/data/heldout.txt
with the bf16 model as reference: with f32 activations (--exact) and in the default mode. The plot is drawn by matplotlib,
which is installed into an environment of its own at the first run. The numbers are kept in models/quality.json: with --only,
the other rows are those of the file.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/marlin-stories"
HELDOUT = ROOT / "models/data/heldout.txt"
CALIBRATION = ROOT / "models/data/calibration.txt"
README = ROOT / "models/README.md"
PLOT = ROOT / "models/quality.svg"
ROWS = ROOT / "models/quality.json"
VENV = ROOT / "target/quality_venv"
MATPLOTLIB = "matplotlib==3.10.7"
BEGIN, END = "<!-- formats table: begin -->", "<!-- formats table: end -->"

RTN_FORMATS = [
    "int8", "int8_asym", "fp8_e4m3", "fp8_e5m2", "nvfp4", "mxfp4", "fp4_e2m1", "int4_s4",
    "int4_u4", "nf4", "int3", "nf3", "int2", "nf2",
]
GPTQ_FORMATS = ["fp4_e2m1", "nvfp4", "mxfp4", "int4_s4", "int4_u4", "int3", "int2"]
MR_GPTQ_FORMATS = ["fp4_e2m1", "nvfp4", "mxfp4"]
AWQ_FORMATS = ["int4_s4", "int4_u4", "int3"]
MIXED_BITS = ["2.5", "3.5"]
EXL3_BITS = ["1", "1.5", "2", "2.5", "3", "3.5", "4", "5", "6"]


def jobs():
    """Name, method and arguments of every row but the first."""
    calibrated = ["--calibration", CALIBRATION]
    for name in RTN_FORMATS:
        yield name, "RTN", ["--format", name, "--method", "rtn"]
    for name in GPTQ_FORMATS:
        yield name, "GPTQ", ["--format", name, "--method", "gptq", *calibrated]
    for name in MR_GPTQ_FORMATS:
        yield name, "MR-GPTQ", ["--format", name, "--method", "mr-gptq", *calibrated]
    for name in AWQ_FORMATS:
        yield name, "AWQ", ["--format", name, "--method", "awq", *calibrated]
    for bits in MIXED_BITS:
        yield f"int, {bits} bits", "GPTQ, mixed", ["--format", "int", "--bits", bits, *calibrated]
    for bits in EXL3_BITS:
        yield f"exl3, {bits} bits", "EXL3", ["--format", "exl3", "--codebook", "mcg", "--bits", bits, *calibrated]


def marlin(*arguments):
    """Runs the release binary and returns its standard output."""
    binary = ROOT / "target/release/marlin"
    result = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"marlin {' '.join(map(str, arguments))}: {result.stderr.strip()}")
    return result.stdout


def predictions(model, *flags):
    arguments = ["--model", model, "--reference", MODEL, "--text", HELDOUT, "--json", *flags]
    return json.loads(marlin("perplexity", *arguments))


def measure(name, method, model):
    """One row of the table as numbers."""
    exact, fast = predictions(model, "--exact"), predictions(model)
    bits = json.loads(marlin("inspect", model, "--json"))["quantized_bits_per_weight"]
    row = {
        "name": name,
        "method": method,
        "bits": 16.0 if bits is None else bits,
        "perplexity": exact["perplexity"],
        "divergence": exact["kl_divergence"],
        "agreement": exact["top1_agreement"],
        "default": fast["perplexity"],
    }
    print(json.dumps(row), flush=True)
    return row


def measure_all(only):
    """The rows of all jobs, each kept as soon as it is measured; those without `only` in their names as they were kept."""
    kept = {(row["name"], row["method"]): row for row in json.loads(ROWS.read_text())} if ROWS.exists() else {}
    rows = []
    for name, method, arguments in [("bf16", "-", None), *jobs()]:
        row = kept.get((name, method))
        if row is None or not only or only in f"{name} {method}":
            row = quantize_and_measure(name, method, arguments)
        rows.append(row)
        known = {**kept, **{(row["name"], row["method"]): row for row in rows}}
        ROWS.write_text("[\n" + ",\n".join(json.dumps(row) for row in known.values()) + "\n]\n")
    ROWS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return rows


def quantize_and_measure(name, method, arguments):
    if arguments is None:
        return measure(name, method, MODEL)
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "model"
        marlin("quantize", MODEL, out, *arguments)
        return measure(name, method, out)


def table(rows):
    lines = [
        "| format | method | bits per weight | perplexity, exact | change | KL divergence, 10^-3 nats | top-1 agreement "
        "| perplexity, default mode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = rows[0]["perplexity"]
    for row in rows:
        change = "" if row is rows[0] else f"{100 * (row['perplexity'] / base - 1):+.2f} %"
        lines.append(
            f"| {row['name']} | {row['method']} | {row['bits']:.3f} | {row['perplexity']:.4f} | {change} "
            f"| {1e3 * row['divergence']:.3f} | {100 * row['agreement']:.2f} % | {row['default']:.4f} |"
        )
    return "\n".join(lines)


def plot(rows):
    import matplotlib

    matplotlib.use("svg")
    # The same file from the same numbers.
    matplotlib.rcParams["svg.hashsalt"] = "marlin"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    series = {}
    for row in rows[1:]:
        if row["bits"] < 7:
            series.setdefault(row["method"], []).append(row)
    markers = iter("os^vDPX*")
    for method, points in series.items():
        points.sort(key=lambda row: row["bits"])
        line = "-" if method in ("EXL3", "GPTQ, mixed") else "none"
        xs, ys = [p["bits"] for p in points], [p["divergence"] for p in points]
        axes.plot(xs, ys, linestyle=line, marker=next(markers), label=method)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("KL divergence from bf16, nats per token")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


def run_in_venv():
    """Goes on in an environment with matplotlib."""
    python = VENV / "bin/python"
    ready = VENV / "ready"
    if not ready.exists() or ready.read_text() != MATPLOTLIB:
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", MATPLOTLIB], check=True)
        ready.write_text(MATPLOTLIB)
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="measure rows whose format and method contain TEXT")
    arguments = parser.parse_args()
    if pathlib.Path(sys.prefix) != VENV:
        run_in_venv()
    subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    rows = measure_all(arguments.only)
    head, rest = README.read_text().split(BEGIN)
    _, tail = rest.split(END)
    plot(rows)
    README.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}")


if __name__ == "__main__":
    main()
