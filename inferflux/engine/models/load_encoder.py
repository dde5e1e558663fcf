"""Loading an encoder: a folder becomes an Encoder. Knows the names and shapes of its checkpoint's tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.linear import Linear
from inferflux.engine.models.encoder import Encoder, EncoderLayer, Norm
from inferflux.engine.models.encoder_spec import ENCODERS, EncoderSpec
from inferflux.engine.weights.checkpoint import Checkpoint
from inferflux.engine.weights.loader import WeightLoader, check_tensors
from inferflux.engine.weights.source import TensorSource, Weight
from inferflux.kernels.kernel_set import KernelSet

_QKV: Final = ("attention.self.query", "attention.self.key", "attention.self.value")
_WORDS: Final = "embeddings.word_embeddings.weight"
_POSITIONS: Final = "embeddings.position_embeddings.weight"
_TYPES: Final = "embeddings.token_type_embeddings.weight"
_NORM: Final = "embeddings.LayerNorm"
# A head for training, a second vector made of the first token's state, and a table of numbers from 0.
_IGNORED: Final = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids", "embeddings.token_type_ids")


def load_encoder(
    path: Path, spec: EncoderSpec, *, kernels: KernelSet, dtype: torch.dtype, context: ParallelContext
) -> Encoder:
    """Raises ModelLoadError when the folder is not sound."""
    with Checkpoint(path) as checkpoint:
        prefix = ENCODERS[spec.architecture].prefix
        names = _Names(spec, prefix if prefix + _WORDS in checkpoint.tensors else "")
        check_tensors(checkpoint, names.sources(), names.is_ignored)
        loader = WeightLoader(checkpoint, context, context.device, dtype)
        types = loader.load(names.table(_TYPES, spec.num_types))
        return Encoder(
            spec,
            words=loader.load(names.table(_WORDS, spec.vocab_size)),
            positions=loader.load(names.table(_POSITIONS, spec.num_positions)) + types[0],
            norm=_norm(loader, names, _NORM),
            layers=[_layer(loader, names, kernels, f"encoder.layer.{index}.") for index in range(spec.num_layers)],
        )


class _Names:
    """The checkpoint's tensors, all of them behind `prefix`."""

    def __init__(self, spec: EncoderSpec, prefix: str) -> None:
        self.spec = spec
        self._prefix = prefix

    def table(self, name: str, num_rows: int) -> Weight:
        return (TensorSource(self._prefix + name, (num_rows, self.spec.hidden_size)),)

    def matrix(self, names: tuple[str, ...], num_rows: int, num_columns: int) -> tuple[Weight, Weight]:
        """Returns the weight and the bias of matrices stacked by rows."""
        return (
            tuple(TensorSource(f"{self._prefix}{name}.weight", (num_rows, num_columns)) for name in names),
            tuple(TensorSource(f"{self._prefix}{name}.bias", (num_rows,)) for name in names),
        )

    def norm(self, name: str) -> tuple[Weight, Weight]:
        size = (self.spec.hidden_size,)
        return (
            (TensorSource(f"{self._prefix}{name}.weight", size),),
            (TensorSource(f"{self._prefix}{name}.bias", size),),
        )

    def layer(self, prefix: str) -> tuple[tuple[Weight, Weight], ...]:
        """Returns weights and biases in the order of EncoderLayer's fields."""
        hidden, inner = self.spec.hidden_size, self.spec.intermediate_size
        return (
            self.matrix(tuple(prefix + name for name in _QKV), hidden, hidden),
            self.matrix((f"{prefix}attention.output.dense",), hidden, hidden),
            self.norm(f"{prefix}attention.output.LayerNorm"),
            self.matrix((f"{prefix}intermediate.dense",), inner, hidden),
            self.matrix((f"{prefix}output.dense",), hidden, inner),
            self.norm(f"{prefix}output.LayerNorm"),
        )

    def sources(self) -> Iterator[TensorSource]:
        spec = self.spec
        for name, num_rows in ((_WORDS, spec.vocab_size), (_POSITIONS, spec.num_positions), (_TYPES, spec.num_types)):
            yield from self.table(name, num_rows)
        pairs = [self.norm(_NORM)]
        for index in range(spec.num_layers):
            pairs += self.layer(f"encoder.layer.{index}.")
        for weight, bias in pairs:
            yield from (*weight, *bias)

    def is_ignored(self, name: str) -> bool:
        return name.removeprefix(self._prefix).startswith(_IGNORED)


def _norm(loader: WeightLoader, names: _Names, name: str) -> Norm:
    return Norm(*(loader.load(weight) for weight in names.norm(name)))


def _layer(loader: WeightLoader, names: _Names, kernels: KernelSet, prefix: str) -> EncoderLayer:
    loaded = [(loader.load(weight), loader.load(bias)) for weight, bias in names.layer(prefix)]
    qkv, output, attention_norm, up, down, mlp_norm = loaded
    return EncoderLayer(
        qkv=Linear(kernels, *qkv),
        output=Linear(kernels, *output),
        attention_norm=Norm(*attention_norm),
        up=Linear(kernels, *up),
        down=Linear(kernels, *down),
        mlp_norm=Norm(*mlp_norm),
    )
