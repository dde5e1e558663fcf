"""The weight table: every tensor a model's checkpoint must hold, by exact name and shape, and what it becomes.

Knows names and shapes, and which dimension ranks share; reads nothing. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from inferflux.engine.models.catalog import FAMILIES
from inferflux.engine.models.spec import ModelSpec
from inferflux.engine.models.weight_names import WeightNames
from inferflux.engine.weights.source import TensorSource, Weight


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights; None: the model has none. H, K, D: heads, key/value heads, head size.

    qkv [(H + 2K) * D, hidden], o [hidden, H * D], gate_up [2 * intermediate, hidden], down [hidden, intermediate].
    Of a mixture of experts gate_up and down are the shared one's, if there is one; router [experts, hidden]; expert N's
    two matrices stand in experts_gate_up[N] and experts_down[N].
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
    gate_up: Weight | None
    gate_up_bias: Weight | None
    down: Weight | None
    down_bias: Weight | None
    mlp_output_norm: Weight | None
    router: Weight | None
    shared_gate: Weight | None
    experts_gate_up: tuple[Weight, ...]
    experts_down: tuple[Weight, ...]


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
                if not field.name.startswith("experts_"):
                    yield from getattr(layer, field.name) or ()
            yield from chain.from_iterable((*layer.experts_gate_up, *layer.experts_down))


def weight_table(spec: ModelSpec) -> ModelWeights:
    names = FAMILIES[spec.architecture].names
    matrix = (spec.vocab_size, spec.hidden_size)
    return ModelWeights(
        embedding=(TensorSource(f"{names.prefix}embed_tokens.weight", matrix, "vocabulary"),),
        layers=tuple(
            _layer(spec, names, f"{names.prefix}layers.{i}.", layer.sparse) for i, layer in enumerate(spec.layers)
        ),
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


def _layer(spec: ModelSpec, names: WeightNames, prefix: str, is_sparse: bool) -> LayerWeights:
    hidden = spec.hidden_size
    query, key_value = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv_rows, kv_heads = (query, key_value, key_value), (0, spec.num_kv_heads, spec.num_kv_heads)

    def norm(name: str, size: int = hidden) -> Weight:
        return (TensorSource(f"{prefix}{name}.weight", (size,)),)

    return LayerWeights(
        input_norm=norm("input_layernorm"),
        qkv=_stacked(prefix, names.qkv, qkv_rows, (hidden,), kv_heads),
        qkv_bias=_stacked(prefix, names.qkv, qkv_rows, (), kv_heads) if spec.qkv_bias else None,
        query_norm=_head_norm(spec, f"{prefix}self_attn.q_norm.weight", query, 0),
        key_norm=_head_norm(spec, f"{prefix}self_attn.k_norm.weight", key_value, spec.num_kv_heads),
        o=_row(f"{prefix}self_attn.o_proj.weight", hidden, query),
        o_bias=_row_bias(f"{prefix}self_attn.o_proj.bias", hidden) if spec.o_bias else None,
        attention_output_norm=norm(names.attention_output_norm) if spec.sandwich_norms else None,
        mlp_input_norm=norm(names.mlp_input_norm),
        mlp_output_norm=norm(names.mlp_output_norm) if spec.sandwich_norms else None,
        **(_experts(spec, names, prefix) if is_sparse else _mlp(spec, names, prefix)),
    )


def _mlp(spec: ModelSpec, names: WeightNames, prefix: str) -> dict[str, Any]:
    """Returns the fields of LayerWeights that an MLP has."""
    hidden, rows = spec.hidden_size, (spec.intermediate_size,) * 2
    return {
        "gate_up": _stacked(prefix, names.gate_up, rows, (hidden,)),
        "gate_up_bias": _stacked(prefix, names.gate_up, rows, ()) if spec.mlp_bias else None,
        "down": _row(f"{prefix}{names.down}.weight", hidden, spec.intermediate_size),
        "down_bias": _row_bias(f"{prefix}{names.down}.bias", hidden) if spec.mlp_bias else None,
        "router": None,
        "shared_gate": None,
        "experts_gate_up": (),
        "experts_down": (),
    }


def _experts(spec: ModelSpec, names: WeightNames, prefix: str) -> dict[str, Any]:
    """Returns the fields of LayerWeights that a mixture of experts has. Ranks have whole experts."""
    assert spec.moe is not None, "only a mixture of experts has sparse layers"
    hidden, size, shared = spec.hidden_size, spec.moe.expert_size, spec.moe.shared_size
    folders = [f"{prefix}{names.experts}.{index}." for index in range(spec.moe.num_experts)]
    shared_names = tuple(f"{names.shared_expert}.{name}" for name in names.expert_gate_up)
    return {
        "gate_up": _stacked(prefix, shared_names, (shared, shared), (hidden,)) if shared else None,
        "gate_up_bias": None,
        "down": _row(f"{prefix}{names.shared_expert}.{names.expert_down}.weight", hidden, shared) if shared else None,
        "down_bias": None,
        "router": (TensorSource(f"{prefix}{names.router}.weight", (spec.moe.num_experts, hidden)),),
        "shared_gate": (TensorSource(f"{prefix}{names.shared_expert}_gate.weight", (1, hidden)),) if shared else None,
        "experts_gate_up": tuple(
            tuple(TensorSource(f"{folder}{name}.weight", (size, hidden)) for name in names.expert_gate_up)
            for folder in folders
        ),
        "experts_down": tuple(
            (TensorSource(f"{folder}{names.expert_down}.weight", (hidden, size)),) for folder in folders
        ),
    }


def _row(name: str, rows: int, columns: int) -> Weight:
    return (TensorSource(name, (rows, columns), "row"),)


def _row_bias(name: str, size: int) -> Weight:
    return (TensorSource(name, (size,), "row_bias"),)


def _head_norm(spec: ModelSpec, name: str, width: int, num_heads: int) -> Weight | None:
    """width: of all heads together. num_heads: see TensorSource.heads."""
    if spec.qk_norm_whole:
        return (TensorSource(name, (width,), "column", heads=(num_heads,)),)
    return (TensorSource(name, (spec.head_dim,)),) if spec.qk_norm else None


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
