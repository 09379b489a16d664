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
from fnmatch import fnmatchcase

from chatlearn.errors import SyncError
from chatlearn.parallel.sharding import Box
from chatlearn.sync.cells import BoxIndex, CellTable
from chatlearn.sync.records import FLOAT_DTYPES, ITEM_BYTES, Bucket, Cell, Endpoint, Piece, SyncPlan
from chatlearn.sync.routes import choose_routes, order_hops

__all__ = ["DEFAULT_BUCKET_BYTES", "check_sides", "plan_sync", "summarize_plan"]

DEFAULT_BUCKET_BYTES = 32 << 20
_NAMED_TENSORS = 6


def plan_sync(
    sources: Sequence[Endpoint],
    destinations: Sequence[Endpoint],
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    *,
    skip_frozen: bool = False,
    left_out: Collection[str] = (),
) -> SyncPlan:
    """Plan how every destination element is written exactly once from a rank that holds it.

    Args:
        sources: ranks of the model that has the weights.
        destinations: ranks of every replica that gets them.
        bucket_bytes: most bytes of one bucket; a larger box is cut (a single element is not).
        skip_frozen: leave out tensors that are frozen on every rank that holds them.
        left_out: patterns (as of `fnmatch`) of the source tensors that the destination may lack.

    Raises:
        SyncError: a side has no ranks, one side has a tensor that the other lacks, shapes or
            kinds of dtypes differ, ranks disagree on either, a box is no part of its tensor, or
            shards leave a hole or overlap; names tensor and ranks.
    """
    with _paused_collector():
        held, wanted = _tabulate(sources, destinations)
        frozen = _frozen_keys(held, sources) if skip_frozen else frozenset[str]()
        unused = _check_fit(held, wanted, left_out)
        groups = _group_pieces(held, wanted, frozen)
        parts = [_cut_buckets(pieces, dtype, bucket_bytes) for dtype, pieces in groups]
        buckets, turns = _take_turns(parts)
        endpoints = (*sources, *destinations)
        routes = choose_routes(endpoints, buckets)
        hops, bytes_by_link = order_hops(len(endpoints), buckets, turns, routes)
        skipped = tuple(sorted(frozen & set(wanted.by_key)))
        numbers = (*held.groups, *wanted.groups)
        return SyncPlan(
            endpoints, len(sources), numbers, buckets, hops, bytes_by_link, unused, skipped
        )


def check_sides(
    sources: Sequence[Endpoint], destinations: Sequence[Endpoint], left_out: Collection[str] = ()
) -> None:
    """Whether `plan_sync` would plan this; arguments and errors are the same."""
    with _paused_collector():
        _check_fit(*_tabulate(sources, destinations), left_out)


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


def _tabulate(
    sources: Sequence[Endpoint], destinations: Sequence[Endpoint]
) -> tuple[CellTable, CellTable]:
    held = CellTable(sources)
    return held, CellTable(destinations, len(sources), len(set(held.groups)))


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


def _check_fit(held: CellTable, wanted: CellTable, left_out: Collection[str]) -> tuple[str, ...]:
    """Refuse two models that do not fit; gives the source's tensors that may be left out."""
    _check_known(held, wanted)
    return _find_unused(held, wanted, left_out)


def _check_known(held: CellTable, wanted: CellTable) -> None:
    source_name = held.model_name
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
        given, taken = held.by_key[key][0].dtype, wanted.by_key[key][0].dtype
        if given != taken and not {given, taken} <= FLOAT_DTYPES:
            raise SyncError(
                f"{key}: {source_name} has the dtype {given}, {wanted.labels(key)} {taken}: only "
                "one float dtype can be rounded to another; give both models the same"
            )


def _find_unused(held: CellTable, wanted: CellTable, left_out: Collection[str]) -> tuple[str, ...]:
    """Source tensors that no destination takes; each must be one that may be left out."""
    if isinstance(left_out, str):
        raise SyncError(
            f"left_out_weights of {wanted.model_name}'s module is the text {left_out!r}: give a "
            "tuple of patterns"
        )
    unused = sorted(set(held.by_key) - set(wanted.by_key))
    wrong = [key for key in unused if not any(fnmatchcase(key, each) for each in left_out)]
    if wrong:
        more = f" and {len(wrong) - _NAMED_TENSORS} more" if len(wrong) > _NAMED_TENSORS else ""
        raise SyncError(
            f"{wanted.model_name} has no place for {', '.join(wrong[:_NAMED_TENSORS])}{more} of "
            f"{held.labels(wrong[0])}: both models need the same architecture (tied or untied "
            "embeddings, biases); or name what it does without in left_out_weights of "
            f"{wanted.model_name}'s module"
        )
    return tuple(unused)


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
    """The narrower of two dtypes; of two equally wide ones the destination's.

    So there is one rounding, also where a destination passes on what it has: a narrower source's
    values are among those of every wider float dtype.
    """
    return destination if ITEM_BYTES[destination] <= ITEM_BYTES[source] else source


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
