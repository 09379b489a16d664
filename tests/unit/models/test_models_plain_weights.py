"""Weights of a plain torch model by their state dict names."""

import os
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chatlearn.errors import ChatLearnError, CheckpointError, SyncError
from chatlearn.models.base import BaseModule
from chatlearn.models.plain_weights import (
    describe_huggingface,
    describe_state_dict,
    load_state,
    read_state,
    state_file_name,
    state_tensors,
    write_state,
)
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.parallel.sharding import Box, TensorShard

CPU = torch.device("cpu")


def build(seed) -> Any:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def test_every_tensor_is_described_as_a_whole():
    model, _ = build(0)
    shards = {shard.key: shard for shard in describe_state_dict("m", model)}
    assert shards["0.weight"] == TensorShard(
        "0.weight", (3, 2), Box((0, 0), (3, 2)), "float32", "0.weight", (0, 0)
    )
    assert shards["1.num_batches_tracked"] == TensorShard(
        "1.num_batches_tracked", (), Box((), ()), "int64", "1.num_batches_tracked", ()
    )


def test_writing_to_the_tensors_changes_the_model():
    model, _ = build(0)
    state_tensors("m", model)["0.bias"].fill_(7.0)
    assert model[0].bias.tolist() == [7.0, 7.0, 7.0]


@pytest.mark.parametrize("model", [None, "weights.pt"])
def test_a_sync_without_a_torch_model_says_what_to_do(model):
    with pytest.raises(
        ChatLearnError, match=r"model 'm' takes part .* build a torch module in set"
    ):
        state_tensors("m", model)


def test_model_and_optimizer_are_saved_and_loaded(tmp_path):
    model, optimizer = build(0)
    model(torch.ones(4, 2)).square().sum().backward()
    optimizer.step()
    write_state(tmp_path / "deep" / "model.pt", read_state(model, optimizer, 5))
    other, other_optimizer = build(1)
    load_state(tmp_path / "deep" / "model.pt", other, other_optimizer, CPU)
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    assert str(other_optimizer.state_dict()) == str(optimizer.state_dict())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.pt"]


def test_a_model_is_loaded_without_its_optimizer(tmp_path):
    model, _ = build(0)
    write_state(tmp_path / "model.pt", read_state(model, None, 0))
    other, optimizer = build(1)
    load_state(tmp_path / "model.pt", other, optimizer, CPU)
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "cannot be loaded"),
        (b"no checkpoint at all", "damaged, or holds more than tensors and numbers"),
        (pickle.dumps(SimpleNamespace, protocol=2), "cannot be loaded"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    path, (model, optimizer) = tmp_path / "model.pt", build(0)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_state(path, model, optimizer, CPU)


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize("content", ["pickle", "zip"])
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if content == "zip":
        torch.save({"model": Attack()}, "model.pt")
    else:
        (tmp_path / "model.pt").write_bytes(pickle.dumps(Attack(), protocol=2))
    with pytest.raises(CheckpointError, match="damaged, or holds more than tensors and numbers"):
        load_state(tmp_path / "model.pt", *build(0), CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_checkpoint_of_another_model_or_for_no_model_is_refused(tmp_path):
    write_state(tmp_path / "model.pt", read_state(build(0)[0], None, 0))
    with pytest.raises(CheckpointError, match="size mismatch|Missing key"):
        load_state(tmp_path / "model.pt", torch.nn.Linear(5, 5), None, CPU)
    with pytest.raises(CheckpointError, match=r"build self.model in setup\(\) first"):
        load_state(tmp_path / "model.pt", None, None, CPU)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_state(tmp_path / "taken" / "model.pt", read_state(build(0)[0], None, 0))


def test_each_part_of_a_cut_model_has_a_file_of_its_own():
    assert state_file_name(ParallelLayout(dp_size=4), 3) == "model.pt"
    layout = ParallelLayout(tp_size=2, pp_size=2, dp_size=2)
    names = {state_file_name(layout, rank) for rank in range(layout.world_size)}
    assert names == {f"model.tp{tp}.cp0.pp{pp}.pt" for tp in (0, 1) for pp in (0, 1)}


def test_a_module_on_the_driver_is_only_a_description():
    module: Any = BaseModule("policy")
    for name in ("context", "layout", "rank", "device", "module_args", "run_dir", "checkpoint_dir"):
        with pytest.raises(ChatLearnError, match="model 'policy' is only a description here"):
            getattr(module, name)


class Tied(torch.nn.Module):
    """Two layers; the model says, as transformers does, which weight may be tied to which."""

    all_tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self, *, is_tied):
        super().__init__()
        self.head = torch.nn.Linear(2, 2, bias=False)
        self.embed = torch.nn.Linear(2, 2, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("is_tied", "keys"), [(True, ["embed.weight"]), (False, ["head.weight", "embed.weight"])]
)
def test_tied_weights_are_described_once_under_the_name_they_are_tied_to(is_tied, keys):
    shards = describe_huggingface("m", Tied(is_tied=is_tied))
    assert [shard.key for shard in shards] == keys


def test_a_module_tells_its_weights_in_its_own_naming_only():
    module = BaseModule("m")
    module.model = Tied(is_tied=True)
    assert module.weight_shards_in("state_dict") == module.weight_shards()
    assert len(module.weight_shards()) == 2
    with pytest.raises(SyncError, match="in the naming 'huggingface', only in 'state_dict'"):
        module.weight_shards_in("huggingface")
    module.weight_naming = "huggingface"
    assert len(module.weight_shards_in("huggingface")) == 1
