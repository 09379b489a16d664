"""Endpoints of small models for the tests of the planner."""

from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.records import Endpoint


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
