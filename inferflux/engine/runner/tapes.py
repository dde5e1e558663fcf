"""DecodeTapes: decode steps on a CPU whose layers run without Python, once a step of as many rows has been recorded.

The first step of each number of rows is computed op by op and recorded meanwhile (see `kernels.native.tape`); the ones
after it play the tape, and compute the very same. Knows no scheduler and no sampling.
"""

import logging
from typing import Any, Final, NamedTuple

import torch

from inferflux.engine.layers.attention import Attention, Step
from inferflux.engine.layers.mlp import GatedMlp
from inferflux.engine.layers.rope import Angles
from inferflux.engine.models.decoder import Decoder, DecoderLayer
from inferflux.engine.runner.graphs import Decoded
from inferflux.engine.runner.inputs import Batch
from inferflux.engine.runner.static_inputs import StaticInputs, only_decodes, static_inputs
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.native import activation, attention, norm, rope
from inferflux.kernels.native.tape import Tape, record
from inferflux.kernels.torch import linear, quantized_linear

logger = logging.getLogger(__name__)
Tensor = torch.Tensor

# What a tape can hold: whoever brings an op of their own wants it called.
_OPS: Final[dict[str, Any]] = {
    "attention": attention.attention,
    "norm": norm.norm,
    "add_norm": norm.add_norm,
    "rope": rope.rope,
    "activation": activation.activation,
    "linear": linear,
    "quantized_linear": quantized_linear,
}


class _Place(NamedTuple):
    """Where the layers of a step of some number of rows read what they are given. angles: see `Step`."""

    inputs: StaticInputs
    hidden: Tensor
    angles: tuple[Angles, ...]

    def fill(self, batch: Batch, hidden: Tensor, angles: tuple[Angles, ...]) -> None:
        self.inputs.fill(batch)
        self.hidden.copy_(hidden)
        for (cos, sin), (new_cos, new_sin) in zip(self.angles, angles, strict=True):
            cos.copy_(new_cos)
            sin.copy_(new_sin)

    def first(self, size: int) -> "_Place":
        """Of its first rows; how long those are is read in each step."""
        angles = tuple((cos[:size], sin[:size]) for cos, sin in self.angles)
        return _Place(self.inputs.first(size, 1), self.hidden[:size], angles)


def decode_tapes(
    decoder: object, kernels: KernelSet, kv_pool: Tensor, max_batch_size: int, max_model_len: int
) -> "DecodeTapes | None":
    """Returns tapes for a model on a CPU; None where a layer computes with anything that might miss being called."""
    is_native = all(getattr(kernels, op) is ours for op, ours in _OPS.items())
    if not isinstance(decoder, Decoder) or not all(map(_is_plain, decoder.layers)):
        return None
    if not is_native or decoder.context.size > 1:
        return None
    inputs = static_inputs(max_batch_size, -(-max_model_len // kv_pool.shape[3]), kv_pool.device)
    return DecodeTapes(decoder, kv_pool, inputs)


class DecodeTapes:
    """Tapes of steps of up to as many rows as `inputs` have, made as they come."""

    def __init__(self, decoder: Decoder, kv_pool: Tensor, inputs: StaticInputs) -> None:
        self._decoder = decoder
        self._kv_pool = kv_pool
        hidden, angles = decoder.embed(inputs.token_ids, inputs.metadata.positions)
        self._place = _Place(inputs, hidden.clone(), tuple((cos.clone(), sin.clone()) for cos, sin in angles))
        self._recorded: dict[int, tuple[_Place, Tape]] = {}
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._refusal: str | None = None
        # As they are on the tapes.
        self._parts = _parts(decoder)
        self._num_threads = torch.get_num_threads()

    def run(self, batch: Batch) -> Decoded | None:
        """Runs a step that only decodes. None: it is of another kind, or cannot be on a tape."""
        if self._refusal is not None or not only_decodes(batch) or not self._is_as_recorded():
            return None
        size = batch.metadata.num_rows
        place, tape = self._recorded.get(size) or (self._place.first(size), None)
        place.fill(batch, *self._decoder.embed(batch.token_ids, batch.metadata.positions))
        hidden = self._record(place) if tape is None else tape.play(self._arena)
        return Decoded(hidden, self._decoder.logits(hidden))

    def _record(self, place: _Place) -> Tensor:
        """Computes the step. Returns the stream behind the last norm, and keeps a tape if there can be one."""
        decoder = self._decoder

        def compute() -> Tensor:
            step = Step(place.inputs.metadata, place.angles)
            return decoder.last_norm(*decoder.through_layers(place.hidden, self._kv_pool, step))

        hidden, tape = record(compute)
        if isinstance(tape, str):
            logger.info("decode steps are computed op by op: %s", tape)
            self._refusal = tape
            return hidden
        if len(self._arena) < tape.num_bytes:
            self._arena = torch.empty(tape.num_bytes, dtype=torch.uint8)
        self._recorded[place.inputs.num_rows] = place, tape
        return hidden

    def _is_as_recorded(self) -> bool:
        """Whether the model is what it was; tapes for another number of threads are thrown away."""
        if torch.get_num_threads() != self._num_threads:
            self._num_threads = torch.get_num_threads()
            self._recorded.clear()
        return _parts(self._decoder) == self._parts


def _parts(decoder: Decoder) -> list[tuple[Any, ...]]:
    """What somebody may have replaced."""
    return [(layer, getattr(layer, "attention", None), getattr(layer, "mlp", None)) for layer in decoder.layers]


def _is_plain(layer: Any) -> bool:
    return type(layer) is DecoderLayer and type(layer.attention) is Attention and type(layer.mlp) is GatedMlp
