#!/usr/bin/env bash
# Creates the virtual environment on first use (llama.cpp is compiled from source), then writes the GGUF goldens.
# Usage: tools/golden/make_gguf.sh [--out DIR]; GOLDEN_GGUF_VENV overrides the environment's folder.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${GOLDEN_GGUF_VENV:-$here/.venv-gguf}"
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
fi
# Instructions that every x86-64 machine of the last ten years has: the sums do not depend on where it was compiled.
CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" \
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements-gguf.txt"
exec "$venv/bin/python" "$here/make_gguf.py" "$@"
