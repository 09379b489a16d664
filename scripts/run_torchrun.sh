#!/usr/bin/env bash
# Runs a config, or a program of one's own, by torchrun: the same command on every node.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run_torchrun.sh CONFIG.yaml [key.path=value ...]
       run_torchrun.sh PROGRAM.py [argument ...]

Run it on every node. torchrun starts one process per node, and chatlearn.init() builds the Ray
cluster from torchrun's environment: node 0 has Ray's head and the driver, the others join, and
leave with the driver and its exit code. A program calls chatlearn.init() before anything else.

environment:
  NODE_RANK                this node's number, from 0; 0 where unset
  NUM_NODES                how many nodes there are; 1 where unset
  MASTER_ADDR              address of node 0; needed with several nodes
  MASTER_PORT              a free port of node 0, for torchrun; 29500 where unset
  CHATLEARN_PORT           where the nodes meet on node 0; MASTER_PORT + 1 where unset. Ray's head
                           takes the port after that
  RAY_AUTH_TOKEN, or       the token that all nodes share, or a file that holds it; without
  RAY_AUTH_TOKEN_PATH      either ~/.ray/auth_token, which node 0 makes (a shared home)
  RAY_START_ARGS           further arguments of `ray start` on this node
  OMP_NUM_THREADS          threads of a worker; unset: its share of the node's cores
  PYTHON                   the interpreter; else .venv of this checkout, else python3
TEXT
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
esac

num_nodes="${NUM_NODES:-1}"
if [ "$num_nodes" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
  echo "MASTER_ADDR is not set: give the address of node 0" >&2
  exit 2
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

# Not torchrun itself, which ends with 1 whatever the driver ended with.
torchrun=("$python" -m chatlearn.runtime.torchrun
  --nnodes "$num_nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node 1
  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}")
if [[ "$1" == *.py ]]; then
  exec "${torchrun[@]}" -- "$python" "$@"
fi
exec "${torchrun[@]}" -- "$python" -m chatlearn.cli.main train "$@"
