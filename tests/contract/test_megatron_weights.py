"""Weights moved by the sync plan are those of a model built where they go, bit for bit."""

import megatron_cases as cases
import pytest
import torch

from chatlearn.sync.plan import Endpoint, plan_sync

TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp4": (4, TP4),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, VPP2),
    "tp2-pp2": (4, {**TP2, **PP2}),
    "dp2": (2, {}),
    "padded-vocabulary": (2, {**TP2, "make_vocab_size_divisible_by": 16}),
    "grouped-heads-tp4": (4, {**TP4, "num_query_groups": 2}),
    "grouped-heads": (1, {"num_query_groups": 2}),
}
PAIRS = [
    ("dp2", "tp2"),
    ("tp2", "pp2"),
    ("pp2", "tp4"),
    ("pp2-vpp2", "tp2-pp2"),
    ("tp2-pp2", "one"),
    ("tp4", "pp2-vpp2"),
    ("padded-vocabulary", "tp4"),
    ("one", "padded-vocabulary"),
    ("grouped-heads", "grouped-heads-tp4"),
    ("grouped-heads-tp4", "grouped-heads"),
]


def export(ranks, name, seed):
    size, fields = LAYOUTS[name]
    return ranks.run(size, cases.export_weights, fields, seed)


def endpoints(model_name, exported):
    return [
        Endpoint(model_name, 0, rank, "node", rank, shards)
        for rank, (shards, _) in enumerate(exported)
    ]


def copy(transfer, source, destination):
    values = source[transfer.source.local_name][transfer.source.local_slices(transfer.box)]
    shard = transfer.destination
    destination[shard.local_name][shard.local_slices(transfer.box)] = values


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_synced_weights_are_bit_equal(ranks, source, destination):
    given, taken = export(ranks, source, 1), export(ranks, destination, 2)
    wanted = export(ranks, destination, 1)
    plan = plan_sync(endpoints("a", given), endpoints("b", taken))
    everything = [tensors for _, tensors in (*given, *taken)]
    for message in plan.messages:
        for transfer in message.transfers:
            copy(transfer, everything[message.source], everything[message.destination])
    for (shards, found), (_, expected) in zip(taken, wanted, strict=True):
        for shard in shards:
            part = shard.local_slices()
            name = shard.local_name
            assert torch.equal(found[name][part], expected[name][part]), shard.key
