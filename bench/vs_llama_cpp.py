#!/usr/bin/env python3
"""Speed of Metal Marlin against llama.cpp on this CPU, with the same weights, threads and tokens.

Builds both, writes one set of random weights in the shape of Qwen3-0.6B for each, checks that both compute the same
logits, then alternates runs: llama.cpp Q4_0, our INT4, our FP4, llama.cpp Q4_0, ... Every run is a process of its own
that loads the model before its clock starts. A ratio is ours / llama.cpp within one round; above 1 we are faster.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
THEIRS, OURS = "llama.cpp", ("int4", "fp4")
# Name, prompt tokens, generated tokens, the rate that counts.
MEASURES = [
    ("prefill_128", 128, 1, "prefill_tokens_per_s"),
    ("prefill_512", 512, 1, "prefill_tokens_per_s"),
    ("decode_0", 1, 64, "decode_tokens_per_s"),
    ("decode_1024", 1024, 64, "decode_tokens_per_s"),
]
CHECK_TOKENS = ",".join(str(i * 2_654_435_761 % 2**32 % 151_936) for i in range(16))
LEAST_COSINE = 0.99


def output_of(command: list, **options) -> str:
    """Standard output of a command; its standard error is shown only when it fails."""
    done = subprocess.run([str(c) for c in command], text=True, capture_output=True, **options)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        sys.exit(f"{command[0]} failed with status {done.returncode}")
    return done.stdout


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def say(text: str) -> None:
    print(text, flush=True)


def prepare_venv(venv: Path, amx: bool) -> Path:
    """The Python of an environment with llama.cpp, compiled for this CPU once."""
    python = venv / "bin" / "python"
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = f"-include {shlex.quote(str(HERE / 'gcc_amx.h'))}" if x86 else ""
    if x86 and not amx:
        flags = "-mno-amx-int8 -mno-amx-bf16 -mno-amx-tile"
    build = {
        "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
        "CFLAGS": flags,
        "CXXFLAGS": flags,
    }
    requirements = HERE / "requirements.txt"
    # What the finished environment was made of.
    recipe = json.dumps(build) + "\n" + requirements.read_text()
    ready = venv / "vs_llama_cpp.ready"
    if ready.exists() and ready.read_text() == recipe:
        return python
    missing = [tool for tool in ("cc", "c++") if shutil.which(tool) is None]
    if missing:
        sys.exit(f"no {' and no '.join(missing)}: llama.cpp is compiled from source (Debian: apt install build-essential)")
    say(f"installing llama.cpp into {venv}: it is compiled from source, about 10 minutes on 2 cores")
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    # pip fetches cmake and ninja for the build where the machine has none. Its cache does not know the flags.
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", requirements]
    parallel = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    subprocess.run(install, env=os.environ | build | parallel, check=True)
    ready.write_text(recipe)
    return python


def build_marlin() -> Path:
    """Our release binary."""
    subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    return ROOT / "target" / "release" / "marlin"


class Contest:
    """The programs, their weights and the number of threads."""

    def __init__(self, args: argparse.Namespace):
        self.threads, self.models = args.threads, args.models
        self.python = prepare_venv(args.venv, not args.no_amx)
        self.marlin = args.marlin or build_marlin()
        say(f"weights: {args.models}, {args.layers} layers")
        make = [self.python, HERE / "make_weights.py", args.models, "--layers", args.layers, "--seed", args.seed]
        self.bits_per_weight = last_json(output_of(make))["bits_per_weight"]
        self.version = self.system = ""

    def llama_cpp(self, *arguments) -> dict:
        script, model = HERE / "run_llama_cpp.py", self.models / "q4_0.gguf"
        return last_json(output_of([self.python, script, model, "--threads", self.threads, *arguments]))

    def cosines(self) -> dict[str, float]:
        """The lowest cosine over the tokens between llama.cpp's logits and ours, for each format and mode."""
        names = {}
        for weights in OURS:
            for mode, option in ((weights, []), (f"{weights}_exact", ["--exact"])):
                file = self.models / f"{mode}.logits.safetensors"
                logits = [self.marlin, "logits", "--model", self.models / weights, "--tokens", CHECK_TOKENS]
                output_of([*logits, "--output", file, "--kv", "f16", "--threads", self.threads, *option])
                names[str(file)] = mode
        result = self.llama_cpp("--tokens", CHECK_TOKENS, "--compare", *names)
        return {mode: result[file] for file, mode in names.items()}

    def run(self, side: str, prompt: int, gen: int) -> dict:
        """One process."""
        sizes = ["--prompt-tokens", prompt, "--gen-tokens", gen]
        if side == THEIRS:
            result = self.llama_cpp(*sizes)
            self.version, self.system = result["version"], result["system"]
            return result
        bench = [self.marlin, "bench", "--model", self.models / side, "--threads", self.threads, "--json"]
        return last_json(output_of([*bench, *sizes]))

    def rounds(self, count: int) -> dict[str, dict[str, list[float]]]:
        """Tokens per second of every side, measure and round."""
        rates = {side: {name: [] for name, *_ in MEASURES} for side in (THEIRS, *OURS)}
        for i in range(count):
            for name, prompt, gen, rate in MEASURES:
                for side in rates:
                    rates[side][name].append(self.run(side, prompt, gen)[rate])
                now = ", ".join(f"{side} {rates[side][name][-1]:.1f}" for side in rates)
                say(f"round {i + 1}/{count} {name}: {now} tokens/s")
        return rates


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def summarize(rates: dict) -> tuple[dict, dict]:
    """Spreads of the rates, and of the ratios ours / theirs within each round."""
    speeds = {side: {name: spread(values) for name, values in measures.items()} for side, measures in rates.items()}
    ratios = {
        side: {
            name: spread([ours / theirs for ours, theirs in zip(rates[side][name], rates[THEIRS][name])])
            for name, *_ in MEASURES
        }
        for side in OURS
    }
    return speeds, ratios


