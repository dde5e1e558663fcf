"""The weight table: every tensor a model's checkpoint must hold, by exact name and shape, and what it becomes.

Knows names and shapes, and which dimension ranks share; reads nothing. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from inferflux.engine.models.catalog import FAMILIES
from inferflux.engine.models.spec import ModelSpec
from inferflux.engine.models.weight_names import WeightNames
from inferflux.engine.weights.source import TensorSource, Weight


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights; None: the model has none. H, K, D: heads, key/value heads, head size.

    qkv [(H + 2K) * D, hidden], o [hidden, H * D], gate_up [2 * intermediate, hidden], down [hidden, intermediate].
    """

    input_norm: Weight
    qkv: Weight
    qkv_bias: Weight | None
    query_norm: Weight | None
    key_norm: Weight | None
    o: Weight
    o_bias: Weight | None
    attention_output_norm: Weight | None
    mlp_input_norm: Weight
    gate_up: Weight
    gate_up_bias: Weight | None
    down: Weight
    down_bias: Weight | None
    mlp_output_norm: Weight | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A model's weights. lm_head None: the embedding serves as the output matrix too."""

    embedding: Weight
    layers: tuple[LayerWeights, ...]
    final_norm: Weight
    lm_head: Weight | None

    def sources(self) -> Iterator[TensorSource]:
        """Yields every checkpoint tensor that is needed."""
        yield from (*self.embedding, *self.final_norm, *(self.lm_head or ()))
        for layer in self.layers:
            for field in fields(layer):
                yield from getattr(layer, field.name) or ()


def weight_table(spec: ModelSpec) -> ModelWeights:
    names = FAMILIES[spec.architecture].names
    matrix = (spec.vocab_size, spec.hidden_size)
    return ModelWeights(
        embedding=(TensorSource(f"{names.prefix}embed_tokens.weight", matrix, "vocabulary"),),
        layers=tuple(_layer(spec, names, f"{names.prefix}layers.{i}.") for i in range(spec.num_layers)),
        final_norm=(TensorSource(f"{names.prefix}norm.weight", (spec.hidden_size,)),),
        lm_head=None if spec.tied_embeddings else (TensorSource(names.lm_head, matrix, "vocabulary"),),
    )


def is_ignored(spec: ModelSpec, name: str) -> bool:
    """Tells whether a checkpoint may hold this tensor although nothing needs it."""
    names = FAMILIES[spec.architecture].names
    if spec.tied_embeddings and name == names.lm_head:
        return True
    if name.startswith(names.ignored_prefixes):
        return True
    layers = f"{names.prefix}layers."
    number, _, rest = name.removeprefix(layers).partition(".")
    return name.startswith(layers) and number.isdigit() and rest in names.ignored_in_layer


def _layer(spec: ModelSpec, names: WeightNames, prefix: str) -> LayerWeights:
    hidden = spec.hidden_size
    query, key_value = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv_rows, gate_up_rows = (query, key_value, key_value), (spec.intermediate_size,) * 2
    kv_heads = (0, spec.num_kv_heads, spec.num_kv_heads)

    def norm(name: str, size: int = hidden) -> Weight:
        return (TensorSource(f"{prefix}{name}.weight", (size,)),)

    def matrix(name: str, rows: int, columns: int) -> Weight:
        return (TensorSource(f"{prefix}{name}.weight", (rows, columns), "row"),)

    def row_bias(name: str) -> Weight:
        return (TensorSource(f"{prefix}{name}.bias", (hidden,), "row_bias"),)

    return LayerWeights(
        input_norm=norm("input_layernorm"),
        qkv=_stacked(prefix, names.qkv, qkv_rows, (hidden,), kv_heads),
        qkv_bias=_stacked(prefix, names.qkv, qkv_rows, (), kv_heads) if spec.qkv_bias else None,
        query_norm=norm("self_attn.q_norm", spec.head_dim) if spec.qk_norm else None,
        key_norm=norm("self_attn.k_norm", spec.head_dim) if spec.qk_norm else None,
        o=matrix("self_attn.o_proj", hidden, query),
        o_bias=row_bias("self_attn.o_proj") if spec.o_bias else None,
        attention_output_norm=norm(names.attention_output_norm) if spec.sandwich_norms else None,
        mlp_input_norm=norm(names.mlp_input_norm),
        gate_up=_stacked(prefix, names.gate_up, gate_up_rows, (hidden,)),
        gate_up_bias=_stacked(prefix, names.gate_up, gate_up_rows, ()) if spec.mlp_bias else None,
        down=matrix("mlp.down_proj", hidden, spec.intermediate_size),
        down_bias=row_bias("mlp.down_proj") if spec.mlp_bias else None,
        mlp_output_norm=norm(names.mlp_output_norm) if spec.sandwich_norms else None,
    )


def _stacked(
    prefix: str,
    names: tuple[str, ...],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    heads: tuple[int, ...] | None = None,
) -> Weight:
    """Returns one source per name, or one source of all rows where the checkpoint has them stacked already.

    columns: the second dimension, or () for the biases. heads: see TensorSource.
    """
    suffix = "weight" if columns else "bias"
    heads = heads or (0,) * len(rows)
    if len(names) == 1:
        return (TensorSource(f"{prefix}{names[0]}.{suffix}", (sum(rows), *columns), "column", rows, heads),)
    return tuple(
        TensorSource(f"{prefix}{name}.{suffix}", (num_rows, *columns), "column", heads=(num_heads,))
        for name, num_rows, num_heads in zip(names, rows, heads, strict=True)
    )
