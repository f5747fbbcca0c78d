#!/usr/bin/env bash
# Creates the virtual environment on first use, then writes the golden models.
# Usage: tools/golden/make.sh [options of make_models.py]; GOLDEN_VENV overrides the environment's folder.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${GOLDEN_VENV:-$here/.venv}"
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
exec "$venv/bin/python" "$here/make_models.py" "$@"
