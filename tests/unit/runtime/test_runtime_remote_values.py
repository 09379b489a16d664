"""Remote values within arguments are replaced by what they stand for."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from chatlearn.runtime.contract import RemoteValue
from chatlearn.runtime.remote_values import resolve_arguments


@dataclass(frozen=True)
class Record:
    name: str
    parts: Any
    more: dict[str, Any] = field(default_factory=dict)


class Store:
    """Gives 10 times the handle, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, handles):
        self.asked.append(handles)
        return [10 * handle for handle in handles]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (RemoteValue(1), 10),
        ([RemoteValue(1), 2], [10, 2]),
        ((RemoteValue(1), "x"), (10, "x")),
        ({"a": {"b": (RemoteValue(3),)}}, {"a": {"b": (30,)}}),
        (Record("r", [RemoteValue(1)], {"k": RemoteValue(2)}), Record("r", [10], {"k": 20})),
    ],
)
def test_values_stand_in_their_place_whatever_holds_them(argument, expected):
    assert resolve_arguments([argument, 7], Store()) == (expected, 7)


def test_everything_is_fetched_in_one_go_and_once():
    store = Store()
    value = RemoteValue(1)
    assert resolve_arguments([value, [value, RemoteValue(2)]], store) == (10, [10, 20])
    assert store.asked == [[1, 2]]


def test_arguments_without_remote_values_are_left_as_they_are():
    store = Store()
    record, items = Record("r", [1]), [1, 2]
    found = resolve_arguments([record, items, RemoteValue], store)
    assert found[0] is record
    assert found[1] is items
    assert found[2] is RemoteValue
    assert store.asked == []


def test_parts_that_hold_no_remote_value_keep_their_identity():
    inner = [1, 2]
    found = resolve_arguments([{"a": inner, "b": RemoteValue(1)}], Store())[0]
    assert found == {"a": [1, 2], "b": 10}
    assert found["a"] is inner


def test_the_argument_itself_is_not_changed():
    argument = {"a": [RemoteValue(1)]}
    resolve_arguments([argument], Store())
    assert argument == {"a": [RemoteValue(1)]}
