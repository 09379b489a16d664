"""What each rank of a Megatron model holds, from the config alone. Pure: no torch, no Megatron.

Equal to what Megatron-Core 0.16.1's own `sharded_state_dict()` says of the live model (see
`live_description`): `tests/contract/test_megatron_descriptions.py` holds the two together for
Megatron's local layers. Transformer Engine's are described as Megatron's source says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.parallel.sharding import Box, TensorShard
from megatron_adapters.weights.architecture import (
    Architecture,
    ExpertSizes,
    GroupedAttention,
    Head,
    read_architecture,
)
from megatron_adapters.weights.parameters import (
    Parameter,
    embedding_parameters,
    expert_parameters,
    final_parameters,
    layer_parameters,
)
from megatron_adapters.weights.pipeline_split import split_layers

__all__ = ["describe_layout", "describe_rank"]


@dataclass(frozen=True)
class _Position:
    """Where a rank stands on the axes that cut weights; equal positions hold equal shards."""

    pp_rank: int
    tp_rank: int
    ep_rank: int
    etp_rank: int


@dataclass(frozen=True)
class _Place:
    """Where the parameters of one layer, one expert or the model's edge belong.

    Attributes:
        local_prefix: before a parameter's local name.
        local_suffix: after it.
        key_prefix: before its global one.
        index: position on the leading axes of the global tensors (layer, expert).
        counts: sizes of those axes.
    """

    local_prefix: str
    key_prefix: str
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    local_suffix: str = ""


def describe_rank(
    fields: Mapping[str, Any],
    layout: ParallelLayout,
    rank: int,
    *,
    head: Head = "lm",
    is_generating: bool = False,
    use_te: bool = False,
) -> tuple[TensorShard, ...]:
    """The shards that one rank holds; arguments and errors are those of `describe_layout`."""
    return _build(fields, layout, head, is_generating=is_generating, use_te=use_te).at(rank)


def describe_layout(
    fields: Mapping[str, Any],
    layout: ParallelLayout,
    *,
    head: Head = "lm",
    is_generating: bool = False,
    use_te: bool = False,
) -> tuple[tuple[TensorShard, ...], ...]:
    """The shards that each rank holds, without the vocabulary's padding.

    Ranks that hold the same (equal tensor, pipeline, expert and expert-tensor ranks) share one
    tuple object, and ranks with a part in common share the shards of it.

    Args:
        fields: the flat Megatron fields of one model.
        layout: of one replica.
        head: `lm`: logits; `scalar`: one number per token.
        is_generating: the model decodes token by token, which excludes virtual stages.
        use_te: Transformer Engine's modules make the layers.

    Returns:
        Shards by rank.

    Raises:
        ConfigError: a field is missing, the layout cannot hold such a model, or a field is set
            whose effect only the live model knows.
    """
    weights = _build(fields, layout, head, is_generating=is_generating, use_te=use_te)
    return tuple(weights.at(rank) for rank in range(layout.world_size))


def _build(
    fields: Mapping[str, Any],
    layout: ParallelLayout,
    head: Head,
    *,
    is_generating: bool,
    use_te: bool,
) -> "_LayoutWeights":
    if is_generating and layout.vpp_size > 1:
        raise ConfigError(
            "a model that generates has no virtual stages: leave "
            "virtual_pipeline_model_parallel_size out"
        )
    model = read_architecture(fields, layout, head, use_te=use_te)
    _check_layout(model, layout)
    return _LayoutWeights(model, layout, split_layers(fields, layout))


def _check_layout(model: Architecture, layout: ParallelLayout) -> None:
    """Refuse what Megatron refuses; sizes of single parameters are checked where they are cut."""
    tp_size, ep_size, etp_size = layout.tp_size, layout.ep_size, _etp_size(layout)
    sizes = model.attention
    if sizes.num_heads % tp_size:
        raise ConfigError(
            f"num_attention_heads={sizes.num_heads} is no multiple of "
            f"tensor_model_parallel_size={tp_size}"
        )
    if isinstance(sizes, GroupedAttention):
        groups = sizes.num_groups
        if groups % tp_size and tp_size % groups:
            raise ConfigError(
                f"num_query_groups={groups} and tensor_model_parallel_size={tp_size} do not divide"
            )
    num_experts = model.experts.num_experts if model.experts is not None else 1
    if num_experts % ep_size:
        raise ConfigError(
            f"num_moe_experts={num_experts} is no multiple of expert_model_parallel_size={ep_size}"
        )
    stage_size = layout.world_size // layout.pp_size
    if model.experts is not None and stage_size % (ep_size * etp_size):
        raise ConfigError(
            f"a pipeline stage has {stage_size} ranks, no multiple of expert_model_parallel_size "
            f"x expert_tensor_parallel_size = {ep_size} x {etp_size}"
        )
    if model.experts is not None and model.has_bias:
        if etp_size > 1:
            raise ConfigError("add_bias_linear with experts needs expert_tensor_parallel_size=1")
        if model.experts.shared_ffn_size is not None:
            raise ConfigError("add_bias_linear excludes moe_shared_expert_intermediate_size")


def _etp_size(layout: ParallelLayout) -> int:
    return layout.tp_size if layout.etp_size is None else layout.etp_size


class _LayoutWeights:
    """The shards of a layout, each made once.

    Args:
        model: the sizes.
        layout: of the replica.
        chunks: [stage][chunk] layers.
    """

    def __init__(
        self, model: Architecture, layout: ParallelLayout, chunks: tuple[tuple[range, ...], ...]
    ) -> None:
        self._model = model
        self._layout = layout
        self._chunks = chunks
        self._whole: dict[_Position, tuple[TensorShard, ...]] = {}
        self._plain: dict[tuple[int, int], list[TensorShard]] = {}
        self._routed: dict[tuple[int, int, int], list[TensorShard]] = {}

    def at(self, rank: int) -> tuple[TensorShard, ...]:
        """Everything that one rank holds."""
        position = self._position(rank)
        if position not in self._whole:
            self._whole[position] = (*self._plain_at(position), *self._routed_at(position))
        return self._whole[position]

    def _position(self, rank: int) -> _Position:
        """Experts are spread over the ranks of a stage, expert-tensor ranks first."""
        at = self._layout.coordinates(rank)
        if self._model.experts is None:
            return _Position(at.pp_rank, at.tp_rank, 0, 0)
        within = rank % (self._layout.world_size // self._layout.pp_size)
        ep_rank, etp_rank = divmod(within, _etp_size(self._layout))
        return _Position(at.pp_rank, at.tp_rank, ep_rank % self._layout.ep_size, etp_rank)

    def _plain_at(self, position: _Position) -> list[TensorShard]:
        """All but the routed experts: cut over the tensor-parallel ranks."""
        stage, rank = position.pp_rank, position.tp_rank
        if (stage, rank) not in self._plain:
            shards: list[TensorShard] = []
            for chunk in range(self._layout.vpp_size):
                for place, parameters in self._plain_parts(stage, chunk):
                    shards += self._cut(parameters, place, rank, self._layout.tp_size)
            self._plain[stage, rank] = shards
        return self._plain[stage, rank]

    def _plain_parts(self, stage: int, chunk: int) -> Iterable[tuple[_Place, list[Parameter]]]:
        is_first = stage == 0 and chunk == 0
        is_last = stage == self._layout.pp_size - 1 and chunk == self._layout.vpp_size - 1
        edge = _Place(f"{chunk}.", "")
        if is_first:
            yield edge, embedding_parameters(self._model)
        for layer, number in enumerate(self._chunks[stage][chunk]):
            experts = self._experts_of(number)
            yield self._layer_place(chunk, layer, number), layer_parameters(self._model, experts)
        if is_last:
            yield edge, final_parameters(self._model, has_embedding=is_first)

    def _routed_at(self, position: _Position) -> list[TensorShard]:
        """The routed experts: spread over expert ranks, cut over expert-tensor ranks."""
        at = (position.pp_rank, position.ep_rank, position.etp_rank)
        if at not in self._routed:
            self._routed[at] = [
                shard
                for chunk, layers in enumerate(self._chunks[position.pp_rank])
                for layer, number in enumerate(layers)
                for shard in self._routed_in(self._layer_place(chunk, layer, number), number, at)
            ]
        return self._routed[at]

    def _routed_in(
        self, layer: _Place, number: int, at: tuple[int, int, int]
    ) -> Iterable[TensorShard]:
        experts = self._experts_of(number)
        if experts is None:
            return
        _, ep_rank, etp_rank = at
        num_local = experts.num_experts // self._layout.ep_size
        parameters = expert_parameters(self._model, experts)
        for local in range(num_local):
            stem = f"{layer.local_prefix}mlp.experts."
            place = _Place(
                stem if experts.is_grouped else f"{stem}local_experts.{local}.",
                f"{layer.key_prefix}mlp.experts.experts.",
                (*layer.index, ep_rank * num_local + local),
                (*layer.counts, experts.num_experts),
                local_suffix=str(local) if experts.is_grouped else "",
            )
            yield from self._cut(parameters, place, etp_rank, _etp_size(self._layout))

    def _experts_of(self, number: int) -> ExpertSizes | None:
        return self._model.experts if self._model.expert_layers[number] else None

    def _layer_place(self, chunk: int, layer: int, number: int) -> _Place:
        local = f"{chunk}.decoder.layers.{layer}."
        if self._model.has_stacked_layers:
            return _Place(local, "decoder.layers.", (number,), (self._model.num_layers,))
        return _Place(local, f"decoder.layers.{number}.")

    def _cut(
        self, parameters: list[Parameter], place: _Place, rank: int, size: int
    ) -> list[TensorShard]:
        """The shards of some parameters on one of `size` tensor-parallel ranks."""
        dtype = self._model.dtype
        return [s for p in parameters for s in _cut_parameter(p, place, rank, size, dtype)]


def _cut_parameter(
    parameter: Parameter, place: _Place, rank: int, size: int, dtype: str
) -> Iterable[TensorShard]:
    axis, shape = parameter.axis, parameter.shape
    lead = (1,) * len(place.index)
    whole = shape if parameter.num_rows is None else (parameter.num_rows, *shape[1:])
    key = place.key_prefix + (parameter.key or parameter.name)
    name = place.local_prefix + parameter.name + place.local_suffix
    zeros = (0,) * len(shape)
    pieces = [(0, shape[0])] if axis is None else _pieces(parameter, shape[axis], rank, size)
    for number, (start, length) in enumerate(pieces):
        offset, extent, local = zeros, shape, zeros
        if axis is not None:
            offset = _replace(zeros, axis, start)
            extent = _replace(shape, axis, length)
            local = _replace(zeros, axis, number * length)
        if parameter.num_rows is not None:
            rows = min(length, parameter.num_rows - start)
            if rows <= 0:
                continue
            extent = _replace(extent, 0, rows)
        box = Box(place.index + offset, lead + extent)
        kind = parameter.dtype or dtype
        yield TensorShard(key, place.counts + whole, box, kind, name, local)


def _pieces(parameter: Parameter, extent: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Start and length, along the cut axis, of what one rank holds of each part."""
    length, rest = divmod(extent, parameter.num_parts * size)
    if rest:
        raise ConfigError(
            f"{parameter.name}: {extent // parameter.num_parts} of {parameter.shape} are no "
            f"multiple of {size} tensor-parallel ranks"
        )
    part = extent // parameter.num_parts
    return [(number * part + rank * length, length) for number in range(parameter.num_parts)]


def _replace(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
