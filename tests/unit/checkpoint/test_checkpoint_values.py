"""Plain values and random generators come back as they were, and nothing else does."""

import os
import pickle
import random

import numpy as np
import pytest
import torch

from chatlearn.checkpoint.generators import read_generators, restore_generators
from chatlearn.checkpoint.plain_values import load_plain, save_plain
from chatlearn.data.rows import RowId
from chatlearn.errors import CheckpointError


def test_values_come_back(tmp_path):
    value = {
        "tensor": torch.tensor([1.5, float("nan")]).bfloat16(),
        "numbers": [1, -2.5, True, None],
        "text": "ä",
        3: (b"bytes", {"deep": [[]]}),
        "array": np.arange(3, dtype=np.int16)[::-1],
        "number": np.float32(0.5),
        "row_id": RowId(4, 1),
    }
    save_plain(tmp_path / "a" / "value.pt", value, "the value")
    found = load_plain(tmp_path / "a" / "value.pt")
    assert torch.equal(found["tensor"].nan_to_num(), value["tensor"].nan_to_num())
    assert found["numbers"] == value["numbers"]
    assert found[3] == value[3]
    assert isinstance(found["array"], np.ndarray)
    assert (found["array"].tolist(), found["array"].dtype) == ([2, 1, 0], np.int16)
    assert (found["number"], type(found["number"])) == (0.5, np.float32)
    assert found["row_id"] == (4, 1)


def test_what_is_not_plain_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"rows\[0\]\['lock'\] is a object, which cannot"):
        save_plain(tmp_path / "value.pt", [{"lock": object()}], "rows")
    assert list(tmp_path.iterdir()) == []


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("content", [pickle.dumps(Attack()), b"", b"nonsense", None])
def test_a_file_that_holds_something_else_is_refused_and_not_run(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is None:
        torch.save(Attack(), tmp_path / "value.pt")
    else:
        (tmp_path / "value.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"value.pt cannot be loaded"):
        load_plain(tmp_path / "value.pt")
    assert not (tmp_path / "attacked").exists()


def draw():
    return random.random(), float(np.random.rand()), np.random.randn(), torch.rand(2).tolist()


def test_generators_go_on_where_they_stood(tmp_path):
    np.random.randn()
    save_plain(tmp_path / "g.pt", read_generators(), "generators")
    expected = [draw(), draw()]
    draw()
    restore_generators(load_plain(tmp_path / "g.pt"))
    assert [draw(), draw()] == expected


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_damaged_generators_are_refused(name):
    states = read_generators()
    with pytest.raises(CheckpointError, match="random generators is damaged"):
        restore_generators({**states, name: [1, 2]})
