"""Which box of which tensor goes from which rank to which: the plan of a weight sync. Pure.

Source and destination describe their shards in one global index space, so the transfers are the
intersections of their boxes. No table of model families is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from chatlearn.errors import SyncError
from chatlearn.parallel.sharding import Box, TensorShard

__all__ = ["Endpoint", "Message", "SyncPlan", "Transfer", "plan_sync", "summarize_plan"]

_BUCKET_BYTES = 32 << 20
_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_LINKS: tuple[str, ...] = ("process", "node", "network")


@dataclass(frozen=True)
class Endpoint:
    """One rank that takes part, and the shards it holds."""

    model_name: str
    replica: int
    rank: int
    node_id: str
    process_id: int
    shards: tuple[TensorShard, ...]

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.model_name}.r{self.replica}.{self.rank}"


@dataclass(frozen=True)
class Transfer:
    """One box, from a shard of the source to a shard of the destination."""

    box: Box
    source: TensorShard
    destination: TensorShard

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire: the source's dtype; the destination rounds."""
        return self.box.num_elements * _ITEM_BYTES[self.source.dtype]


@dataclass(frozen=True)
class Message:
    """Transfers of one dtype between one pair of ranks, sent as one buffer.

    `source` and `destination` index the plan's endpoints.
    """

    source: int
    destination: int
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class SyncPlan:
    """All messages, in an order that every rank follows, so that none waits for another in turn.

    Attributes:
        endpoints: sources first, then destinations.
        messages: in order.
        bytes_by_link: bytes by kind of link: `process`, `node`, `network`.
        unused_keys: source tensors that no destination has.
    """

    endpoints: tuple[Endpoint, ...]
    messages: tuple[Message, ...]
    bytes_by_link: Mapping[str, int]
    unused_keys: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that are moved, all links together."""
        return sum(self.bytes_by_link.values())


def plan_sync(
    sources: Sequence[Endpoint],
    destinations: Sequence[Endpoint],
    bucket_bytes: int = _BUCKET_BYTES,
) -> SyncPlan:
    """Plan how every destination element is written exactly once from a rank that holds it.

    Where several source ranks hold a box, the one with the shortest link sends it, and among
    equals the one that sends least so far.

    Args:
        sources: ranks of the model that has the weights.
        destinations: ranks of every replica that gets them.
        bucket_bytes: most bytes of one message (a single larger box is cut along its longest
            axis).

    Raises:
        SyncError: a destination tensor is not in the source, shapes differ, or the source's
            shards leave a hole or overlap; names tensor and ranks.
    """
    holders = _index_sources(sources)
    load = [0] * len(sources)
    bytes_by_link = dict.fromkeys(_LINKS, 0)
    pairs: dict[tuple[int, int], list[Transfer]] = {}
    used: set[str] = set()
    for number, destination in enumerate(destinations):
        for shard in destination.shards:
            found = holders.get(shard.key)
            _check_known(shard, destination, found, sources)
            used.add(shard.key)
            for box, candidates in (found or {}).items():
                common = box.intersect(shard.box)
                if common is None:
                    continue
                chosen, source_shard = min(
                    candidates,
                    key=lambda c: (_distance(sources[c[0]], destination), load[c[0]], c[0]),
                )
                transfer = Transfer(common, source_shard, shard)
                load[chosen] += transfer.num_bytes
                link = _LINKS[_distance(sources[chosen], destination)]
                bytes_by_link[link] += transfer.num_bytes
                pairs.setdefault((chosen, len(sources) + number), []).append(transfer)
    messages = _order_messages(pairs, bucket_bytes)
    unused = tuple(sorted(set(holders) - used))
    return SyncPlan((*sources, *destinations), messages, bytes_by_link, unused)


def summarize_plan(plan: SyncPlan) -> list[tuple[str, str]]:
    """Rows of a table: what is moved, how, and what is not."""
    rows = [
        ("messages", str(len(plan.messages))),
        ("bytes moved", f"{plan.num_bytes:,}"),
    ]
    rows.extend((f"  over {link}", f"{size:,}") for link, size in plan.bytes_by_link.items())
    if plan.unused_keys:
        rows.append(("tensors left out", ", ".join(plan.unused_keys[:6])))
    return rows


_Holders = dict[str, dict[Box, list[tuple[int, TensorShard]]]]


def _index_sources(sources: Sequence[Endpoint]) -> _Holders:
    """For each key, the distinct boxes and who holds each."""
    holders: _Holders = {}
    for index, endpoint in enumerate(sources):
        for shard in endpoint.shards:
            holders.setdefault(shard.key, {}).setdefault(shard.box, []).append((index, shard))
    for key, boxes in holders.items():
        _check_partition(key, boxes, sources)
    return holders


def _check_partition(
    key: str, boxes: Mapping[Box, list[tuple[int, TensorShard]]], sources: Sequence[Endpoint]
) -> None:
    entries = [entry for held in boxes.values() for entry in held]
    shapes = {(shard.global_shape, shard.dtype) for _, shard in entries}
    ranks = ", ".join(dict.fromkeys(sources[index].label for index, _ in entries))
    if len(shapes) > 1:
        raise SyncError(f"{key}: its ranks ({ranks}) disagree on shape or dtype: {sorted(shapes)}")
    whole = prod(entries[0][1].global_shape)
    held = sum(box.num_elements for box in boxes)
    if held != whole:
        kind = "a hole" if held < whole else "an overlap"
        raise SyncError(f"{key}: the shards of {ranks} leave {kind}: {held} of {whole} elements")
    pair = _find_overlap(boxes)
    if pair is not None:
        both = ", ".join(dict.fromkeys(sources[boxes[box][0][0]].label for box in pair))
        raise SyncError(
            f"{key}: the shards of {both} overlap, and so those of {ranks} leave a hole"
        )


def _find_overlap(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share elements, if there are any; boxes are swept along their first axis."""
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offset):
        if box.shape:
            stops = [(other.offset[0] + other.shape[0], other) for other in open_boxes]
            open_boxes = [other for stop, other in stops if stop > box.offset[0]]
        for other in open_boxes:
            if other.intersect(box) is not None:
                return other, box
        open_boxes.append(box)
    return None


