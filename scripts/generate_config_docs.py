"""Writes docs/configuration.md from the config's schema; `--check` exits 1 where it is stale."""

import sys
from pathlib import Path
from typing import Any

from chatlearn.config import Config
from chatlearn.config.chatlearn_keys import UNSUPPORTED
from chatlearn.config.megatron_fields import MEGATRON_FIELDS
from chatlearn.config.model_fields import MODEL_FIELDS
from chatlearn.config.refused_fields import REFUSED_FIELDS, REFUSED_PREFIXES, why_refused

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
COMMAND = "python scripts/generate_config_docs.py"
INTRODUCTION = """\
# Configuration

<!-- Written by scripts/generate_config_docs.py from chatlearn/config; edit the schema there. -->

A configuration is a YAML file with three sections: `runtime_env`, `models` and `runtime`. It is
read by `chatlearn train FILE`, `chatlearn eval FILE`, `chatlearn check FILE` and
`chatlearn.init("FILE")`. `configs/` has recipes to start from.

```yaml
includes: [base.yaml]
models:
  policy:
    module: megatron_adapters:PolicyInference
    model_config_file: models/llama_7b.yaml
    num_gpu: 8
    tensor_model_parallel_size: 2
runtime:
  engine: grpo
  data_path: ${TRAIN_DATA:data/train.jsonl}
```

## How a file is read

- `includes` is a list of files, relative to the file that names them. Later ones win over earlier
  ones, and the file itself over all of them. Sections are merged key by key; lists are replaced.
- `${NAME:default}` in a value is replaced by the environment variable `NAME`, else by the default.
  Without a default an unset variable is an error. Where nothing else is in the value it is read
  as YAML, so `${GPUS:8}` is a number and `${CHECKPOINT:}` is null.
- `key.path=value` on the command line (or in `chatlearn.init(config, overrides)`) wins over the
  files: `chatlearn train run.yaml runtime.num_episode=5 models.policy.num_gpu=4`. The value is
  read as YAML.
- `models.<name>.model_config_file` is a file of one model's keys, merged beneath those that are
  given under `models.<name>`. A path in a file is relative to that file, an override's to the
  working directory. Other paths, such as `runtime.data_path`, are relative to the working
  directory.
- `1e-5` is a number. A key that occurs twice is an error.
- A key that is not known is an error that shows the nearest known one. Sizes that do not add up
  are an error that shows the sum. All problems of a file are listed at once, before anything
  starts, and the exit code is 2.
- `chatlearn check FILE` also prints the graphs, the placement and the weight syncs without starting
  anything, and which files are not there; `--assume-devices N` plans for N GPUs that need not be
  there. `chatlearn train FILE` is refused where a file is missing.
"""
MEGATRON = """\
### Megatron's fields

Megatron-Core's own fields stand flat under `models.<name>`, beside the keys above, under its own
names: `hidden_size`, `num_layers`, `sequence_parallel`, `recompute_granularity`, `lr`, `clip_grad`,
`use_distributed_optimizer`, ... They are the fields of
{classes} that YAML can
give, {count} in all; `chatlearn/config/megatron_fields.py` lists them. A Megatron model needs
`num_layers`, `hidden_size`, `num_attention_heads`, `vocab_size` and `max_sequence_length`.

These stand there too, and are no fields of those classes:
"""
REFUSED_TEXT = """\
### Megatron's fields that are refused

Nothing here would act on these {count} fields, so a model that sets one is refused by name;
switched off (null, false, 0) they may stay. A name that ends in `*` stands for all that begin so.
"""
UNSUPPORTED_TEXT = """\
## Keys of ChatLearn that are refused

These keys are known from ChatLearn and have no effect here, so a file that has one is refused.
`models.<name>.num_device`, the old name of `num_gpu`, is accepted, as are
`runtime.max_data_ckpt_nums` (`save_total_limit`) and `runtime.enable_resume_training: true`
(`resume: auto`).
"""
SECTIONS = (
    ("`runtime_env`", "RuntimeEnvConfig"),
    ("`models.<name>`", "ModelConfig"),
    ("`models.<name>.generation`", "GenerationConfig"),
    ("`models.<name>.lora`", "LoraConfig"),
    ("`runtime`", "RuntimeConfig"),
    ("`runtime.data_path` entries", "DataSource"),
    ("`runtime.algorithm`", "AlgorithmConfig"),
    ("`runtime.guards`", "GuardsConfig"),
)


