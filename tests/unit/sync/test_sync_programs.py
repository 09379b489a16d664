"""What each rank does: cut from the plan, complete, and checked block by block."""

from math import prod

import pytest

from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.plan import plan_sync
from chatlearn.sync.programs import BLOCK_ELEMENTS, NUM_TURNS, build_programs, first_awaited
from chatlearn.sync.records import LINKS, Endpoint

NETWORK = LINKS.index("network")


def vector(name, length, node, *, rank=0, replica=0, process=None):
    shard = TensorShard("w", (length,), Box((0,), (length,)), "float32", f"{name}.w", (0,))
    number = process if process is not None else hash((name, replica, rank))
    return Endpoint(name, replica, rank, node, number, (shard,))


def programs_of(sources, destinations, **options):
    plan = plan_sync(sources, destinations, **options)
    return build_programs(plan, lambda hop: hop.link == NETWORK)


def test_a_near_rank_pulls_and_a_far_one_gets_messages():
    source, near, far = programs_of(
        [vector("a", 4, "n")], [vector("b", 4, "n"), vector("b", 4, "m", replica=1)]
    )
    assert (source.exported, source.lent) == ({"a.w"}, set())
    assert [(step.is_send, step.peer) for step in source.steps] == [(True, 2)]
    assert [(step.is_send, step.peer) for step in far.steps] == [(False, 0)]
    assert [pull.source for pull in near.pulls] == [0]
    assert near.pulls[0].source_parts[0].local_name == "a.w"
    assert (near.sources, far.sources, source.sources) == ({0}, {0}, set())


def test_models_of_one_process_lend_their_tensors():
    source, _ = programs_of([vector("a", 4, "n", process=1)], [vector("b", 4, "n", process=1)])
    assert (source.exported, source.lent) == (set(), {"a.w"})


def test_a_rank_that_passes_on_exports_its_own_tensor():
    programs = programs_of(
        [vector("a", 4, "n")], [vector("b", 4, "m", replica=replica) for replica in range(2)]
    )
    assert [program.exported for program in programs] == [set(), {"b.w"}, set()]
    assert programs[2].pulls[0].source == 1
    assert programs[2].sources == {0, 1}


@pytest.mark.parametrize("length", [1, BLOCK_ELEMENTS, 3 * BLOCK_ELEMENTS + 1])
def test_every_element_belongs_to_one_block_of_one_turn(length):
    source, taker = programs_of([vector("a", length, "n")], [vector("b", length, "m")])
    covered = [
        (part.start, part.stop)
        for turn in range(NUM_TURNS)
        for block in taker.blocks_of_turn(turn)
        for part in block.part.slices
    ]
    assert sum(stop - start for start, stop in covered) == length
    assert sorted(covered)[0][0] == 0
    assert all(stop - start <= BLOCK_ELEMENTS for start, stop in covered)
    assert [b.number for b in source.blocks] == [b.number for b in taker.blocks]


def test_blocks_of_large_tensors_spread_over_the_turns():
    length = 100 * BLOCK_ELEMENTS
    _, taker = programs_of([vector("a", length, "n")], [vector("b", length, "n")])
    counts = [len(taker.blocks_of_turn(turn)) for turn in range(NUM_TURNS)]
    assert (min(counts), max(counts)) == (1, 2)


def test_blocks_lie_within_their_piece():
    shape = (3, 700, 900)
    shard = TensorShard("w", shape, Box((0, 0, 0), shape), "bfloat16", "w", (0, 0, 0))
    ranks = [Endpoint(name, 0, 0, "n", number, (shard,)) for number, name in enumerate("ab")]
    _, taker = programs_of(ranks[:1], ranks[1:], bucket_bytes=1 << 20)
    sizes = [prod(s.stop - s.start for s in block.part.slices) for block in taker.blocks]
    assert sum(sizes) == prod(shape)
    assert max(sizes) <= BLOCK_ELEMENTS


def test_the_tensor_that_others_await_is_known():
    programs = programs_of([vector("a", 4, "n")], [vector("b", 4, "n")])
    assert first_awaited(programs) == {0: "w"}


def test_large_pieces_are_messages_of_their_own():
    shards = tuple(
        TensorShard(f"w{number}", (size,), Box((0,), (size,)), "float32", f"w{number}", (0,))
        for number, size in enumerate((10, 20, 1 << 17, 30))
    )
    ranks = [Endpoint(name, 0, 0, name, number, shards) for number, name in enumerate("ab")]
    source, taker = programs_of(ranks[:1], ranks[1:])
    for program in (source, taker):
        names = [[part.local_name for part in step.parts] for step in program.steps]
        assert names == [["w0", "w1"], ["w2"], ["w3"]]
        assert [step.message for step in program.steps] == [(0, 0), (0, 1), (0, 2)]
