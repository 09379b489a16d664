"""Which layers each model chunk of each pipeline stage holds. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout

__all__ = ["split_layers"]

_EDGE_COUNTS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_EDGE_FLAGS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
_LAYOUT = "pipeline_model_parallel_layout"
_LETTERS = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}


def split_layers(
    fields: Mapping[str, Any], layout: ParallelLayout
) -> tuple[tuple[range, ...], ...]:
    """Layers of every chunk, from 0, as Megatron-Core 0.16.1 splits them.

    Chunk 0 of all stages comes first, then chunk 1 of all, and so on.

    Args:
        fields: the flat Megatron fields of one model.
        layout: its pipeline and virtual stages.

    Returns:
        [stage][chunk] ranges of layers.

    Raises:
        ConfigError: the layers cannot be split like this.
    """
    num_layers = int(fields["num_layers"])
    counts = _count_layers(fields, num_layers, layout)
    chunks: list[list[range]] = [[] for _ in range(layout.pp_size)]
    start = 0
    for number in range(layout.vpp_size):
        for stage in range(layout.pp_size):
            stop = start + counts[number * layout.pp_size + stage]
            chunks[stage].append(range(start, stop))
            start = stop
    if start != num_layers or min(counts) < 0:
        raise ConfigError(
            f"num_layers={num_layers}: the stages' chunks would have {counts} layers, {start} in "
            f"all, over PP x VPP = {layout.pp_size} x {layout.vpp_size}"
        )
    return tuple(tuple(stage) for stage in chunks)


def _count_layers(fields: Mapping[str, Any], num_layers: int, layout: ParallelLayout) -> list[int]:
    """Layers of each chunk, in the order in which a token passes them."""
    if fields.get(_LAYOUT) is not None:
        return _read_layout(fields[_LAYOUT], layout)
    first, last = (fields.get(key) for key in _EDGE_COUNTS)
    has_embedding, has_loss = (bool(fields.get(key)) for key in _EDGE_FLAGS)
    if first is not None or last is not None:
        if has_embedding or has_loss:
            raise ConfigError(f"{' and '.join(_EDGE_COUNTS)} exclude {' and '.join(_EDGE_FLAGS)}")
        stages = _split_uneven(num_layers, layout.pp_size, first, last)
    else:
        slots = num_layers + has_embedding + has_loss
        stages = [_divide(slots, layout.pp_size, "stages")] * layout.pp_size
    counts = [_divide(count, layout.vpp_size, "chunks") for count in stages] * layout.vpp_size
    counts[0] -= has_embedding
    counts[-1] -= has_loss
    return counts


def _split_uneven(
    num_layers: int, num_stages: int, first: int | None, last: int | None
) -> list[int]:
    middle_stages = num_stages - (first is not None) - (last is not None)
    middle_layers = num_layers - (first or 0) - (last or 0)
    each = _divide(middle_layers, middle_stages, "middle stages") if middle_stages > 0 else 0
    counts = [each] * num_stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


def _divide(count: int, parts: int, what: str) -> int:
    if count % parts:
        raise ConfigError(f"{count} layers cannot be spread evenly over {parts} {what}")
    return count // parts


def _read_layout(value: str | Sequence[Sequence[str]], layout: ParallelLayout) -> list[int]:
    """Decoder layers of each chunk by `pipeline_model_parallel_layout`, a string or lists."""
    rows = _parse(value) if isinstance(value, str) else value
    kinds = [[str(kind).strip().lower() for kind in row] for row in rows]
    unknown = {kind for row in kinds for kind in row} - {"embedding", "decoder", "loss"}
    if unknown:
        raise ConfigError(
            f"{_LAYOUT}: {', '.join(sorted(unknown))}: expected embedding, decoder and loss"
        )
    if len(kinds) != layout.pp_size * layout.vpp_size:
        raise ConfigError(
            f"{_LAYOUT} has {len(kinds)} chunks; PP x VPP is {layout.pp_size} x {layout.vpp_size}"
        )
    return [row.count("decoder") for row in kinds]


def _parse(text: str) -> list[list[str]]:
    """Megatron's short form: `Et*3|(tt|)*2L` is Ettt, tt, tt, L."""
    text = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    return [[_LETTERS.get(letter, letter) for letter in row] for row in text.split("|")]
