"""Which box of which tensor goes from which rank to which, and in which order. Pure.

Source and destination describe their shards in one global index space, so what moves are the
intersections of their boxes; no table of model families is needed. Boxes with the same holders
and the same takers are planned together, in buckets of a bounded size.

A destination rank takes a bucket over the shortest link there is: from its own process, its
device, its node. Where no rank of a node holds it, it crosses to that node once; the node's other
takers get it from the one that received it. Where more nodes than holders want a bucket, it runs
from node to node as a chain, so that no holder sends it twice: a broadcast in the form of
point-to-point hops, which keeps full speed because buckets follow each other along the chain.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager

from chatlearn.errors import SyncError
from chatlearn.parallel.sharding import Box
from chatlearn.sync.cells import BoxIndex, CellTable
from chatlearn.sync.records import ITEM_BYTES, Bucket, Cell, Endpoint, Piece, SyncPlan
from chatlearn.sync.routes import choose_routes, order_hops

__all__ = ["DEFAULT_BUCKET_BYTES", "plan_sync", "summarize_plan"]

DEFAULT_BUCKET_BYTES = 32 << 20


def plan_sync(
    sources: Sequence[Endpoint],
    destinations: Sequence[Endpoint],
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    *,
    skip_frozen: bool = False,
) -> SyncPlan:
    """Plan how every destination element is written exactly once from a rank that holds it.

    Args:
        sources: ranks of the model that has the weights.
        destinations: ranks of every replica that gets them.
        bucket_bytes: most bytes of one bucket; a larger box is cut (a single element is not).
        skip_frozen: leave out tensors that are frozen on every rank that holds them.

    Raises:
        SyncError: a side has no ranks, a destination tensor is not in the source, shapes differ,
            ranks disagree on a dtype, a box is no part of its tensor, or shards leave a hole or
            overlap; names tensor and ranks.
    """
    with _paused_collector():
        held = CellTable(sources)
        wanted = CellTable(destinations, len(sources), len(set(held.groups)))
        frozen = _frozen_keys(held, sources) if skip_frozen else frozenset[str]()
        _check_known(held, wanted, sources[0].model_name)
        groups = _group_pieces(held, wanted, frozen)
        parts = [_cut_buckets(pieces, dtype, bucket_bytes) for dtype, pieces in groups]
        buckets, turns = _take_turns(parts)
        endpoints = (*sources, *destinations)
        routes = choose_routes(endpoints, buckets)
        hops, bytes_by_link = order_hops(len(endpoints), buckets, turns, routes)
        unused = tuple(sorted(set(held.by_key) - set(wanted.by_key)))
        skipped = tuple(sorted(frozen & set(wanted.by_key)))
        numbers = (*held.groups, *wanted.groups)
        return SyncPlan(
            endpoints, len(sources), numbers, buckets, hops, bytes_by_link, unused, skipped
        )


def summarize_plan(plan: SyncPlan) -> list[tuple[str, str]]:
    """Rows of a table: what is moved, how, and what is not."""
    rows = [
        ("buckets", f"{len(plan.buckets):,}"),
        ("hops", f"{len(plan.hops):,} in {plan.num_rounds:,} rounds"),
        ("bytes moved", f"{plan.num_bytes:,}"),
    ]
    rows.extend((f"  over {link}", f"{size:,}") for link, size in plan.bytes_by_link.items())
    if plan.unused_keys:
        rows.append(("tensors left out", ", ".join(plan.unused_keys[:6])))
    if plan.skipped_keys:
        rows.append(("frozen tensors", f"{len(plan.skipped_keys):,}"))
    return rows


@contextmanager
def _paused_collector() -> Generator[None]:
    """Pause the cycle collector: it would walk a plan's millions of records over and over."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _frozen_keys(held: CellTable, sources: Sequence[Endpoint]) -> frozenset[str]:
    if not any(endpoint.frozen for endpoint in sources):
        return frozenset()
    return frozenset(
        key
        for key, cells in held.by_key.items()
        if all(
            cell.shards[held.groups[index]].local_name in sources[index].frozen
            for cell in cells
            for index in cell.holders
        )
    )


