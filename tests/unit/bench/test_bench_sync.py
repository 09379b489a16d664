"""The pure parts of the weight sync benchmark: arguments, lower bound, and the plans beside it."""

from __future__ import annotations

import pytest

from chatlearn.parallel.layout import ParallelLayout
from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.records import Endpoint
from scripts.bench.sync import parse_arguments
from scripts.bench.sync_bounds import LeastBytes, count_least_bytes
from scripts.bench.sync_gather import is_whole, plan_gather_broadcast, region_in_full
from scripts.bench.sync_megatron import list_group_ranks

SHAPE = (2, 8, 4)


def shard(layer, rows, name="w", dtype="bfloat16"):
    """Rows `rows` of one layer of a tensor [2 layers, 8, 4], whole in the local tensor."""
    start, stop = rows
    box = Box((layer, start, 0), (1, stop - start, 4))
    return TensorShard("layers.w", SHAPE, box, dtype, f"{name}{layer}", (0, 0))


def rank(model, number, *shards, node="a", process=None, replica=0):
    process_id = hash((model, replica, number)) if process is None else process
    return Endpoint(model, replica, number, node, process_id, tuple(shards))


def halves(model, **where):
    """TP2: each rank has half the rows of both layers."""
    return [
        rank(model, at, *(shard(layer, (4 * at, 4 * at + 4)) for layer in (0, 1)), **where)
        for at in (0, 1)
    ]


def whole(model, **where):
    return rank(model, 0, *(shard(layer, (0, 8)) for layer in (0, 1)), **where)


def test_arguments_have_defaults_and_name_the_cases():
    options = parse_arguments(["--json", "--cases", "tp2-to-tp1"])
    assert (options.json, options.cases, options.num_repeats) == (True, ["tp2-to-tp1"], 5)
    assert len(parse_arguments([]).cases) == 3


@pytest.mark.parametrize(
    "words", [["--cases", "tp9"], ["--num-repeats", "0"], ["--hidden-size", "100"]]
)
def test_arguments_that_cannot_be_are_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_every_other_process_needs_all_it_holds():
    takers = [whole("b", replica=0), whole("b", replica=1)]
    assert count_least_bytes(halves("a"), takers) == LeastBytes(2 * 64 * 2, 0)


def test_what_the_own_process_holds_needs_not_move():
    source = rank("a", 0, shard(0, (0, 8)), shard(1, (0, 8)), process=7)
    taker = rank("b", 0, shard(0, (2, 6)), shard(1, (0, 8)), process=7)
    other = rank("b", 1, shard(0, (0, 2)), shard(0, (6, 8), "x"), process=8)
    assert count_least_bytes([source], [taker, other]) == LeastBytes(16 * 2, 0)


def test_a_node_gets_each_element_once():
    takers = [whole("b", node="b", replica=0), whole("b", node="b", replica=1)]
    assert count_least_bytes(halves("a"), takers) == LeastBytes(2 * 64 * 2, 64 * 2)
    near = [*halves("a")[:1], *halves("a", node="b")[1:]]
    assert count_least_bytes(near, takers) == LeastBytes(2 * 64 * 2, 32 * 2)


def test_elements_travel_in_the_narrower_dtype():
    source = rank("a", 0, shard(0, (0, 8), dtype="float32"), shard(1, (0, 8), dtype="float32"))
    assert count_least_bytes([source], [whole("b")]) == LeastBytes(64 * 2, 0)


def test_gather_and_broadcast_takes_one_holder_of_each_part():
    copies = [*halves("a"), *halves("a")]
    found = plan_gather_broadcast([*copies, whole("b")], 4)
    assert [(p.shape, p.owner, sorted(p.parts), sorted(p.takers)) for p in found] == [
        ((8, 4), 0, [0, 1], [4]),
        ((8, 4), 0, [0, 1], [4]),
    ]
    (part,) = found[0].parts[1]
    assert region_in_full(part) == (slice(4, 8), slice(0, 4))
    assert not is_whole([part], 32)
    assert is_whole(found[0].takers[4], 32)


def test_replicas_count_as_data_parallel_copies():
    layout = ParallelLayout(tp_size=2)
    groups = list_group_ranks(layout, 2, 2)
    assert groups.tp == ((2, 3), (4, 5))
    assert groups.dp == ((2, 4), (3, 5))
    assert groups.pp == ((2,), (3,), (4,), (5,))
