# pyright: standard, reportPrivateImportUsage=false
"""What transformers and Megatron compute from the same folder, side by side.

The models are made by transformers itself, tiny and random. What a rank measures is a function of
the folder and the layout, so that tests and the command line run the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chatlearn.data.rows import RowId
from chatlearn.parallel.sharding import Box
from megatron_adapters import PolicyInference, PolicyReference, PolicyTrainer
from megatron_adapters.batches import read_rows
from megatron_adapters.conversion.worlds import LayoutCase, World, build_module
from megatron_adapters.model_building import unwrap
from megatron_adapters.packing import PackedBatch
from megatron_adapters.weights.config_file import CONFIG_FILE
from megatron_adapters.weights.safetensors_folder import SafetensorsFolder

__all__ = [
    "GradientPart",
    "ParityRow",
    "compare_exports",
    "export_again",
    "generate_greedily",
    "layouts_of",
    "make_sequences",
    "measure_family",
    "measure_gradients",
    "measure_logits",
    "to_json",
    "transformers_gradients",
    "transformers_logits",
]

TP2 = LayoutCase("TP 2", 2, {"tensor_model_parallel_size": 2})
PP2 = LayoutCase("PP 2", 2, {"pipeline_model_parallel_size": 2})
EP2 = LayoutCase("EP 2", 2, {"expert_model_parallel_size": 2})
ONE = LayoutCase("one rank", 1, {})
NUM_SEQUENCES = 64


@dataclass(frozen=True)
class ParityRow:
    """One family at one layout.

    Attributes:
        family: its name.
        layout: its name.
        max_logit_difference: largest absolute difference to transformers', float32.
        export_identical: loaded and written again, every file's tensors are bit for bit the same.
    """

    family: str
    layout: str
    max_logit_difference: float
    export_identical: bool


@dataclass(frozen=True)
class GradientPart:
    """A part of a parameter's gradient.

    Attributes:
        name: of the parameter, transformers'.
        box: of it.
        values: of the box's elements.
    """

    name: str
    box: Box
    values: torch.Tensor


def layouts_of(family: str) -> tuple[LayoutCase, ...]:
    """The layouts that a family is measured at."""
    has_experts = family in ("mixtral", "qwen3_moe", "deepseek_v3")
    return (ONE, TP2, PP2, *((EP2,) if has_experts else ()))


def make_sequences(
    vocab_size: int, count: int = NUM_SEQUENCES, seed: int = 0
) -> list[torch.Tensor]:
    """Random sequences of 6 to 24 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 25, (count,), generator=draw).tolist()
    return [torch.randint(3, vocab_size, (length,), generator=draw) for length in lengths]


