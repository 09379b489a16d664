import pytest

from chatlearn.errors import PlacementError
from chatlearn.runtime.ray_placement import match_nodes

ORDER = {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3, (-1, 9): 4}


def test_devices_of_one_planned_node_are_on_one_node():
    found = match_nodes(ORDER, {0: "x", 1: "y", 2: "x", 3: "y", 4: "y"})
    assert found == {(-1, 9): 4, (0, 0): 0, (0, 1): 2, (1, 0): 1, (1, 1): 3}


def test_every_device_has_a_bundle_of_its_own():
    found = match_nodes(ORDER, {0: "x", 1: "x", 2: "x", 3: "x", 4: "x"})
    assert sorted(found.values()) == [0, 1, 2, 3, 4]


def test_nodes_without_room_for_a_planned_node_are_refused():
    with pytest.raises(PlacementError, match=r"on nodes as \[3, 1\]"):
        match_nodes(ORDER, {0: "x", 1: "x", 2: "x", 3: "y", 4: "y"})