def _check_known(held: CellTable, wanted: CellTable, source_name: str) -> None:
    for key, shape in wanted.shapes.items():
        if key not in held.shapes:
            raise SyncError(
                f"{wanted.labels(key)} has the tensor {key}, which {source_name} lacks: both "
                "models need the same architecture"
            )
        if held.shapes[key] != shape:
            raise SyncError(
                f"{key}: {source_name} has the shape {held.shapes[key]}, {wanted.labels(key)} "
                f"{shape}: both models need the same architecture"
            )


def _group_pieces(
    held: CellTable, wanted: CellTable, skipped: Collection[str]
) -> list[tuple[str, list[Piece]]]:
    """Pieces by holders, takers and dtypes; with each group its dtype on the wire."""
    groups: dict[tuple[int, int, str, str], list[Piece]] = {}
    for key, cells in wanted.by_key.items():
        if key in skipped:
            continue
        reached = 0
        for piece in _intersect(held.by_key[key], cells):
            source, destination = piece.source, piece.destination
            reached += piece.box.num_elements
            if 0 in piece.box.shape:
                continue
            # Cells with the same holders share one tuple, so its identity stands for it.
            kind = (
                id(source.holders),
                id(destination.holders),
                source.dtype,
                destination.dtype,
            )
            groups.setdefault(kind, []).append(piece)
        # Both sides partition the tensor, so this can fail only where their checks are wrong.
        needed = sum(cell.box.num_elements for cell in cells)
        if reached != needed:
            raise SyncError(
                f"{key}: the plan reaches {reached} of the {needed} elements that "
                f"{wanted.labels(key)} hold: report this with both descriptions"
            )
    return [
        (_wire_dtype(source, destination), pieces)
        for (_, _, source, destination), pieces in groups.items()
    ]


def _intersect(held: Sequence[Cell], wanted: Sequence[Cell]) -> Iterable[Piece]:
    exact = {cell.box: cell for cell in held}
    index: BoxIndex | None = None
    for cell in wanted:
        same = exact.get(cell.box)
        if same is not None:
            yield Piece(cell.box, same, cell)
            continue
        if index is None:
            index = BoxIndex([source.box for source in held])
        for number, common in index.overlapping(cell.box):
            yield Piece(common, held[number], cell)


def _wire_dtype(source: str, destination: str) -> str:
    """The narrower of two dtypes: rounding before or after the wire gives the same values."""
    return destination if ITEM_BYTES[destination] < ITEM_BYTES[source] else source


def _cut_buckets(pieces: Sequence[Piece], dtype: str, bucket_bytes: int) -> list[Bucket]:
    item_bytes = ITEM_BYTES[dtype]
    most = max(1, bucket_bytes // item_bytes)
    buckets: list[Bucket] = []
    taken: list[Piece] = []
    count = 0
    for piece in pieces:
        for box in _split(piece.box, most):
            size = box.num_elements
            if taken and count + size > most:
                buckets.append(Bucket(tuple(taken), dtype, count * item_bytes))
                taken, count = [], 0
            part = piece if box is piece.box else Piece(box, piece.source, piece.destination)
            taken.append(part)
            count += size
    if taken:
        buckets.append(Bucket(tuple(taken), dtype, count * item_bytes))
    return buckets


def _split(box: Box, most: int) -> list[Box]:
    """A box in parts of at most `most` elements, cut along leading axes: such parts lie dense."""
    if box.num_elements <= most:
        return [box]
    axis = next(at for at, length in enumerate(box.shape) if length > 1)
    length = box.shape[axis]
    rows = box.num_elements // length
    step = max(1, most // rows)
    parts: list[Box] = []
    for start in range(0, length, step):
        offset, shape = list(box.offset), list(box.shape)
        offset[axis] += start
        shape[axis] = min(step, length - start)
        part = Box(tuple(offset), tuple(shape))
        parts.extend(_split(part, most) if part.num_elements > most else [part])
    return parts


def _take_turns(parts: Sequence[Sequence[Bucket]]) -> tuple[tuple[Bucket, ...], list[int]]:
    """All buckets, few holders first, and the order to send them in: one of each group in turn."""
    order = sorted(range(len(parts)), key=lambda n: len(parts[n][0].pieces[0].source.holders))
    buckets: list[Bucket] = []
    turns: list[tuple[int, int]] = []
    for number in order:
        turns.extend((turn, len(buckets) + turn) for turn in range(len(parts[number])))
        buckets.extend(parts[number])
    return tuple(buckets), [index for _, index in sorted(turns)]
