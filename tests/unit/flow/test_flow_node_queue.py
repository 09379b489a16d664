"""The rows of one node: ready, batched, finished."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.data.rows import RowId
from chatlearn.flow.node_queue import NodeQueue


def ids(*prompts):
    return tuple(RowId(prompt, 0) for prompt in prompts)


def test_rows_without_producers_are_ready_at_once():
    queue = NodeQueue(ids(0, 1, 2), 0, 2, False)
    assert [queue.take(), queue.take()] == [ids(0, 1), ids(2)]
    assert not queue.has_batch
    assert queue.num_dispatched == 2


def test_a_row_waits_for_all_of_its_producers():
    queue = NodeQueue(ids(0, 1), 2, 1, False)
    queue.add(ids(0, 1))
    assert not queue.has_batch
    queue.add(ids(1))
    assert queue.take() == ids(1)


def test_batches_are_full_until_the_last():
    queue = NodeQueue(ids(0, 1, 2), 1, 2, False)
    queue.add(ids(2))
    assert not queue.has_batch
    queue.add(ids(0))
    assert queue.take() == ids(2, 0)
    queue.add(ids(1))
    assert queue.take() == ids(1)


def test_deterministic_batches_wait_for_their_own_rows():
    queue = NodeQueue(ids(0, 1, 2), 1, 2, True)
    queue.add(ids(2, 1))
    assert not queue.has_batch
    queue.add(ids(0))
    assert [queue.take(), queue.take()] == [ids(0, 1), ids(2)]


def test_finished_means_every_row():
    queue = NodeQueue(ids(0, 1), 0, 1, False)
    queue.take()
    queue.finish(1)
    assert not queue.is_finished
    queue.finish(1)
    assert queue.is_finished
    assert NodeQueue((), 1, 0, True).is_finished


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="batch_size is 1 or more, got 0"):
        NodeQueue(ids(0), 0, 0, False)


def test_what_is_ready_is_cut_by_another_measure_where_there_is_one():
    def by_parity(row_ids):
        odd = tuple(row for row in row_ids if row.prompt % 2)
        return [odd, tuple(row for row in row_ids if row not in odd)] if odd else []

    queue = NodeQueue(ids(*range(7)), 1, 4, False, by_parity)
    queue.add(ids(0, 1, 2))
    assert not queue.has_batch
    queue.add(ids(3, 5))
    assert [queue.take(), queue.take()] == [ids(1, 3, 5), ids(0, 2)]
    queue.add(ids(4))
    assert not queue.has_batch
    queue.add(ids(6))
    # Without that measure the batch's size counts.
    assert queue.take() == ids(4, 6)
    assert not queue.has_batch


@given(st.integers(0, 20), st.integers(1, 6), st.booleans(), st.randoms(use_true_random=False))
def test_every_row_is_taken_once_whatever_the_order_of_arrival(rows, size, deterministic, random):
    queue = NodeQueue(ids(*range(rows)), 2, size, deterministic)
    arrivals = list(range(rows)) * 2
    random.shuffle(arrivals)
    taken = []
    for prompt in arrivals:
        queue.add(ids(prompt))
        while queue.has_batch:
            taken.append(queue.take())
    assert sorted(row for batch in taken for row in batch) == list(ids(*range(rows)))
    assert all(len(batch) == size for batch in taken[:-1]) or deterministic
    assert len(taken) == -(-rows // size)
