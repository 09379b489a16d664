"""Micro-batches as packed streams of tokens: no padding, a shared prompt once.

What the model says of a response token is read at the token before it, where the model predicts it,
and put into a grid [rows, longest response] that all losses work on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from chatlearn.errors import DataError
from megatron_adapters.attention_plan import AttentionPlan, Segment, plan_attention, split_stream
from megatron_adapters.batches import Rows

__all__ = ["PackedBatch", "PackingOptions", "pack_micro_batches"]

# Sharing a prompt costs a masked kernel call; it pays from this share of saved tokens on.
_LEAST_SAVED = 0.08
# Tokens between neighbouring lengths, at least.
_LEAST_STEP = 16


@dataclass(frozen=True)
class PackingOptions:
    """How a model wants its streams.

    Attributes:
        max_length: the model's context, tokens.
        multiple: a stream's length is a multiple of this (sequence parallelism).
        is_uniform: all micro-batches of a step get one length (pipeline stages agree on it).
        has_few_lengths: streams get one of 16 lengths between powers of two, for a processor that
            compiles its products for each length anew.
        shares_prompts: rows with one prompt share its tokens.
        reads_last: the model is read at each row's last token, not at each response token.
        context_size: context-parallel ranks.
        context_rank: this rank among them.
        window: sliding window of the windowed layers, tokens; None: there are none.
        dtype: of the attention's masks.
        device: where the tensors go.
    """

    max_length: int
    multiple: int = 1
    is_uniform: bool = False
    has_few_lengths: bool = False
    shares_prompts: bool = True
    reads_last: bool = False
    context_size: int = 1
    context_rank: int = 0
    window: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch as this rank's model takes it.

    Attributes:
        token_ids: [1, tokens] int64, this context-parallel rank's part of the stream.
        position_ids: [1, tokens] int64, each within its row.
        is_fill: [1, tokens] bool, True at tokens of no row.
        plan: which tokens attend to which.
        num_stream_tokens: length of the stream, all context-parallel ranks together.
        reads: [reads] int64, tokens of this rank whose hidden state is read, some perhaps twice.
        places: [reads] int64, where in the flattened grid each result belongs.
        targets: [reads] int64, the token after each.
        grid_shape: of the results, [rows, longest response], or [rows, 1] at the last tokens.
        mask: [rows, longest response] bool; True where a row has a response token.
        num_rows: rows; the grid has at least one.
        extras: further tensors [rows, longest response] or [rows], by name.
        temperature: divides the logits.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    is_fill: torch.Tensor
    plan: AttentionPlan
    num_stream_tokens: int
    reads: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    grid_shape: tuple[int, int]
    mask: torch.Tensor
    num_rows: int
    extras: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    temperature: float = 1.0

    def align(self, values: Iterable[torch.Tensor]) -> torch.Tensor:
        """Per-response-token values of each row as a grid.

        Args:
            values: one 1-D float tensor per row, as long as its response.

        Returns:
            [rows, longest response] float32, zero elsewhere.

        Raises:
            DataError: a row has not as many values as response tokens.
        """
        rows = list(values)
        counts = self._counts()
        for number, row in enumerate(rows):
            if len(row) != counts[number]:
                raise DataError(
                    f"row {number} has {len(row)} values for {counts[number]} response tokens"
                )
        aligned = torch.zeros(self.mask.shape, dtype=torch.float32)
        if rows:
            aligned[self.mask.cpu()] = torch.cat([row.detach().cpu().float() for row in rows])
        return aligned.to(self.token_ids.device)

    def per_row(self, values: Sequence[float]) -> torch.Tensor:
        """One number per row as [rows] float32."""
        column = torch.zeros(self.mask.shape[0], dtype=torch.float32)
        column[: len(values)] = torch.tensor(values, dtype=torch.float32)
        return column.to(self.token_ids.device)

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `align`: each row's values, on the CPU."""
        counts = self._counts()[: self.num_rows]
        found = values.detach().cpu()[self.mask.cpu()]
        return list(torch.split(found, counts)) if counts else []

    def _counts(self) -> list[int]:
        """Response tokens of each row."""
        return cast("list[int]", cast("Any", self.mask.sum(dim=1)).tolist())


@dataclass(frozen=True)
class _Stream:
    """One micro-batch before it is cut to ranks; all lists are over tokens of the stream."""

    token_ids: list[torch.Tensor]
    positions: list[torch.Tensor]
    segments: list[Segment]
    reads: list[torch.Tensor]
    length: int


def pack_micro_batches(
    micro_batches: Sequence[Rows], options: PackingOptions, *, temperature: float = 1.0
) -> list[PackedBatch]:
    """Pack micro-batches, some of which may have few rows or none.

    Raises:
        DataError: a row does not fit the model's context, or its prompt is empty.
    """
    if any(len(prompt) == 0 for rows in micro_batches for prompt in rows.prompts):
        raise DataError(
            "a row has an empty prompt: nothing predicts its first response token; give each "
            "prompt at least one token, such as the tokenizer's begin token"
        )
    longest = max((rows.longest for rows in micro_batches), default=0)
    if longest > options.max_length:
        raise DataError(
            f"a row has {longest} tokens, more than max_sequence_length={options.max_length}: "
            "shorten it or raise max_sequence_length"
        )
    streams = [_lay_out(rows, options) for rows in micro_batches]
    lengths = [_fill_up(stream.length, options) for stream in streams]
    if options.is_uniform:
        lengths = [max(lengths)] * len(lengths)
    return [
        _pack(rows, stream, length, options, temperature)
        for rows, stream, length in zip(micro_batches, streams, lengths, strict=True)
    ]


