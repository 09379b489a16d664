#!/usr/bin/env bash
# Runs a config, or a program of one's own, on several nodes: the same command on every node.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_ray_cluster.sh CONFIG.yaml [key.path=value ...]
       run_ray_cluster.sh PROGRAM.py [argument ...]

Run it on every node. Node 0 starts Ray's head and the driver; the others join, and leave with the
driver and its exit code.

environment:
  NODE_RANK (or RANK)         this node's number, from 0
  NUM_NODES (or WORLD_SIZE)   how many nodes there are
  MASTER_ADDR                 address of node 0
  MASTER_PORT                 a free port of node 0; Ray's head takes the next one
  RAY_AUTH_TOKEN, or          the token that all nodes share, or a file that holds it; without
  RAY_AUTH_TOKEN_PATH         either ~/.ray/auth_token, which node 0 makes (a shared home)
  RAY_START_ARGS              further arguments of `ray start` on this node
  CHATLEARN_STARTUP_TIMEOUT_S limit of the nodes' coming together; 300 where unset
  OMP_NUM_THREADS             threads of a worker; unset: its share of the node's cores
  PYTHON                      the interpreter; else .venv of this checkout, else python3
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
  exec "$python" -m chatlearn.runtime.launch "$python" "$@"
fi
exec "$python" -m chatlearn.runtime.launch "$python" -m chatlearn.cli.main train "$@"
