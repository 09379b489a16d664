"""Numbers that are a function of seed and counters only."""

import math

import pytest
import torch

from chatlearn.parallel.counter_random import counter_normal, counter_uniform, stable_hash

MASK = (1 << 64) - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def unshift(value, bits):
    found = value
    for _ in range(64 // bits):
        found = value ^ (found >> bits)
    return found


def unmix(value):
    value = unshift(value, 31)
    value = unshift(value * pow(MIX_2, -1, 1 << 64) & MASK, 27)
    return unshift(value * pow(MIX_1, -1, 1 << 64) & MASK, 30)


def counter_with_hash(wanted):
    """The counter whose hash under the seed -GOLDEN (whose own state is 0) is `wanted`."""
    counter = (unmix(wanted) - MIX_1) * pow(GOLDEN, -1, 1 << 64) & MASK
    return counter - (1 << 64) if counter >> 63 else counter


@pytest.mark.parametrize(
    ("wanted", "expected"), [(MASK, 1 - 2.0**-53), (0, 2.0**-53), (1 << 63, 0.5 + 2.0**-53)]
)
def test_uniform_numbers_stay_within_the_open_interval(wanted, expected):
    found = counter_uniform(-GOLDEN, torch.tensor([counter_with_hash(wanted)]))
    assert found.item() == expected


def test_a_number_depends_on_its_counters_only():
    rows, columns = torch.arange(6)[:, None], torch.arange(4)[None]
    together = counter_uniform(5, rows, columns)
    assert together.shape == (6, 4)
    assert together.dtype == torch.float64
    alone = counter_uniform(5, torch.tensor([3]), torch.tensor([2]))
    assert alone.item() == together[3, 2].item()
    assert torch.equal(counter_uniform(5, rows.flip(0), columns), together.flip(0))


def test_seeds_counters_and_their_order_matter():
    one, two = torch.tensor(1), torch.tensor(2)
    found = {
        counter_uniform(0, one, two).item(),
        counter_uniform(0, two, one).item(),
        counter_uniform(1, one, two).item(),
        counter_uniform(0, one).item(),
        counter_uniform(0, one, one).item(),
        counter_uniform(-1, one, two).item(),
    }
    assert len(found) == 6


def test_numbers_are_pinned():
    # A change here would make every run of a seed differ from earlier ones.
    found = counter_uniform(0, torch.arange(3))
    assert [round(value, 12) for value in found.tolist()] == [
        0.13464393672,
        0.906924655352,
        0.467669546814,
    ]
    assert stable_hash("layers.0.weight") == 3756774319918600553


def test_uniform_moments():
    numbers = counter_uniform(3, torch.arange(40_000))
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.003)
    neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(neighbours.item()) < 0.02


def test_normal_moments():
    numbers = counter_normal(3, torch.arange(200)[:, None], torch.arange(200)[None])
    assert numbers.shape == (200, 200)
    assert numbers.mean().item() == pytest.approx(0.0, abs=0.02)
    assert numbers.std().item() == pytest.approx(1.0, abs=0.02)
    assert (numbers**4).mean().item() == pytest.approx(3.0, abs=0.15)
    within = (numbers.abs() < 1).double().mean().item()
    assert within == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)


def test_without_a_counter_there_is_no_number():
    with pytest.raises(ValueError, match="at least one counter"):
        counter_uniform(0)
