"""The random generators of one process, taken and put back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from chatlearn.errors import CheckpointError, in_one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read_generators", "restore_generators"]


def read_generators() -> dict[str, Any]:
    """States of Python's, numpy's and torch's global generators, as plain values."""
    import numpy as np
    import torch

    version, numbers, gauss = random.getstate()
    found: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = found
    states: dict[str, Any] = {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "numpy": [kind, torch.tensor(keys.astype("int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: Mapping[str, Any]) -> None:
    """Put back what `read_generators` gave.

    Raises:
        CheckpointError: it is something else.
    """
    import numpy as np
    import torch

    try:
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers.tolist()), gauss))
        kind, keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, cached))
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except Exception as error:  # each generator has errors of its own
        raise CheckpointError(
            f"the state of the random generators is damaged: {in_one_line(error)}"
        ) from error
