"""Endpoints of small models, by hand and at random, for the tests of the planner."""

from itertools import pairwise, product

from hypothesis import strategies as st

from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.records import Endpoint

BYTES = {"float32": 4, "bfloat16": 2}


def shard(key, shape, offset, size, *, dtype="float32"):
    box = Box(tuple(offset), tuple(size))
    name = f"local.{key}.{offset}"
    return TensorShard(key, tuple(shape), box, dtype, name, (0,) * len(size))


def endpoint(name, rank, shards, *, replica=0, node="n0", process=None, device="", frozen=()):
    process_id = process if process is not None else hash((name, replica, rank))
    return Endpoint(name, replica, rank, node, process_id, tuple(shards), device, frozenset(frozen))


def halves(name, **options):
    return [
        endpoint(name, rank, [shard("w", (4, 2), (2 * rank, 0), (2, 2))], **options)
        for rank in (0, 1)
    ]


def whole(name, rank=0, **options):
    return endpoint(name, rank, [shard("w", (4, 2), (0, 0), (4, 2))], **options)


def whole_vector(name, length, rank=0, **options):
    return endpoint(name, rank, [shard("w", (length,), (0,), (length,))], **options)


def grid(shape, cuts):
    """Boxes of a tensor that is cut at the given places of each axis."""
    axes = []
    for length, places in zip(shape, cuts, strict=True):
        edges = sorted({0, length, *(place % length for place in places)})
        axes.append([(a, b - a) for a, b in pairwise(edges)])
    for combination in product(*axes):
        yield tuple(a for a, _ in combination), tuple(n for _, n in combination)


@st.composite
def models(draw, max_copies=3):
    """Source and destination ranks that cut the same tensors at random places.

    A source has data-parallel copies, a destination replicas; ranks lie on random nodes, in
    processes and on devices that some of them share.
    """
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=3))
    sides = []
    for name, is_source in (("trainer", True), ("policy", False)):
        num_ranks = draw(st.integers(1, 4))
        dtypes = [draw(st.sampled_from(sorted(BYTES))) for _ in shapes]
        held = [[] for _ in range(num_ranks)]
        for number, shape in enumerate(shapes):
            cuts = [draw(st.lists(st.integers(0, 5), max_size=2)) for _ in shape]
            for offset, size in grid(shape, cuts):
                piece = shard(f"w{number}", shape, offset, size, dtype=dtypes[number])
                held[draw(st.integers(0, num_ranks - 1))].append(piece)
        ranks = []
        for copy in range(draw(st.integers(1, max_copies))):
            for rank, own in enumerate(held):
                place = draw(st.integers(0, 5))
                ranks.append(
                    endpoint(
                        name,
                        rank + copy * num_ranks * is_source,
                        own,
                        replica=0 if is_source else copy,
                        node=f"n{draw(st.integers(0, 3))}",
                        process=place,
                        device=draw(st.sampled_from(["", f"d{place % 2}"])),
                    )
                )
        sides.append(ranks)
    return sides
