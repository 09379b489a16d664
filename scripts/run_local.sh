#!/usr/bin/env bash
# Runs a config, or a program of one's own, on this machine.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_local.sh CONFIG.yaml [key.path=value ...]
       run_local.sh PROGRAM.py [argument ...]

Runs `chatlearn train CONFIG ...`, or the program, on this machine. Ray is started and stopped, or
joined where RAY_ADDRESS is set.

environment:
  OMP_NUM_THREADS  threads of a worker; unset: its share of the node's cores
  PYTHON           the interpreter; else .venv of this checkout, else python3
TEXT
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

if [[ "$1" == *.py ]]; then
  exec "$python" "$@"
fi
exec "$python" -m chatlearn.cli.main train "$@"