def render() -> str:
    """The text of the page."""
    definitions = Config.model_json_schema()["$defs"]
    parts = [INTRODUCTION]
    for title, name in SECTIONS:
        definition = definitions[name]
        rows = [_row(key, field) for key, field in definition["properties"].items()]
        text = f"## {title}\n\n{definition['description']}\n"
        parts += [text, _table(("key", "type", "default", "meaning"), rows)]
        if name == "ModelConfig":
            parts += [_megatron_text(), _model_field_table(), *_refused_fields()]
    refused = [
        (f"`{_path(section)}{key}`", remedy.replace("<", "&lt;"))
        for section, keys in UNSUPPORTED.items()
        for key, remedy in sorted(keys.items())
    ]
    parts += [UNSUPPORTED_TEXT, _table(("key", "instead"), refused)]
    return "\n".join(parts)


def _row(key: str, field: dict[str, Any]) -> tuple[str, ...]:
    if "$ref" in field:
        return (f"`{key}`", "section", "", f"{field['description']}; see below")
    default = _show(field.get("default"))
    return (f"`{key}`", _describe_type(field), default, field["description"])


def _describe_type(field: dict[str, Any]) -> str:
    """Plain words for a JSON schema."""
    if "anyOf" in field:
        kinds = [_describe_type(arm) for arm in field["anyOf"] if arm.get("type") != "null"]
        return " or ".join(kinds)
    if "$ref" in field:
        return "section"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field["type"] == "array":
        return f"list of {_describe_type(field['items'])}"
    names = {"string": "text", "boolean": "true or false", "object": "mapping"}
    kind = names.get(field["type"], str(field["type"]))
    bounds = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    )
    limits = [f"{word} {field[bound]:g}" for bound, word in bounds if bound in field]
    return ", ".join([kind, *limits])


def _show(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _megatron_text() -> str:
    names = [f"`{name}`" for name in MEGATRON_FIELDS]
    classes = ", ".join(names[:-1]) + f" and {names[-1]}"
    count = len({field for fields in MEGATRON_FIELDS.values() for field in fields})
    return MEGATRON.format(classes=classes, count=count)


def _refused_fields() -> tuple[str, str]:
    names = {name for group in MEGATRON_FIELDS.values() for name in group}
    rows = {f"`{name}`": remedy for name, remedy in REFUSED_FIELDS.items()}
    rows |= {f"`{prefix}*`": remedy for prefix, remedy in REFUSED_PREFIXES.items()}
    count = sum(why_refused(name) is not None for name in names)
    return REFUSED_TEXT.format(count=count), _table(("key", "instead"), sorted(rows.items()))


def _model_field_table() -> str:
    words = {
        "int": "integer",
        "float": "number",
        "str": "text",
        "bool": "true or false",
        "dict": "mapping",
    }
    rows = [
        (
            f"`{name}`",
            " or ".join(words[kind] for kind in field.kinds),
            _show(field.default),
            field.meaning,
        )
        for name, field in MODEL_FIELDS.items()
    ]
    return _table(("key", "type", "default", "meaning"), rows)


def _path(section: str) -> str:
    return {"models": "models.<name>.", "": ""}.get(section, f"{section}.")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    # A bar would end the cell.
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` compare it."""
    text = render()
    if arguments == ["--check"]:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"{TARGET} is not current: run {COMMAND}", file=sys.stderr)
        return 1
    if arguments:
        print(f"got {arguments}, expected nothing or --check", file=sys.stderr)
        return 2
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