def _fill_up(length: int, options: PackingOptions) -> int:
    """The length that a stream of so many tokens gets."""
    multiple = options.multiple * (2 * options.context_size if options.context_size > 1 else 1)
    if options.has_few_lengths:
        step = max(_LEAST_STEP, 1 << max(0, length.bit_length() - 5))
        length = -(-length // step) * step
    return max(1, -(-length // multiple)) * multiple


def _lay_out(rows: Rows, options: PackingOptions) -> _Stream:
    """Put rows one after another; those that share a prompt behind it."""
    stream = _Stream([], [], [], [torch.empty(0, dtype=torch.int64)] * len(rows), 0)
    length = 0
    for members in _group(rows, options):
        prompt = rows.prompts[members[0]]
        prefix = None
        if len(members) > 1:
            prefix = Segment(length, len(prompt))
            length = _append(stream, prefix, prompt)
        for row in members:
            response = rows.responses[row]
            # The last response token predicts nothing that is asked for.
            own = response if options.reads_last else response[:-1]
            tokens = own if prefix is not None else torch.cat([prompt, own])
            segment = Segment(length, len(tokens), prefix)
            length = _append(stream, segment, tokens)
            stream.reads[row] = _find_reads(segment, len(prompt), len(response), options)
    return _Stream(stream.token_ids, stream.positions, stream.segments, stream.reads, length)


def _append(stream: _Stream, segment: Segment, tokens: torch.Tensor) -> int:
    stream.token_ids.append(tokens)
    stream.positions.append(torch.arange(segment.first_position, segment.stop))
    if segment.length:
        stream.segments.append(segment)
    return segment.start + segment.length


def _find_reads(
    segment: Segment, prompt: int, response: int, options: PackingOptions
) -> torch.Tensor:
    """Where in the stream a row's results are read, in the order of its response tokens."""
    positions = torch.arange(prompt - 1, prompt - 1 + response)
    if options.reads_last:
        positions = torch.tensor([prompt + response - 1])
    if segment.prefix is None:
        return segment.start + positions
    before = segment.first_position
    inside = segment.start + positions - before
    return torch.where(positions < before, segment.prefix.start + positions, inside)


def _group(rows: Rows, options: PackingOptions) -> list[list[int]]:
    """Rows that share a prompt, in the order of the first; a row alone where sharing is no gain."""
    found: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(rows.prompts):
        key = prompt.numpy().tobytes() if options.shares_prompts else row.to_bytes(8, "little")
        found.setdefault(key, []).append(row)
    groups: list[list[int]] = []
    for members in found.values():
        prompt = len(rows.prompts[members[0]])
        total = sum(len(rows.responses[row]) for row in members) + prompt * len(members)
        saved = prompt * (len(members) - 1)
        if len(members) > 1 and saved >= _LEAST_SAVED * total:
            groups.append(members)
        else:
            groups.extend([row] for row in members)
    return groups


def _pack(
    rows: Rows, stream: _Stream, length: int, options: PackingOptions, temperature: float
) -> PackedBatch:
    token_ids = torch.zeros(length, dtype=torch.int64)
    position_ids = torch.zeros(length, dtype=torch.int64)
    is_fill = torch.arange(length) >= stream.length
    if stream.length:
        token_ids[: stream.length] = torch.cat(stream.token_ids)
        position_ids[: stream.length] = torch.cat(stream.positions)
    counts = [len(response) for response in rows.responses]
    mask = torch.zeros((len(rows) or 1, max(counts, default=1) or 1), dtype=torch.bool)
    for row, count in enumerate(counts):
        mask[row, :count] = True
    shape = (mask.shape[0], 1) if options.reads_last else (mask.shape[0], mask.shape[1])
    reads = torch.cat(stream.reads) if stream.reads else torch.empty(0, dtype=torch.int64)
    targets = torch.cat(rows.responses) if len(rows) else torch.empty(0, dtype=torch.int64)
    places = mask.flatten().nonzero().squeeze(1)
    if options.reads_last:
        places = torch.arange(len(rows))
        targets = torch.zeros(len(rows), dtype=torch.int64)
    parts: list[torch.Tensor] = []
    if options.context_size > 1:
        parts = split_stream(length, options.context_size)
        local = parts[options.context_rank]
        token_ids, position_ids = token_ids[local], position_ids[local]
        is_fill = is_fill[local]
        here = torch.full((length,), -1, dtype=torch.int64)
        here[local] = torch.arange(len(local))
        own = here[reads] >= 0
        reads, places, targets = here[reads][own], places[own], targets[own]
    device = options.device
    return PackedBatch(
        token_ids=token_ids[None].to(device),
        position_ids=position_ids[None].to(device),
        is_fill=is_fill[None].to(device),
        plan=plan_attention(
            stream.segments,
            length,
            parts=parts,
            rank=options.context_rank,
            window=options.window,
            dtype=options.dtype,
            device=device,
        ),
        num_stream_tokens=length,
        reads=reads.to(device),
        places=places.to(device),
        targets=targets.to(device),
        grid_shape=shape,
        mask=mask.to(device),
        num_rows=len(rows),
        temperature=temperature,
    )
