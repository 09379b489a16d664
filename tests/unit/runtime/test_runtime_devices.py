"""What devices there are, or are assumed."""

import pytest

from chatlearn.config import load_config
from chatlearn.errors import ConfigError
from chatlearn.runtime.devices import assume_inventory, discover_inventory
from chatlearn.runtime.placement import DeviceInventory


def with_devices_per_node(value):
    return load_config({"runtime": {"devices_per_node": value, "backend": "local"}})


@pytest.mark.parametrize(
    ("per_node", "assumed", "expected"),
    [
        ("auto", 64, DeviceInventory(8, 8, "gpu")),
        ("auto", 2, DeviceInventory(1, 2, "gpu")),
        (4, 12, DeviceInventory(3, 4, "gpu")),
    ],
)
def test_assumed_devices_stand_in_nodes(per_node, assumed, expected):
    assert assume_inventory(with_devices_per_node(per_node), assumed) == expected


def test_assumed_devices_that_fill_no_node_are_refused():
    with pytest.raises(ConfigError, match="12 assumed devices do not fill nodes of 8: .* of 8"):
        assume_inventory(with_devices_per_node("auto"), 12)
    with pytest.raises(ConfigError, match="at least 1 assumed device, got 0"):
        assume_inventory(with_devices_per_node("auto"), 0)


@pytest.mark.parametrize(("per_node", "expected"), [("auto", None), (4, 4)])
def test_logical_slots_stand_for_devices_where_there_is_no_gpu(monkeypatch, per_node, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = discover_inventory(with_devices_per_node(per_node))
    assert found == DeviceInventory(1, expected, "logical")


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    assert discover_inventory(with_devices_per_node("auto")) == DeviceInventory(1, 6, "gpu")
