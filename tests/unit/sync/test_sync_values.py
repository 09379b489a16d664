"""Random values through plan and programs: each element arrives, rounded once, and nothing else."""

import os
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import endpoint, models, shard

from chatlearn.sync.copies import merge_pulls, run_copies
from chatlearn.sync.plan import plan_sync
from chatlearn.sync.programs import build_programs
from chatlearn.sync.records import LINKS

# `make test-long` tries many more.
EXAMPLES = int(os.environ.get("CHATLEARN_TEST_EXAMPLES", "200"))
PROCESS, NETWORK = LINKS.index("process"), LINKS.index("network")
HALVES = ("float16", "bfloat16")
# The two of one width that round to each other come most often.
DTYPES = (*HALVES, *HALVES, "float64", "float32", "float8_e4m3fn", "float8_e5m2")
# What may go over the channel rather than be pulled.
CHANNELS = {
    "network": lambda hop: hop.link == NETWORK,
    "all but copies": lambda hop: hop.link != PROCESS,
    "some": lambda hop: hop.link == NETWORK or (hop.link != PROCESS and hop.source % 2 == 0),
}


@st.composite
def placed_models(draw):
    """Models whose shards have any float dtype, and lie anywhere in their local tensors."""
    chance = draw(st.randoms(use_true_random=False))
    sides = draw(models())
    for ranks in sides:
        dtypes, known = {}, {}

        def place(held, dtypes=dtypes, known=known):
            if held not in known:
                lead = 0
                while lead < len(held.box.shape) and held.box.shape[lead] == 1:
                    lead += 1
                axes = len(held.box.shape) - chance.randint(0, lead)
                dtype = dtypes.setdefault(held.key, chance.choice(DTYPES))
                local = tuple(chance.randint(0, 2) for _ in range(axes))
                known[held] = replace(held, dtype=dtype, local_offset=local)
            return known[held]

        ranks[:] = [replace(rank, shards=tuple(map(place, rank.shards))) for rank in ranks]
    return sides


def blank_tensors(endpoint):
    """Local tensors with a margin around each shard."""
    return {
        shard.local_name: torch.full(
            [at + n + 1 for at, n in zip(shard.local_offset, shard.local_shape, strict=True)],
            float("nan"),
        ).to(getattr(torch, shard.dtype))
        for shard in endpoint.shards
    }


def value_of(values, shard):
    slices = tuple(
        slice(at, at + n) for at, n in zip(shard.box.offset, shard.box.shape, strict=True)
    )
    return values[shard.key][slices].reshape(shard.local_shape)


def draw_values(sources, seed):
    """The whole tensors, in the dtypes of the source, with many largest values among them."""
    source = torch.Generator().manual_seed(seed)
    values = {}
    for held in {held.key: held for rank in sources for held in rank.shards}.values():
        dtype = getattr(torch, held.dtype)
        drawn = torch.randn(held.global_shape, generator=source, dtype=torch.float64)
        is_largest = torch.rand(held.global_shape, generator=source) < 0.2
        largest = torch.finfo(dtype).max
        values[held.key] = torch.where(is_largest, largest, 300 * drawn).to(dtype)
    return values


def region(tensors, part):
    return tensors[part.local_name][part.slices]


def copy_parts(given, taken, parts, wire):
    """Copy one message, over a wire of some dtype."""
    for one, other in parts:
        value, target = region(given, one), region(taken, other)
        target.copy_(value.to(getattr(torch, wire)).reshape(target.shape))


def exchange(programs, tensors):
    """Run the steps of all ranks: a message goes as soon as it is next for both its ends."""
    queues = [list(program.steps) for program in programs]
    while any(queues):
        pairs = [
            (rank, queue[0].peer)
            for rank, queue in enumerate(queues)
            if queue and queue[0].is_send and queues[queue[0].peer]
        ]
        ready = [
            (rank, peer)
            for rank, peer in pairs
            if queues[peer][0].peer == rank and queues[peer][0].message == queues[rank][0].message
        ]
        assert ready
        for rank, peer in ready:
            sent, received = queues[rank].pop(0), queues[peer].pop(0)
            assert (received.is_send, received.dtype) == (False, sent.dtype)
            parts = zip(sent.parts, received.parts, strict=True)
            copy_parts(tensors[rank], tensors[peer], parts, sent.dtype)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    placed_models(),
    st.integers(0, 1 << 30),
    st.sampled_from([8, 24, 1 << 20]),
    st.sampled_from(sorted(CHANNELS)),
)
def test_every_value_arrives_rounded_once_and_nothing_else_changes(sides, seed, size, channel):
    check_arrival(sides, seed, size, channel)


@pytest.mark.parametrize("taken", sorted(set(DTYPES)))
@pytest.mark.parametrize("channel", CHANNELS)
def test_a_rank_that_passes_values_on_does_not_round_them_again(channel, taken):
    def vector(name, dtype, node, replica=0):
        held = shard("w", (64,), (0,), (64,), dtype=dtype)
        return endpoint(name, 0, [held], node=node, replica=replica)

    nodes = ("n1", "n1", "n2", "n3")
    takers = [vector("policy", taken, node, replica) for replica, node in enumerate(nodes)]
    for given_dtype in sorted(set(DTYPES)):
        check_arrival([[vector("trainer", given_dtype, "n0")], takers], 1, 1 << 20, channel)


def check_arrival(sides, seed, size, channel):
    """Carry a plan out, and compare everything that the destinations then have."""
    sources, destinations = sides
    values = draw_values(sources, seed)
    tensors = [blank_tensors(rank) for rank in (*sources, *destinations)]
    for rank, own in zip(sources, tensors[: len(sources)], strict=True):
        for held in rank.shards:
            own[held.local_name][held.local_slices()].copy_(value_of(values, held))
    programs = build_programs(plan_sync(sources, destinations, size), CHANNELS[channel])
    exchange(programs, tensors)
    for program in reversed(programs):
        for source, copies in merge_pulls(program.pulls).items():
            run_copies(copies, tensors[source], tensors[program.index])
    for rank, found in zip(destinations, tensors[len(sources) :], strict=True):
        wanted = blank_tensors(rank)
        for held in rank.shards:
            value = value_of(values, held).to(getattr(torch, held.dtype))
            wanted[held.local_name][held.local_slices()].copy_(value)
        for name, tensor in wanted.items():
            assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor):
    """Values as numbers that compare, with one mark for all that are none."""
    return torch.nan_to_num(tensor.double(), nan=1e300, posinf=2e300, neginf=-2e300)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(placed_models(), st.sampled_from([8, 1 << 20]))
def test_blocks_cover_each_element_that_a_rank_takes_once(sides, size):
    plan = plan_sync(*sides, size)
    for program in build_programs(plan, CHANNELS["network"])[plan.num_sources :]:
        covered = Counter()
        for block in program.blocks:
            spans = (range(each.start, each.stop) for each in block.part.slices)
            covered.update((block.part.local_name, at) for at in product(*spans))
        shards = plan.endpoints[program.index].shards
        assert covered.total() == sum(shard.box.num_elements for shard in shards)
        assert not covered or max(covered.values()) == 1
