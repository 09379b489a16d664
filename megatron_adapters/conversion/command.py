"""What `chatlearn convert` runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatlearn.errors import ConfigError
from megatron_adapters.patches.apply import import_megatron

__all__ = ["convert_folder", "measure_parity"]


def convert_folder(arguments: Any, on_bytes: Callable[[int, int], None]) -> int | None:
    """Convert as the command line says.

    Args:
        arguments: the parsed ones: source, target, to, family, like, tokenizer, dtype,
            max_file_gb, verify.
        on_bytes: told the bytes that are done and those there are.

    Returns:
        With `verify` the number of tensors that were compared.
    """
    import_megatron()
    from megatron_adapters.conversion.convert import ConversionOptions, convert, verify
    from megatron_adapters.weights.export import MAX_FILE_BYTES

    size = arguments.max_file_gb
    options = ConversionOptions(
        to=arguments.to,
        family=arguments.family,
        like=_path(arguments.like),
        tokenizer=_path(arguments.tokenizer),
        dtype=arguments.dtype,
        max_file_bytes=MAX_FILE_BYTES if size is None else int(size * 10**9),
        on_bytes=on_bytes,
    )
    source, target = Path(arguments.source), Path(arguments.target)
    convert(source, target, options)
    return verify(source, target, options) if arguments.verify else None


def measure_parity(families: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """The rows of the parity table, one after another.

    Args:
        families: which; None: all.

    Raises:
        ConfigError: one is not known, or transformers is not installed.
    """
    try:
        from transformers.utils import logging

        from megatron_adapters.conversion.tiny_models import TINY_MODELS, build_tiny_model
    except ImportError as error:
        raise ConfigError(
            f"--parity-table compares with transformers: pip install transformers ({error})"
        ) from error
    from megatron_adapters.conversion.parity import measure_family
    from megatron_adapters.conversion.worlds import World

    chosen = list(families or TINY_MODELS)
    unknown = [family for family in chosen if family not in TINY_MODELS]
    if unknown:
        known = ", ".join(TINY_MODELS)
        raise ConfigError(f"--families: got {', '.join(unknown)}, expected some of {known}")
    logging.disable_progress_bar()
    with (
        tempfile.TemporaryDirectory(prefix="chatlearn-parity-") as scratch,
        World(1) as one,
        World(2) as two,
    ):
        for family in chosen:
            model = build_tiny_model(family)
            folder = Path(scratch) / family
            model.save_pretrained(folder / "model")
            for row in measure_family(family, folder / "model", model, {1: one, 2: two}, folder):
                yield asdict(row)


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)