def print_tables(speeds: dict, ratios: dict) -> None:
    say(f"\n{'tokens/s':<12} {'measure':<12} {'min':>9} {'median':>9} {'max':>9}")
    for side, measures in speeds.items():
        for name, s in measures.items():
            say(f"{side:<12} {name:<12} {s['min']:>9.1f} {s['median']:>9.1f} {s['max']:>9.1f}")
    say(f"\n{'/ llama.cpp':<12} {'measure':<12} {'min':>9} {'median':>9} {'max':>9}")
    for side, measures in ratios.items():
        for name, s in measures.items():
            say(f"{side:<12} {name:<12} {s['min']:>9.2f} {s['median']:>9.2f} {s['max']:>9.2f}")


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        return output_of(["sysctl", "-n", "machdep.cpu.brand_string"]).strip()
    return platform.processor() or platform.machine()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5, help="runs of each side and measure [default: 5]")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--threads", type=positive, default=cores, help="threads of both sides [default: all cores]")
    parser.add_argument("--layers", type=positive, default=28, help="layers of the model [default: 28]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights [default: 0]")
    parser.add_argument("--venv", type=Path, default=HERE / ".venv", help="environment [default: bench/.venv]")
    parser.add_argument("--no-amx", action="store_true", help="build llama.cpp without Intel AMX (needs a --venv of its own)")
    parser.add_argument("--models", type=Path, default=ROOT / "target" / "vs_llama_cpp",
                        help="folder for the weights, 1 GB [default: target/vs_llama_cpp]")
    parser.add_argument("--marlin", type=Path, help="our binary [default: built with cargo build --release]")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    for name in ("venv", "models", "marlin"):
        if getattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    return args


def main() -> None:
    args = arguments()
    contest = Contest(args)
    cosines = contest.cosines()
    say("lowest cosine of the logits with llama.cpp's: " + ", ".join(f"{n} {c:.6f}" for n, c in cosines.items()))
    # FP4 is only printed: its weights are rounded once more, so they are another model.
    different = [n for n in ("int4", "int4_exact") if not cosines[n] > LEAST_COSINE]
    if different:
        sys.exit(f"not the same model: the cosine of {' and '.join(different)} is not above {LEAST_COSINE}")
    say("bits per weight: " + ", ".join(f"{n} {b:.3f}" for n, b in contest.bits_per_weight.items()))
    rates = contest.rounds(args.rounds)
    speeds, ratios = summarize(rates)
    say(f"\n{cpu_model()}, {args.threads} threads, {args.layers} layers, llama-cpp-python {contest.version}")
    say(contest.system)
    print_tables(speeds, ratios)
    if args.json:
        say(json.dumps({
            "prefill_ratio": ratios["int4"]["prefill_512"]["median"],
            "decode_ratio": ratios["int4"]["decode_0"]["median"],
            "ratios": ratios, "tokens_per_s": speeds, "bits_per_weight": contest.bits_per_weight,
            "cosine": cosines, "rounds": args.rounds, "layers": args.layers, "threads": args.threads,
            "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()},
            "llama_cpp": {"python_package": contest.version, "system_info": contest.system},
        }))


if __name__ == "__main__":
    main()