def transformers_logits(model: Any, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[tokens - 1, vocabulary] float32 of each sequence, without padding."""
    with torch.no_grad():
        return [model(ids[None]).logits[0, :-1].float() for ids in sequences]


def measure_logits(
    folder: str, layout: Mapping[str, Any], sequences: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What this rank's world says of the sequences, by the scoring path.

    Returns:
        On ranks of the last stage as `transformers_logits`; elsewhere nothing.
    """
    fields = {"pretrained": folder, "bf16": False, **layout}
    module = build_module(PolicyReference, "policy", fields)
    data = {
        "prompt_token_ids": [ids[:1] for ids in sequences],
        "response_token_ids": [ids[1:] for ids in sequences],
    }
    module.row_ids = [RowId(number, 0) for number in range(len(sequences))]
    with _captured_logits(module) as seen:
        module.forward_step(data)
    found = [row for batch, parts in seen for row in _rows_of(batch, torch.cat(parts))]
    # It scores in parts, whose rows need not stand in the order of the batch.
    return module.cut(read_rows(data)).restore(found) if found else found


def _rows_of(batch: PackedBatch, logits: torch.Tensor) -> list[torch.Tensor]:
    """By row and token, as the batch places them."""
    rows, width = batch.grid_shape
    grid = logits.new_zeros((rows * width, logits.shape[-1]))
    grid[batch.places] = logits[: len(batch.places)]
    lengths = batch.mask.sum(dim=1).tolist()
    whole = grid.view(rows, width, -1)
    return [whole[row, :length].clone() for row, length in enumerate(lengths)]


_Seen = list[tuple[PackedBatch, list[torch.Tensor]]]


@contextmanager
def _captured_logits(module: Any) -> Iterator[_Seen]:
    """What the output layer gives while the module scores, over the whole vocabulary, by batch."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    seen: _Seen = []
    model = unwrap(module.model[-1])
    head = getattr(model, "output_layer", None)
    if head is None:
        yield seen
        return

    def begin(_model: Any, inputs: Any) -> None:
        seen.append((inputs[0], []))

    def keep(_layer: Any, _inputs: Any, output: Any) -> None:
        whole: Any = gather_from_tensor_model_parallel_region(output[0][:, 0])
        seen[-1][1].append(whole[:, : module.settings.shape.vocab_size].float())

    handles = [model.register_forward_pre_hook(begin), head.register_forward_hook(keep)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def measure_gradients(
    folder: str, layout: Mapping[str, Any], sequences: Sequence[torch.Tensor]
) -> list[GradientPart]:
    """The gradient of the mean negative log-probability of all tokens but the first ones.

    Returns:
        What this rank holds.
    """
    fields = {"pretrained": folder, "bf16": False, "clip_grad": 0.0, "lr": 0.0, **layout}
    module = build_module(PolicyTrainer, "policy", fields)
    module.row_ids = [[RowId(number, 0) for number in range(len(sequences))]]
    module.train_step(
        [
            {
                "prompt_token_ids": [ids[:1] for ids in sequences],
                "response_token_ids": [ids[1:] for ids in sequences],
            }
        ]
    )
    gradients = {
        f"{number}.{name}": parameter.main_grad
        for number, chunk in enumerate(module.model)
        for name, parameter in unwrap(chunk).named_parameters()
    }
    return [
        GradientPart(
            shard.key, shard.box, gradients[shard.local_name][shard.local_slices()].clone()
        )
        for shard in module.weight_shards_in("huggingface")
        if shard.local_name in gradients
    ]


def transformers_gradients(
    model: Any, sequences: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same of a transformers model, by parameter."""
    model.zero_grad()
    losses: list[torch.Tensor] = []
    for ids in sequences:
        logprobs = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        losses.append(-logprobs.gather(-1, ids[1:, None])[:, 0])
    torch.cat(losses).mean().backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def generate_greedily(
    folder: str, layout: Mapping[str, Any], prompts: Sequence[torch.Tensor], num_tokens: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt, by the generator."""
    fields = {
        "pretrained": folder,
        "bf16": False,
        "generation": {"temperature": 0.0, "max_new_tokens": num_tokens},
        **layout,
    }
    module = build_module(PolicyInference, "policy", fields)
    module.row_ids = [RowId(number, 0) for number in range(len(prompts))]
    found = module.forward_step({"prompt_token_ids": list(prompts)})
    return [ids.tolist() for ids in found["response_token_ids"]]


def export_again(folder: str, layout: Mapping[str, Any], target: str) -> None:
    """Load a folder and write it to another one."""
    fields = {"pretrained": folder, "bf16": False, **layout}
    build_module(PolicyReference, "policy", fields).save_huggingface(Path(target))


def compare_exports(one: str | Path, other: str | Path) -> bool:
    """Whether two folders have the same config.json and tensors, bit for bit."""
    with SafetensorsFolder(one) as a, SafetensorsFolder(other) as b:
        if set(a.names) != set(b.names):
            return False
        for name in a.names:
            if a.dtype_of(name) != b.dtype_of(name) or a.shape_of(name) != b.shape_of(name):
                return False
            x, y = a.read_whole(name), b.read_whole(name)
            if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
                return False
    texts = [(Path(folder) / CONFIG_FILE).read_text(encoding="utf-8") for folder in (one, other)]
    return json.loads(texts[0]) == json.loads(texts[1])


def measure_family(
    family: str, folder: Path, model: Any, worlds: Mapping[int, World], scratch: Path
) -> Iterator[ParityRow]:
    """The rows of a family's table.

    Args:
        family: its name.
        folder: the model, saved.
        model: the model, live.
        worlds: by size.
        scratch: an empty folder for exports.
    """
    sequences = make_sequences(model.config.get_text_config().vocab_size)
    expected = transformers_logits(model, sequences)
    for case in layouts_of(family):
        world = worlds[case.world_size]
        found = world.run(measure_logits, str(folder), dict(case.fields), sequences)[-1]
        gap = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        target = scratch / case.name.replace(" ", "-")
        world.run(export_again, str(folder), dict(case.fields), str(target))
        yield ParityRow(family, case.name, gap, compare_exports(folder, target))


def to_json(rows: Sequence[ParityRow]) -> str:
    """One line of JSON."""
    return json.dumps({"rows": [asdict(row) for row in rows]})
