"""Writes the weights that all sides of a benchmark start from; runs in the peers' environment.

python -m scripts.bench.sides.write_llama SHAPE FOLDER
"""

from __future__ import annotations

import json
import sys
from typing import Any

from scripts.bench.sides.peer_transformers import build_llama
from scripts.bench.workload import Shape


def main() -> int:
    """Write a Hugging Face folder: a Llama with random weights in fp32."""
    shape, folder = sys.argv[1:]
    model: Any = build_llama(Shape(**json.loads(shape)))
    model.save_pretrained(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
