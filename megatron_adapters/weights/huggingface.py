"""From Megatron's global names to those of transformers' decoders, and back. Pure.

The tables of names are in `naming`. Which parameters a model has is read off its fields: a bias, a
norm, a shared expert is there or it is not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.parallel.renaming import Piece, Region, Renaming
from chatlearn.parallel.sharding import Box
from megatron_adapters.weights.architecture import (
    Architecture,
    ExpertSizes,
    GroupedAttention,
    Head,
    read_architecture,
)
from megatron_adapters.weights.naming import NAMINGS, Naming, Stems
from megatron_adapters.weights.parameters import (
    Parameter,
    embedding_parameters,
    expert_parameters,
    final_parameters,
    layer_parameters,
)

__all__ = ["find_naming", "huggingface_renaming"]

# Transformer Engine holds a norm in the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv": "input_layernorm",
    "mlp.linear_fc1": "pre_mlp_layernorm",
    "self_attention.linear_q_up_proj": "self_attention.q_layernorm",
    "self_attention.linear_kv_up_proj": "self_attention.kv_layernorm",
}


def huggingface_renaming(
    fields: Mapping[str, Any],
    *,
    head: Head = "lm",
    use_te: bool = False,
    naming: Naming | None = None,
) -> Renaming:
    """The renaming from Megatron's naming to that of `transformers`; one for every layout.

    The vocabulary has no padding on either side. Tied embeddings are `embed_tokens` only. A scalar
    head is the `score` of a sequence classifier with one label.

    Args:
        fields: the flat Megatron fields of the model.
        head: `lm` or `scalar`.
        use_te: the layers are Transformer Engine's modules, which hold the norms before them.
        naming: the table of names; None: that of a live model, see `find_naming`.

    Raises:
        ConfigError: a field says that the model has weights which no table names, or weights that
            mean something else there; names the field.
    """
    # How a rank computes its experts changes neither the names nor the shapes.
    given = {**fields, "moe_grouped_gemm": None}
    model = read_architecture(given, ParallelLayout(), head, use_te=use_te)
    _check(model, fields)
    table = find_naming(fields, head=head) if naming is None else naming
    pieces = [*_outer_pieces(model, table)]
    stacked = model.num_layers if model.has_stacked_layers else None
    for number in range(model.num_layers):
        place = _Place.layer(number, stacked)
        experts = model.experts if model.expert_layers[number] else None
        for parameter in layer_parameters(model, experts):
            pieces.extend(_layer_pieces(place, model, table, parameter))
        if experts is not None:
            pieces.extend(_expert_pieces(place, model, table, experts))
    return Renaming(tuple(pieces))


def find_naming(fields: Mapping[str, Any], *, head: Head = "lm") -> Naming:
    """The first table that has a name for each parameter of a model.

    Raises:
        ConfigError: there is none; names the parameters that Llama-like models lack.
    """
    given = {**fields, "moe_grouped_gemm": None}
    model = read_architecture(given, ParallelLayout(), head)
    stems = {_split(name)[0] for name in _parameter_names(model)}
    for table in NAMINGS.values():
        if stems <= set(table.layer):
            return table
    missing = ", ".join(sorted(stems - set(NAMINGS["llama"].layer)))
    raise ConfigError(
        f"no family of transformers that is known here has all of this model's parameters: "
        f"Llama-like models have no {missing}"
    )


def _parameter_names(model: Architecture) -> Iterator[str]:
    for has_experts in set(model.expert_layers):
        for parameter in layer_parameters(model, model.experts if has_experts else None):
            yield parameter.name


def _check(model: Architecture, fields: Mapping[str, Any]) -> None:
    """Refuse what transformers' families compute in another way, or do not have."""
    attention = model.attention
    refused = {
        "attention_output_gate": isinstance(attention, GroupedAttention)
        and attention.has_output_gate,
        "position_embedding_type": model.num_positions > 0,
        "rotary_interleaved": bool(fields.get("rotary_interleaved")),
        "normalization": model.has_norm_bias,
        "swiglu": not model.is_gated,
        "add_bias_linear": model.has_bias
        and (model.experts is not None or not isinstance(attention, GroupedAttention)),
        "layernorm_zero_centered_gamma": bool(fields.get("layernorm_zero_centered_gamma"))
        and not fields.get("sandwich_norms"),
    }
    found = [field for field, is_refused in refused.items() if is_refused]
    if found:
        raise ConfigError(
            f"{', '.join(found)}: such a model has no counterpart among the families of "
            "transformers that are known here, so its weights cannot be given Hugging Face names; "
            "they have rotary positions, RMSNorm, a gated MLP and grouped-query or multi-latent "
            "attention"
        )


