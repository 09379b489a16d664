"""The weight sync ends in the bits that Megatron-Core's own re-sharder ends in."""

import pytest
import resharding_cases
import torch
from long_forms import only
from test_megatron_weights import LAYOUTS, carry_out, endpoints

from chatlearn.sync.plan import plan_sync

PAIRS = [
    ("tp2", "one"),
    ("tp2", "pp2"),
    ("one", "tp2"),
    ("tp2-pp2", "tp2"),
    ("pp2", "tp4"),
    ("grouped-heads", "grouped-heads-tp4"),
]


@pytest.mark.parametrize(
    ("source", "destination"), only([("tp2", "pp2"), ("tp2-pp2", "tp2")], PAIRS)
)
def test_both_end_in_the_same_bits(ranks, source, destination):
    (size, given), (other, taken) = LAYOUTS[source], LAYOUTS[destination]
    # A vocabulary that no layout pads: the re-sharder takes padding for weights.
    fields = ({**one, "vocab_size": 40} for one in (given, taken))
    found = ranks.run(max(size, other), resharding_cases.swap, *fields)
    sides = [[exported[side] for exported, _ in found] for side in (0, 1)]
    # All but the norms, which begin as ones in both models, have other values than before.
    assert all(any("linear_fc1" in name for name in changed) for _, changed in found)
    plan = plan_sync(endpoints("a", sides[0], 2), endpoints("b", sides[1], 2), 1 << 12)
    empty = [
        {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
        for _, tensors in sides[1]
    ]
    carry_out(plan, [*(tensors for _, tensors in sides[0]), *empty])
    for (shards, judged), moved in zip(sides[1], empty, strict=True):
        for shard in shards:
            part, name = shard.local_slices(), shard.local_name
            assert torch.equal(moved[name][part], judged[name][part]), shard.key
