"""Renamings: partition checks, inverse, and where every element of a local tensor ends."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.errors import SyncError
from chatlearn.parallel.renaming import Piece, Region, Renaming
from chatlearn.parallel.sharding import Box, TensorShard


def piece(old, new):
    """Each side: key, global shape, offset, shape."""
    return Piece(*(Region(key, whole, Box(at, size)) for key, whole, at, size in (old, new)))


def shard(key, whole, box, local_offset, local_name="local"):
    return TensorShard(key, whole, box, "float32", local_name, local_offset)


# Two stacked layers of a fused tensor with 4 rows of "q" and 2 of "k".
FUSED = (2, 6, 3)
SPLIT = Renaming(
    tuple(
        piece(
            ("qk", FUSED, (layer, at, 0), (1, rows, 3)),
            (f"{layer}.{name}", (rows, 3), (0, 0), (rows, 3)),
        )
        for layer in range(2)
        for name, at, rows in (("q", 0, 4), ("k", 4, 2))
    )
)


def test_a_slice_of_a_stacked_layer_gets_a_name_of_its_own():
    held = shard("qk", FUSED, Box((1, 2, 0), (1, 3, 3)), (0, 0))
    assert SPLIT.apply([held]) == (
        shard("1.q", (4, 3), Box((2, 0), (2, 3)), (0, 0)),
        shard("1.k", (2, 3), Box((0, 0), (1, 3)), (2, 0)),
    )


def test_the_inverse_joins_the_slices_again():
    held = shard("1.k", (2, 3), Box((1, 0), (1, 3)), (0, 0))
    (joined,) = SPLIT.inverse().apply([held])
    assert joined == shard("qk", FUSED, Box((1, 5, 0), (1, 1, 3)), (0, 0))


def test_the_inverse_of_the_inverse_is_the_renaming():
    assert SPLIT.inverse() != SPLIT
    assert SPLIT.inverse().inverse() == SPLIT


def test_a_scalar_can_be_renamed():
    renaming = Renaming(
        (
            piece(("a", (), (), ()), ("b", (2,), (0,), (1,))),
            piece(("c", (), (), ()), ("b", (2,), (1,), (1,))),
        )
    )
    held = shard("c", (), Box((), ()), ())
    assert renaming.apply([held]) == (shard("b", (2,), Box((1,), (1,)), ()),)


PINWHEEL = [
    ((0, 0), (1, 2)),
    ((0, 2), (2, 1)),
    ((2, 1), (1, 2)),
    ((1, 0), (2, 1)),
    ((1, 1), (1, 1)),
]


def test_interlocked_boxes_are_a_partition():
    renaming = Renaming(
        tuple(
            piece(("a", (3, 3), at, size), (str(number), size, (0, 0), size))
            for number, (at, size) in enumerate(PINWHEEL)
        )
    )
    found = renaming.apply([shard("a", (3, 3), Box((1, 1), (1, 2)), (0, 0))])
    assert {(s.key, s.box.shape) for s in found} == {("1", (1, 1)), ("4", (1, 1))}


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([((0,), (2,)), ((3,), (1,))], "^a: the pieces leave a hole: 3 of 4"),
        ([((0,), (3,)), ((2,), (2,))], r"^a: two pieces overlap, at Box\(offset=\(2,\)"),
        ([((0,), (2,)), ((0,), (2,))], "^a: two pieces overlap"),
        ([((0,), (2,)), ((2,), (3,))], "^a: Box.* lies outside the shape"),
        ([((0,), (4,)), ((0,), (0,))], r"Box\(offset=\(0,\), shape=\(0,\)\) is empty"),
    ],
)
def test_pieces_that_do_not_part_a_tensor_are_refused_on_either_side(pieces, message):
    made = [
        piece(("a", (4,), at, size), (str(number), size, (0,), size))
        for number, (at, size) in enumerate(pieces)
    ]
    with pytest.raises(SyncError, match=message):
        Renaming(tuple(made))
    with pytest.raises(SyncError, match=message):
        Renaming(tuple(Piece(each.new, each.old) for each in made))


def test_pieces_of_unequal_shape_are_refused():
    with pytest.raises(SyncError, match=r"a and b: a piece has the shapes \(2, 3\) and \(3, 2\)"):
        Renaming((piece(("a", (2, 3), (0, 0), (2, 3)), ("b", (3, 2), (0, 0), (3, 2))),))


def test_pieces_that_disagree_on_a_shape_are_refused():
    with pytest.raises(SyncError, match=r"a: pieces say it has the shape \(4,\) and \(5,\)"):
        Renaming(
            (
                piece(("a", (4,), (0,), (2,)), ("b", (2,), (0,), (2,))),
                piece(("a", (5,), (2,), (2,)), ("c", (2,), (0,), (2,))),
            )
        )


def test_an_unknown_tensor_is_named():
    with pytest.raises(SyncError, match="bias: this renaming knows no such tensor"):
        SPLIT.apply([shard("bias", (3,), Box((0,), (3,)), (0,))])


def test_a_tensor_of_another_shape_is_named():
    with pytest.raises(SyncError, match=r"qk: got the shape \(2, 6, 4\), .* \(2, 6, 3\)"):
        SPLIT.apply([shard("qk", (2, 6, 4), Box((0, 0, 0), (1, 6, 4)), (0, 0))])


def test_a_box_outside_its_tensor_is_refused():
    with pytest.raises(SyncError, match="qk: .* lies outside its shape"):
        SPLIT.apply([shard("qk", FUSED, Box((1, 4, 0), (1, 3, 3)), (0, 0))])


def test_a_local_tensor_with_more_axes_than_the_new_tensor_is_refused():
    stacked = shard("qk", FUSED, Box((0, 0, 0), FUSED), (0, 0, 0))
    with pytest.raises(SyncError, match="the local tensor local has 3 axes and 0.q only 2"):
        SPLIT.apply([stacked])


@st.composite
def cuts(draw, size):
    """Bounds of consecutive intervals that cover `size`."""
    inner = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
    return list(itertools.pairwise([0, *sorted(inner), size]))


@st.composite
def grids(draw, whole):
    """Boxes that part a tensor: a grid of random cuts."""
    axes = [draw(cuts(size)) for size in whole]
    return [
        Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell))
        for cell in itertools.product(*axes)
    ]


@st.composite
def renamings(draw):
    """Stacked tensors, each cut to a grid whose blocks are permuted into new tensors."""
    pieces = []
    for key in ("a", "b"):
        whole = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=3)))
        layers = draw(st.integers(1, 3))
        for layer in range(layers):
            for box in draw(grids(whole)):
                old = Region(key, (layers, *whole), Box((layer, *box.offset), (1, *box.shape)))
                pieces.append((old, box.shape))
    # Blocks of one shape are stacked, in any order, along a new tensor's first axis.
    by_shape = {}
    for old, size in draw(st.permutations(pieces)):
        by_shape.setdefault(size, []).append(old)
    return Renaming(
        tuple(
            Piece(
                old,
                Region(
                    f"new{size}",
                    (len(group) * size[0], *size[1:]),
                    Box((number * size[0], *(0,) * (len(size) - 1)), size),
                ),
            )
            for size, group in by_shape.items()
            for number, old in enumerate(group)
        )
    )


def elements(shards):
    """For each element of a local tensor, the global element that it is."""
    found = {}
    for each in shards:
        lead = len(each.box.shape) - len(each.local_offset)
        for index in itertools.product(*(range(n) for n in each.box.shape)):
            local = tuple(at + i for at, i in zip(each.local_offset, index[lead:], strict=True))
            at = (each.local_name, local)
            assert at not in found
            found[at] = (each.key, *(a + i for a, i in zip(each.box.offset, index, strict=True)))
    return found


@given(renamings(), st.data())
def test_a_renaming_and_its_inverse_give_every_element_back(renaming, data):
    wholes = {p.old.key: p.old.global_shape for p in renaming.pieces}
    given_shards = []
    for key, whole in wholes.items():
        for number, box in enumerate(data.draw(grids(whole[1:]))):
            for layer in range(whole[0]):
                part = Box((layer, *box.offset), (1, *box.shape))
                # Each lies somewhere in a local tensor, not at its beginning.
                offset = tuple(range(1, len(whole)))
                given_shards.append(shard(key, whole, part, offset, f"{key}{layer}.{number}"))
    renamed = renaming.apply(given_shards)
    moved = {}
    for each in renaming.pieces:
        shift = len(each.old.box.shape) - len(each.new.box.shape)
        for index in itertools.product(*(range(n) for n in each.old.box.shape)):
            old = (each.old.key, *(a + i for a, i in zip(each.old.box.offset, index, strict=True)))
            at = zip(each.new.box.offset, index[shift:], strict=True)
            moved[old] = (each.new.key, *(a + i for a, i in at))
    before, after = elements(given_shards), elements(renamed)
    assert after == {at: moved[old] for at, old in before.items()}
    assert elements(renaming.inverse().apply(renamed)) == before
    assert renaming.inverse().inverse() == renaming


def test_sixty_layers_of_256_experts_take_seconds():
    """Every expert has a name of its own, and gate and up are two tensors: 30,720 pieces."""
    layers, experts, rows, columns = 60, 256, 4096, 7168
    whole = (layers, experts, rows, columns)
    half = (rows // 2, columns)
    pieces = [
        piece(
            ("fc1", whole, (layer, expert, part * half[0], 0), (1, 1, *half)),
            (f"{layer}.{expert}.{name}", half, (0, 0), half),
        )
        for layer in range(layers)
        for expert in range(experts)
        for part, name in enumerate(("gate", "up"))
    ]
    shards = [
        shard("fc1", whole, Box((layer, expert, 0, 0), (1, 1, rows, columns)), (0, 0))
        for layer in range(layers)
        for expert in range(experts)
    ]
    start_s = time.perf_counter()
    renaming = Renaming(tuple(pieces))
    renamed = renaming.apply(shards)
    assert len(renaming.inverse().apply(renamed)) == 2 * len(shards)
    assert time.perf_counter() - start_s < 20
