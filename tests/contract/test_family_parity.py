"""Every family computes what transformers computes, and leaves as it came."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from long_forms import every

pytest.importorskip("transformers")
from megatron_adapters.conversion import parity
from megatron_adapters.conversion.tiny_models import TINY_MODELS, build_tiny_model

# Stages are the same for all: in the short form two families show them.
STAGED = ("gemma3", "deepseek_v3")


def marks_of(family, layout):
    return () if family in STAGED or layout != "PP 2" else pytest.mark.long


CASES = [
    pytest.param(family, case, id=f"{family}-{case.name}", marks=marks_of(family, case.name))
    for family in TINY_MODELS
    for case in parity.layouts_of(family)
]


PROMPTS = [torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 14)]


@dataclass(frozen=True)
class Saved:
    folder: Path
    model: Any

    @cached_property
    def continued(self):
        return [likeliest(self.model, prompt, 64) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The saved models, their live twins and what these continue, by family, each made once."""
    made = {}

    def make(family):
        if family not in made:
            model = build_tiny_model(family)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = Saved(folder, model)
        return made[family]

    return make


@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_are_those_of_transformers_and_the_export_is_identical(
    ranks, folders, tmp_path, family, case
):
    folder, model = folders(family).folder, folders(family).model
    sequences = parity.make_sequences(model.config.vocab_size)
    expected = parity.transformers_logits(model, sequences)
    args = (str(folder), dict(case.fields))
    found = ranks.run(case.world_size, measure, *args, sequences)[-1]
    gap = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    assert gap <= 1e-4
    assert max(float(row.std()) for row in expected) > 0.3
    ranks.run(case.world_size, export, *args, str(tmp_path / "out"))
    assert parity.compare_exports(folder, tmp_path / "out")


def measure(rank, *args):
    del rank
    return parity.measure_logits(*args)


def export(rank, *args):
    del rank
    parity.export_again(*args)


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {
    "pipeline_model_parallel_size": 2,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


CP2 = {"context_parallel_size": 2}
GRADIENT_CASES = [
    *((family, "TP 2") for family in TINY_MODELS),
    *(pytest.param(family, "PP 2", marks=marks_of(family, "PP 2")) for family in TINY_MODELS),
    ("gemma3", "CP 2"),
    ("deepseek_v3", "CP 2"),
]
LAYOUTS = {"TP 2": TP2, "PP 2": PP2, "CP 2": CP2}


@pytest.mark.parametrize(("family", "layout"), GRADIENT_CASES)
def test_gradients_are_those_of_transformers(ranks, folders, family, layout):
    folder, model = folders(family).folder, folders(family).model
    sequences = parity.make_sequences(model.config.vocab_size, count=8, seed=3)
    expected = parity.transformers_gradients(model, sequences)
    found = ranks.run(2, gradients, str(folder), LAYOUTS[layout], sequences)
    covered = dict.fromkeys(expected, 0)
    for part in (part for rank in found for part in rank):
        key, box, values = part.name, part.box, part.values
        slices = tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))
        wanted = expected[key][slices]
        assert values.view(wanted.shape) == pytest.approx(wanted, abs=1e-3 * scale(expected[key]))
        covered[key] += values.numel()
    assert all(count >= expected[key].numel() for key, count in covered.items())


def scale(gradient):
    return max(1e-3, float(gradient.abs().max()))


def gradients(rank, *args):
    del rank
    return parity.measure_gradients(*args)


GENERATING = [
    *every(2, [(family, parity.ONE) for family in TINY_MODELS]),
    ("gemma3", parity.TP2),
    pytest.param("deepseek_v3", parity.TP2, marks=pytest.mark.long),
    pytest.param("gemma3", parity.PP2, marks=pytest.mark.long),
    ("deepseek_v3", parity.PP2),
    ("mixtral", parity.EP2),
]


@pytest.mark.parametrize(("family", "case"), GENERATING)
def test_greedy_generation_is_that_of_transformers(ranks, folders, family, case):
    saved = folders(family)
    args = (str(saved.folder), dict(case.fields), PROMPTS, 64)
    assert ranks.run(case.world_size, generate, *args)[0] == saved.continued


def generate(rank, *args):
    del rank
    return parity.generate_greedily(*args)


def likeliest(model, prompt, count):
    """Token by token without a cache, so that nothing but the model can be at fault."""
    ids = prompt
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
    return ids[len(prompt) :].tolist()
