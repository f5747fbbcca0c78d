#!/usr/bin/env python3
"""Measures every weight format on the bundled model and writes the table of models/README.md.

Usage, from the repository root: python3 tools/bundled_model/formats_table.py [--print-only]

Each row is one `marlin quantize` of models/marlin-stories followed by `marlin perplexity` on models/data/heldout.txt,
with f32 activations (--exact) and in the default mode. Only the Python standard library is used.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/marlin-stories"
HELDOUT = ROOT / "models/data/heldout.txt"
CALIBRATION = ROOT / "models/data/calibration.txt"
README = ROOT / "models/README.md"
BEGIN, END = "<!-- formats table: begin -->", "<!-- formats table: end -->"

RTN_FORMATS = [
    "int8", "int8_asym", "fp8_e4m3", "fp8_e5m2", "nvfp4", "mxfp4", "fp4_e2m1", "int4_s4",
    "int4_u4", "nf4", "int3", "nf3", "int2", "nf2",
]
GPTQ_FORMATS = ["fp4_e2m1", "int4_s4", "int4_u4", "int3", "int2"]


def marlin(*arguments):
    """Runs the release binary and returns its standard output."""
    binary = ROOT / "target/release/marlin"
    result = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"marlin {' '.join(map(str, arguments))}: {result.stderr.strip()}")
    return result.stdout


def perplexity(model, *flags):
    output = marlin("perplexity", "--model", model, "--text", HELDOUT, "--json", *flags)
    return json.loads(output)["perplexity"]


def measure(name, method, model, base):
    """One row of the table; the base model gives the reference perplexity."""
    exact, fast = perplexity(model, "--exact"), perplexity(model)
    bits = json.loads(marlin("inspect", model, "--json"))["quantized_bits_per_weight"]
    change = "" if base is None else f"{100 * (exact / base - 1):+.2f} %"
    bits = "16" if bits is None else f"{bits:.3f}"
    row = f"| {name} | {method} | {bits} | {exact:.4f} | {change} | {fast:.4f} |"
    print(row, flush=True)
    return row, exact


def table():
    rows = [
        "| format | method | bits per weight | perplexity, exact | change | perplexity, default mode |",
        "|---|---|---|---|---|---|",
    ]
    row, base = measure("bf16", "-", MODEL, None)
    rows.append(row)
    jobs = [(f, "rtn") for f in RTN_FORMATS] + [(f, "gptq") for f in GPTQ_FORMATS]
    for name, method in jobs:
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "model"
            flags = ["--calibration", CALIBRATION] if method == "gptq" else []
            marlin("quantize", MODEL, out, "--format", name, "--method", method, *flags)
            rows.append(measure(name, method.upper(), out, base)[0])
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print-only", action="store_true", help="leave models/README.md alone")
    arguments = parser.parse_args()
    subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    text = table()
    if not arguments.print_only:
        readme = README.read_text()
        head, rest = readme.split(BEGIN)
        _, tail = rest.split(END)
        README.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    main()
