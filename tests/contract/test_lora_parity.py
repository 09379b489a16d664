"""Adapters compute what PEFT computes, in every layout, and go back and forth as its files."""

import pytest
import torch

pytest.importorskip("peft")
import lora_cases
import peft
from transformers import AutoModelForCausalLM

from megatron_adapters.conversion import parity
from megatron_adapters.conversion.convert import ConversionOptions, convert
from megatron_adapters.conversion.tiny_models import build_tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LAYOUTS = {
    "one": (1, {}),
    "TP 2": (2, {"tensor_model_parallel_size": 2}),
    "TP 2, SP": (2, SP2),
    "PP 2, recompute": (2, {"pipeline_model_parallel_size": 2, **RECOMPUTE}),
    "DP 2": (2, {"use_distributed_optimizer": True}),
}


class Case:
    """A base model's folder, an adapter's, and PEFT's live model."""

    def __init__(self, folder, family, targets):
        self.base, self.adapter = folder / "base", folder / "adapter"
        build_tiny_model(family).save_pretrained(self.base)
        config = peft.LoraConfig(
            r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", use_rslora=True
        )
        model = AutoModelForCausalLM.from_pretrained(self.base, attn_implementation="eager")
        self.model = peft.get_peft_model(model, config).eval()
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                if "lora_" in name:
                    tensor.copy_(0.2 * torch.randn(tensor.shape, generator=draw))
        self.model.save_pretrained(self.adapter)
        self.sequences = parity.make_sequences(61, count=8, seed=9)

    def options(self, **layout):
        return {"pretrained": str(self.base), "lora": {"adapter": str(self.adapter)}, **layout}


@pytest.fixture(
    scope="module",
    params=["qwen2", pytest.param("llama3-some", marks=pytest.mark.long)],
)
def case(request, tmp_path_factory):
    family, _, some = request.param.partition("-")
    targets = ["q_proj", "v_proj", "up_proj"] if some else TARGETS
    return Case(tmp_path_factory.mktemp(family), family, targets)


@pytest.mark.parametrize("layout", ["one", "TP 2", "TP 2, SP", "PP 2, recompute"])
def test_scores_are_those_of_peft(ranks, case, layout):
    size, fields = LAYOUTS[layout]
    found = ranks.run(size, lora_cases.score, case.options(**fields), case.sequences)[-1]
    for ids, logprobs in zip(case.sequences, found, strict=True):
        with torch.no_grad():
            every = case.model(ids[None]).logits[0, :-1].log_softmax(-1)
        assert logprobs == pytest.approx(every.gather(-1, ids[1:, None])[:, 0], abs=1e-4)


@pytest.mark.parametrize("layout", ["one", "TP 2", "TP 2, SP", "PP 2, recompute"])
def test_gradients_are_those_of_peft_and_the_base_stands_still(ranks, case, layout):
    expected = parity.transformers_gradients(case.model, case.sequences)
    expected = {name.replace(".default.", "."): g for name, g in expected.items()}
    size, fields = LAYOUTS[layout]
    found = ranks.run(size, lora_cases.train, case.options(**fields), case.sequences)
    seen = set()
    for key, box, values in (entry for rank in found for entry in rank["gradients"]):
        slices = tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))
        wanted = expected[key][slices]
        assert values == pytest.approx(wanted, abs=1e-3 * float(expected[key].abs().max()))
        seen.add(key)
    assert seen == {name for name in expected if "lora_" in name}
    assert all(rank["is_base_still"] for rank in found)
    assert all(rank["has_moved"] for rank in found)


@pytest.mark.parametrize("layout", ["one", "TP 2, SP", "PP 2, recompute"])
def test_saved_adapters_are_loaded_by_peft(ranks, case, tmp_path, layout):
    size, fields = LAYOUTS[layout]
    ranks.run(size, lora_cases.save, case.options(**fields), str(tmp_path / "saved"))
    base = AutoModelForCausalLM.from_pretrained(case.base, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    ids = case.sequences[0][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, case.model(ids).logits)


@pytest.mark.parametrize("layout", ["one", "TP 2, SP", "PP 2, recompute"])
def test_merged_weights_are_those_of_peft(ranks, case, layout):
    size, fields = LAYOUTS[layout]
    base = AutoModelForCausalLM.from_pretrained(case.base)
    merged = peft.PeftModel.from_pretrained(base, case.adapter).merge_and_unload()
    wanted = merged.state_dict()
    for key, box, values in (
        entry
        for rank in ranks.run(size, lora_cases.merge, case.options(**fields))
        for entry in rank
    ):
        slices = tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))
        expected = wanted[key][slices]
        assert values.view(expected.shape) == pytest.approx(expected, abs=1e-6)


def test_every_layout_starts_and_trains_alike(ranks, case):
    options = {"pretrained": str(case.base), "lora": {"rank": 4}, "lr": 0.01}
    expected = ranks.run(1, lora_cases.steps, options, case.sequences)[0]
    for layout in ("TP 2, SP", "PP 2, recompute", "DP 2"):
        size, fields = LAYOUTS[layout]
        found = ranks.run(size, lora_cases.steps, {**options, **fields}, case.sequences)[-1]
        assert found == pytest.approx(expected, rel=1e-4)


def test_experts_have_adapters_on_every_expert_rank(ranks, tmp_path):
    build_tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    sequences = parity.make_sequences(61, count=8, seed=9)
    options = {"pretrained": str(tmp_path / "base"), "lora": {"rank": 4}, "lr": 0.01}
    expected = ranks.run(1, lora_cases.steps, options, sequences)[0]
    layout = {"expert_model_parallel_size": 2}
    found = ranks.run(2, lora_cases.steps, {**options, **layout}, sequences)[0]
    assert found == pytest.approx(expected, rel=1e-4)


def test_adapters_go_to_another_layout_with_a_checkpoint(ranks, case, tmp_path):
    ranks.run(2, lora_cases.checkpoint, case.options(**SP2), str(tmp_path / "saved"))
    plain = {"pretrained": str(case.base), "lora": lora_cases.section(case.adapter)}
    args = (plain, case.sequences, str(tmp_path / "saved"))
    found = ranks.run(1, lora_cases.score, *args)[-1]
    expected = ranks.run(1, lora_cases.score, case.options(), case.sequences)[-1]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_checkpoint_is_converted_merged_or_to_an_adapter(ranks, case, tmp_path):
    ranks.run(2, lora_cases.checkpoint, case.options(**SP2), str(tmp_path / "saved"))
    convert(tmp_path / "saved", tmp_path / "peft", ConversionOptions("peft"))
    convert(tmp_path / "saved", tmp_path / "hf", ConversionOptions("hf"))
    base = AutoModelForCausalLM.from_pretrained(case.base, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    ids = case.sequences[0][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, case.model(ids).logits)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, tensor in loaded.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)


def test_an_adapter_of_another_model_is_refused_by_name(ranks, case, tmp_path):
    build_tiny_model("qwen2", hidden_size=16).save_pretrained(tmp_path / "base")
    options = {"pretrained": str(tmp_path / "base"), "lora": {"adapter": str(case.adapter)}}
    with pytest.raises(AssertionError, match=r"adapter_model.safetensors is of another model"):
        ranks.run(1, lora_cases.score, options, case.sequences)
