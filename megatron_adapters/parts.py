"""Which rows are scored together: parts of a batch, by the tokens that are really computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from chatlearn.data.balance import Limits, RowLoad, count_tokens, cut_batch
from chatlearn.data.rows import RowId
from megatron_adapters.batches import Rows

__all__ = ["RowParts", "split_by_tokens"]

T = TypeVar("T")


@dataclass(frozen=True)
class RowParts:
    """A batch in parts; `positions[i]` are the rows of part `i` in the batch."""

    rows: Rows
    positions: tuple[tuple[int, ...], ...]

    @property
    def parts(self) -> list[Rows]:
        """The rows of each part."""
        return [self.rows.select(own) for own in self.positions]

    def restore(self, results: Sequence[T]) -> list[T]:
        """Results of the parts' rows, one part after another, in the order of the batch."""
        order = [at for own in self.positions for at in own]
        found = dict(zip(order, results, strict=True))
        return [found[at] for at in range(len(order))]


def split_by_tokens(
    rows: Rows, most_tokens: int, *, shares_prompts: bool, least_parts: int = 1
) -> RowParts:
    """Cut rows to parts of about equally many tokens; a prompt counts once for rows that share it.

    Rows of one prompt stay together as far as may be: beside its longest prompt a part holds
    `most_tokens`, so that a long prompt is not computed again for each few of its responses.

    Args:
        rows: to cut.
        most_tokens: of a part, beside its longest prompt where prompts are shared.
        shares_prompts: rows with the same prompt compute it once.
        least_parts: at least so many parts, where no prompt has to be computed twice for that.
    """
    keys: dict[bytes, int] = {}
    ids: list[RowId] = []
    for at, prompt in enumerate(rows.prompts):
        key = prompt.numpy().tobytes() if shares_prompts else at.to_bytes(8, "little")
        ids.append(RowId(keys.setdefault(key, len(keys)), at))
    lengths = zip(rows.prompts, rows.responses, strict=True)
    loads = {
        row_id: RowLoad(len(prompt), len(response))
        for row_id, (prompt, response) in zip(ids, lengths, strict=True)
    }
    limit = most_tokens
    if shares_prompts:
        limit += max((load.prompt for load in loads.values()), default=0)
    if least_parts > 1:
        groups: dict[int, list[RowId]] = {}
        for row_id in ids:
            groups.setdefault(row_id.prompt, []).append(row_id)
        largest = max((count_tokens(group, loads) for group in groups.values()), default=0)
        share = -(-count_tokens(ids, loads) // least_parts)
        limit = min(limit, max(share, largest))
    (parts,) = cut_batch(ids, 1, Limits(tokens=max(limit, 1)), loads)
    return RowParts(rows, tuple(tuple(row_id.sample for row_id in part) for part in parts))
