#!/usr/bin/env bash
# Builds the virtual environment: torch first (the CPU build where there is no GPU), then the rest.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3.11}"
venv="${VENV:-.venv}"
torch_cpu="${TORCH_CPU:-torch==2.13.0}"

if [ "$(uname -s)" != Linux ]; then
  echo "chatlearn runs on Linux only (got $(uname -s)): use a Linux machine, a container or WSL 2." >&2
  exit 1
fi
if ! command -v "$python" >/dev/null; then
  echo "Python not found: $python. Install Python 3.11 or 3.12, or set PYTHON=/path/to/python." >&2
  exit 1
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
  echo "Python 3.11 or 3.12 is needed, got $("$python" --version). Set PYTHON=/path/to/python." >&2
  exit 1
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --upgrade pip
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    "${pip[@]}" "torch>=2.11"
  else
    # A pinned version first: a bare `torch` may bring gigabytes of CUDA libraries. TORCH_INDEX
    # names an index with CPU builds where the usual one serves CUDA builds only.
    "${pip[@]}" "$torch_cpu" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
  fi
fi
"${pip[@]}" --editable '.[dev]'
