#!/usr/bin/env bash
# Creates the virtual environment on first use, then writes the golden files of imported checkpoints.
# Usage: tools/golden/make_imports.sh [options of make_imports.py]; GOLDEN_VENV overrides the environment's folder.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${GOLDEN_VENV:-$here/.venv-imports}"
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
    $pip -r "$here/requirements-imports.txt" setuptools wheel
    # Their other requirements are for GPUs and data sets; auto-gptq's package does not build without CUDA.
    $pip --no-deps autoawq==0.2.9
    BUILD_CUDA_EXT=0 $pip --no-deps --no-build-isolation gptqmodel==7.7.0
    $pip device-smi logbar tokenicer threadpoolctl random_word defuser pypcre
fi
exec "$venv/bin/python" -W ignore "$here/make_imports.py" "$@"
