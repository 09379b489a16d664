"""Writes chatlearn/config/megatron_fields.py from the installed Megatron-Core's dataclasses."""

import dataclasses
import typing
import warnings
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "chatlearn" / "config" / "megatron_fields.py"
HEADER = '''"""Megatron-Core's own field names, by the class they belong to.

Written by scripts/generate_megatron_fields.py from megatron-core {version}; a test keeps it
current. The values are the kinds that YAML may give.
"""

__all__ = ["MEGATRON_FIELDS"]

MEGATRON_FIELDS: dict[str, dict[str, tuple[str, ...]]] = {{
'''


def kinds(annotation: Any) -> tuple[str, ...]:
    """The YAML kinds that a field's annotation admits; empty for callables and the like."""
    if annotation in (bool, int, float, str):
        return (annotation.__name__,)
    if str(annotation) == "torch.dtype" or getattr(annotation, "__name__", "") == "dtype":
        return ()
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return tuple(sorted({type(value).__name__ for value in typing.get_args(annotation)}))
    if origin in (list, tuple) or annotation in (list, tuple):
        return ("list",)
    if origin is dict or annotation is dict:
        return ("dict",)
    parts = [kinds(part) for part in typing.get_args(annotation) if part is not type(None)]
    return tuple(sorted({kind for part in parts for kind in part}))


def render() -> str:
    """The text of the generated file."""
    warnings.filterwarnings("ignore")
    import megatron.core
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    lines = [HEADER.format(version=megatron.core.__version__)]
    seen: set[str] = set()
    for cls in (
        TransformerConfig,
        MLATransformerConfig,
        OptimizerConfig,
        DistributedDataParallelConfig,
    ):
        hints = typing.get_type_hints(cls)
        lines.append(f'    "{cls.__name__}": {{\n')
        for field in sorted(dataclasses.fields(cls), key=lambda field: field.name):
            found = kinds(hints[field.name])
            if cls is MLATransformerConfig and field.name in seen:
                continue
            if found:
                seen.add(field.name)
                listed = ", ".join(f'"{kind}"' for kind in found)
                comma = "," if len(found) == 1 else ""
                lines.append(f'        "{field.name}": ({listed}{comma}),\n')
        lines.append("    },\n")
    lines.append("}\n")
    return "".join(lines)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"wrote {TARGET}")