def _check_known(
    shard: TensorShard,
    destination: Endpoint,
    found: Mapping[Box, list[tuple[int, TensorShard]]] | None,
    sources: Sequence[Endpoint],
) -> None:
    if not found:
        raise SyncError(
            f"{destination.label} has the tensor {shard.key}, which {sources[0].model_name} lacks: "
            "both models need the same architecture"
        )
    shape = next(iter(found.values()))[0][1].global_shape
    if shape != shard.global_shape:
        raise SyncError(
            f"{shard.key}: {sources[0].model_name} has the shape {shape}, {destination.label} "
            f"{shard.global_shape}: both models need the same architecture"
        )


def _distance(source: Endpoint, destination: Endpoint) -> int:
    if source.node_id != destination.node_id:
        return 2
    return 0 if source.process_id == destination.process_id else 1


def _order_messages(
    pairs: Mapping[tuple[int, int], list[Transfer]], bucket_bytes: int
) -> tuple[Message, ...]:
    """Cut each pair's transfers to buckets; then one bucket of each pair in turn."""
    queues = [
        [Message(source, destination, bucket) for bucket in _cut_buckets(transfers, bucket_bytes)]
        for (source, destination), transfers in sorted(pairs.items())
    ]
    messages: list[Message] = []
    turn = 0
    while any(turn < len(queue) for queue in queues):
        messages.extend(queue[turn] for queue in queues if turn < len(queue))
        turn += 1
    return tuple(messages)


def _cut_buckets(transfers: Sequence[Transfer], bucket_bytes: int) -> list[tuple[Transfer, ...]]:
    buckets: list[list[Transfer]] = []
    size = 0
    parts = [part for transfer in transfers for part in _split(transfer, bucket_bytes)]
    for part in sorted(parts, key=lambda p: p.source.dtype):
        is_new = not buckets or buckets[-1][0].source.dtype != part.source.dtype
        if is_new or size + part.num_bytes > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(part)
        size += part.num_bytes
    return [tuple(bucket) for bucket in buckets]


def _split(transfer: Transfer, bucket_bytes: int) -> list[Transfer]:
    """A transfer in pieces that fit a bucket, cut along its longest axis."""
    pieces = -(-transfer.num_bytes // bucket_bytes)
    box = transfer.box
    if pieces <= 1 or not box.shape:
        return [transfer]
    axis = max(range(len(box.shape)), key=lambda at: box.shape[at])
    length = box.shape[axis]
    step = max(1, length // pieces)
    parts: list[Transfer] = []
    for start in range(0, length, step):
        offset, shape = list(box.offset), list(box.shape)
        offset[axis] += start
        shape[axis] = min(step, length - start)
        part = Box(tuple(offset), tuple(shape))
        parts.append(Transfer(part, transfer.source, transfer.destination))
    return parts
