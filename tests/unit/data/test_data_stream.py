"""From an episode's samples to training batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.data.rows import RowId
from chatlearn.data.stream import StreamDataset


def ids(*prompts):
    return [RowId(prompt, 0) for prompt in prompts]


def filled(num_rows, batch_size, order=None, **options):
    stream = StreamDataset(ids(*range(num_rows)), batch_size, **options)
    for prompt in order if order is not None else range(num_rows):
        stream.add(RowId(prompt, 0), f"source {prompt}")
    return stream


@given(st.permutations(range(11)), st.integers(1, 12))
def test_batches_do_not_depend_on_the_order_of_arrival(order, batch_size):
    stream = filled(11, batch_size, order)
    batches = [list(stream.batch(at)) for at in range(stream.num_batches)]
    assert sum(batches, []) == ids(*range(11))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert stream.batch(0)[RowId(0, 0)] == "source 0"


def test_a_fixed_stream_gives_a_batch_as_soon_as_its_rows_are_there():
    stream = filled(5, 2, [0, 3, 2])
    assert [stream.has_batch(at) for at in range(3)] == [False, True, False]
    assert (stream.num_rows, stream.num_arrived, stream.is_complete) == (5, 3, False)
    stream.add(RowId(4, 0), "source 4")
    assert [stream.has_batch(at) for at in range(3)] == [False, True, True]


def test_a_dynamic_stream_waits_for_every_row():
    stream = filled(5, 2, [0, 1, 2, 3], is_dynamic=True)
    assert not stream.has_batch(0)
    stream.add(RowId(4, 0), "source 4")
    assert all(stream.has_batch(at) for at in range(3))


def test_the_last_batch_may_be_short_and_repeats_no_row():
    stream = filled(5, 2)
    assert [list(stream.batch(at)) for at in range(3)] == [ids(0, 1), ids(2, 3), ids(4)]


def test_rows_that_are_there_come_in_row_order():
    assert list(filled(4, 2, [3, 0, 2]).sources()) == ids(0, 2, 3)


def test_a_later_epoch_shuffles_the_batches():
    stream = filled(12, 2)
    first = [list(stream.batch(at)) for at in range(6)]
    found = [list(b) for b in stream.later_epoch(1, mode="batch", seed=3, episode=0)]
    assert found != first
    assert sorted(found) == first


def test_a_later_epoch_shuffles_the_samples():
    stream = filled(12, 5)
    epochs = [
        [list(b) for b in stream.later_epoch(epoch, mode="sample", seed=3, episode=episode)]
        for epoch, episode in ((1, 0), (2, 0), (1, 1), (1, 0))
    ]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [5, 5, 2]
        assert sorted(sum(batches, [])) == ids(*range(12))
    assert epochs[0] == epochs[3]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="batch_size is 1 or more, got 0"):
        StreamDataset(ids(1), 0)