@dataclass(frozen=True)
class _Place:
    """Where the tensors of a layer or of an expert stand in both namings.

    Attributes:
        old_prefix: before Megatron's name.
        new_prefix: before the other one.
        index: on the leading axes of Megatron's tensor (layer, expert).
        counts: lengths of those axes.
    """

    old_prefix: str
    new_prefix: str
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def layer(cls, number: int, stacked: int | None) -> "_Place":
        """Of a layer; `stacked` is the length of the axis along which Megatron stacks layers."""
        new = f"model.layers.{number}."
        if stacked is None:
            return cls(f"decoder.layers.{number}.", new)
        return cls("decoder.layers.", new, (number,), (stacked,))

    def expert(self, number: int, count: int, prefix: str) -> "_Place":
        """Of one of the layer's experts."""
        return _Place(
            f"{self.old_prefix}mlp.experts.experts.",
            self.new_prefix + prefix.format(expert=number),
            (*self.index, number),
            (*self.counts, count),
        )

    def move(
        self, parameter: Parameter, start: int, new_name: str, new_rows: int, at: int, rows: int
    ) -> Piece:
        """`rows` rows of a parameter, from `start` on, are those from `at` on of a new tensor.

        Args:
            parameter: in Megatron's words.
            start: first row there.
            new_name: of the other tensor, which has the same columns.
            new_rows: how many rows that has.
            at: first row there.
            rows: how many.
        """
        columns = parameter.shape[1:]
        zeros = (0,) * len(columns)
        lead = (1,) * len(self.index)
        old = Region(
            self.old_prefix + (parameter.key or parameter.name),
            (*self.counts, *parameter.shape),
            Box((*self.index, start, *zeros), (*lead, rows, *columns)),
        )
        new = Region(
            self.new_prefix + new_name,
            (new_rows, *columns),
            Box((at, *zeros), (rows, *columns)),
        )
        return Piece(old, new)


def _outer_pieces(model: Architecture, table: Naming) -> Iterator[Piece]:
    """What lies before and after the layers."""
    for parameter in (
        *embedding_parameters(model),
        *final_parameters(model, has_embedding=True),
    ):
        stem, kind = _split(parameter.name)
        new = table.outer["score" if stem == "output_layer" and model.head == "scalar" else stem]
        rows = parameter.shape[0] if parameter.num_rows is None else parameter.num_rows
        shape = (rows, *parameter.shape[1:])
        yield Piece(
            Region.whole(parameter.name, shape),
            Region.whole(new + kind, shape),
        )


def _layer_pieces(
    place: _Place, model: Architecture, table: Naming, parameter: Parameter
) -> Iterator[Piece]:
    stem, kind = _split(parameter.name)
    news = table.layer[stem]
    if stem == "self_attention.linear_qkv" and isinstance(model.attention, GroupedAttention):
        yield from _qkv_pieces(place, model.attention, parameter, tuple(n + kind for n in news))
        return
    yield from _row_pieces(place, parameter, tuple(new + kind for new in news))


def _row_pieces(place: _Place, parameter: Parameter, names: Stems) -> Iterator[Piece]:
    """Equal parts of the rows, one after the other (the gate's, then the up projection's)."""
    rows = parameter.shape[0] // len(names)
    for number, name in enumerate(names):
        yield place.move(parameter, number * rows, name, rows, 0, rows)


def _qkv_pieces(
    place: _Place, sizes: GroupedAttention, parameter: Parameter, names: Sequence[str]
) -> Iterator[Piece]:
    """Megatron holds, group by group, the group's query heads, its key head and its value head."""
    size = sizes.head_size
    query_rows = sizes.query_size // sizes.num_groups
    start = 0
    for group in range(sizes.num_groups):
        for name, rows in zip(names, (query_rows, size, size), strict=True):
            whole = rows * sizes.num_groups
            yield place.move(parameter, start, name, whole, group * rows, rows)
            start += rows


def _expert_pieces(
    place: _Place, model: Architecture, table: Naming, sizes: ExpertSizes
) -> Iterator[Piece]:
    parameters = expert_parameters(model, sizes)
    for parameter in parameters:
        stem, kind = _split(parameter.name)
        suffix = kind if table.has_expert_suffix else ""
        names = tuple(name + suffix for name in table.expert[stem])
        if "{expert}" in table.expert_prefix:
            for number in range(sizes.num_experts):
                expert = place.expert(number, sizes.num_experts, table.expert_prefix)
                yield from _row_pieces(expert, parameter, names)
            continue
        key = f"mlp.experts.experts.{parameter.name}"
        stacked = Parameter(parameter.name, (sizes.num_experts, *parameter.shape), key=key)
        name = table.expert_prefix + names[0]
        yield from _row_pieces(place, stacked, (name,))


def _split(name: str) -> tuple[str, str]:
    """A Megatron name as a stem of the tables and `.weight`, `.bias` or nothing."""
    stem, _, kind = name.rpartition(".")
    if kind == "layer_norm_weight":
        return _FUSED_NORMS[stem], ".weight"
    return (stem, f".{kind}") if kind in ("weight", "bias") else (name, "")
