"""The digest sees every bit of a tensor and where it stands."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.sync import digest
from chatlearn.sync.digest import compute_digest, compute_digests, has_equal_bits, hash_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64]
# As a GPU takes them: what fills rows, words of eight bytes or neither, a panel and more than one.
SHAPES = [(), (0,), (1,), (3, 5), (7,), (1022,), (2048,), (4, 512), (64, 32), (3, 1000, 2)]
SHAPES += [(95, 352), (1 << 20,), (2048, 1024), (2049, 1024), (3, 1 << 20)]
WIDE = [torch.float8_e4m3fn, torch.float16, torch.int64, torch.complex64]


def values(count, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, (count,), generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 2049, 40_000])
def test_equal_values_have_equal_digests_however_they_lie(dtype, count):
    given_values = values(count, dtype)
    spread = torch.stack([given_values, given_values], 1)[:, 1]
    shifted = torch.cat([values(1, dtype), given_values])[1:]
    assert compute_digest(spread) == compute_digest(given_values) == compute_digest(shifted)
    assert len(set(hash_tensors(iter([spread, given_values, shifted])))) == 1


@given(st.integers(1, 50_000), st.data())
def test_one_changed_bit_changes_the_digest(count, data):
    first = values(count, torch.int16)
    second = first.clone()
    second[data.draw(st.integers(0, count - 1))] ^= 1 << data.draw(st.integers(0, 14))
    assert compute_digest(first) != compute_digest(second)
    assert len(set(hash_tensors([first, second]))) == 2


@given(st.integers(2, 50_000), st.data())
def test_two_values_that_swap_places_change_the_digest(count, data):
    first = torch.arange(count, dtype=torch.int32)
    one, other = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    second = first.clone()
    second[one], second[other] = first[other], first[one]
    assert (compute_digest(first) == compute_digest(second)) == (one == other)
    assert (len(set(hash_tensors([first, second]))) == 1) == (one == other)


def check_all_differ(tensors):
    assert len(set(compute_digests(tensors))) == len(tensors)
    assert len(set(hash_tensors(tensors))) == len(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_of_an_identity_matrix_that_swap_places_change_the_digest(dtype):
    """All rows have equal sums, and so have all columns."""
    unit = torch.eye(2048, dtype=torch.float32).to(dtype)
    rolled = [unit.roll(count, 0) for count in (1, 2, 3, 4, 8, 512, 1024, 2047)]
    check_all_differ([unit, unit.flip(0), *rolled])
    some = torch.Generator().manual_seed(0)
    swapped = [unit]
    for one, other in torch.randint(0, 2048, (40, 2), generator=some).tolist():
        order = list(range(2048))
        order[one], order[other] = other, one
        swapped.append(unit[order])
    check_all_differ(swapped)


@given(st.integers(1, 3), st.integers(1, 3000), st.integers(0, 15), st.data())
def test_a_rectangle_whose_sums_stay_changes_the_digest(width, height, bit, data):
    """Bits that move from two corners to the two others, in bf16: signs, exponents, fractions."""
    first = torch.zeros(height + 1, 1024 * width, dtype=torch.int16)
    left, right = (data.draw(st.integers(0, 1024 * width - 1)) for _ in range(2))
    second = first.clone()
    flag = -(1 << 15) if bit == 15 else 1 << bit
    first[0, left], first[height, right] = flag, flag
    second[0, right], second[height, left] = flag, flag
    is_same = torch.equal(first, second)
    assert (compute_digest(first) == compute_digest(second)) == is_same


@given(st.integers(-(2**62), 2**62), st.integers(2, 4000), st.data())
def test_what_is_taken_from_one_word_and_given_to_another_changes_the_digest(delta, rows, data):
    words = torch.arange(rows * 512).view(rows, 512) * 77
    changed = words.clone()
    top, bottom = (data.draw(st.integers(0, rows - 1)) for _ in range(2))
    left, right = (data.draw(st.integers(0, 511)) for _ in range(2))
    for row, column, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1)):
        changed[row, column] += sign * delta
    changed[bottom, right] += delta
    is_same = torch.equal(words, changed)
    assert (compute_digest(words) == compute_digest(changed)) == is_same


def test_words_that_all_move_change_the_digest():
    circulant = torch.stack([torch.arange(512).roll(count) for count in range(512)])
    check_all_differ([circulant.roll(count, 0) for count in range(0, 512, 7)])
    halves = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16).repeat(1, 4096)
    check_all_differ([halves, halves.flip(0), halves.flip(1)[:, :-2]])
    panels = values(6 << 20, torch.int32).view(3, -1)
    check_all_differ(
        [panels[list(order)] for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1))]
    )


def test_all_bits_of_a_word_that_turn_change_the_digest():
    words = torch.zeros(4096, dtype=torch.int32)
    check_all_differ([words, ~words, torch.cat([~words[:1], words[1:]])])


def test_of_tensors_that_are_made_one_by_one_few_are_held():
    """As a sync casts its blocks: what is alive at once bounds the memory it takes."""
    alive = []

    def make():
        for number in range(200):
            array = np.full(5000, number, dtype=np.int32)
            alive.append(weakref.ref(array))
            assert sum(each() is not None for each in alive) <= 2
            tensor = torch.from_numpy(array)
            del array
            yield tensor
            del tensor

    assert len(set(compute_digests(make()))) == 200


def spread_out(tensor, way):
    """The values in memory that is not dense, or not in order, or begins anywhere."""
    if way == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if way == "turned":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.dim() else tensor
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[-tensor.numel() or 1 :].view(
        tensor.shape
    )


@pytest.mark.parametrize("dtype", [*DTYPES, *WIDE])
def test_tensors_that_are_summed_up_together_have_the_digests_of_each_alone(dtype):
    dense = [
        values(torch.Size(shape).numel(), dtype, at).view(shape)
        for at, shape in enumerate(SHAPES * 2)
    ]
    ways = ("strided", "turned", "shifted")
    given_tensors = [*dense, *(spread_out(each, way) for way in ways for each in dense)]
    wanted = compute_digests(given_tensors, is_stacked=False)
    assert wanted == [compute_digest(each) for each in given_tensors]
    assert compute_digests(iter(given_tensors), is_stacked=True) == wanted


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9000)), max_size=40), st.data())
def test_any_lengths_in_stacks_of_any_size(kinds, data):
    tensors = [values(count, dtype, at) for at, (dtype, count) in enumerate(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "_STACK_BYTES", data.draw(st.integers(1, 50_000)))
        patch.setattr(digest, "_PANEL_BYTES", data.draw(st.integers(1, 50_000)))
        assert compute_digests(tensors, is_stacked=True) == compute_digests(tensors)


def test_all_bits_count_in_a_stack():
    """Values whose products and sums overflow."""
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(-(2**31), 2**31, (6, 2048, 1024), generator=draw, dtype=torch.int32)
    blocks[0], blocks[1] = -1, torch.iinfo(torch.int32).min
    assert compute_digests(blocks, is_stacked=True) == compute_digests(blocks)
    needs_gradient = torch.ones(5000, requires_grad=True)
    assert compute_digests([needs_gradient], is_stacked=True) == [compute_digest(needs_gradient)]


def test_channels_that_lie_last_are_read_in_their_order():
    image = values(2 * 3 * 40 * 40, torch.float32).view(2, 3, 40, 40)
    last = [image.to(memory_format=torch.channels_last)] * 2
    assert compute_digests(last, is_stacked=True) == [compute_digest(image)] * 2


def test_of_blocks_that_wait_only_so_many_are_held():
    alive = []

    def make():
        for number in range(60):
            array = np.full((2, 5000), number, dtype=np.int32)
            alive.append(weakref.ref(array))
            assert sum(each() is not None for each in alive) <= 11
            tensor = torch.from_numpy(array)
            del array
            yield tensor
            del tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "_STACK_BYTES", 10 * 40_000)
        assert len(set(compute_digests(make(), is_stacked=True))) == 60


def test_zeros_of_another_length_differ():
    assert compute_digest(torch.zeros(8)) != compute_digest(torch.zeros(16))


def test_bits_are_compared_not_values():
    nan = torch.tensor([float("nan"), 1.0])
    assert has_equal_bits(nan, nan.clone())
    assert not has_equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
