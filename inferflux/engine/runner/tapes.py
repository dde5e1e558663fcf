"""DecodeTapes: decode steps on a CPU whose layers run without Python.

A step is recorded at load (see `kernels.native.tape`); the first of each number of rows makes the tape that all of them
play. They compute the very same as op by op. Knows no scheduler and no sampling.
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
from inferflux.kernels.native.tape import Recording, Tape, record
from inferflux.kernels.torch import linear, quantized_linear

logger = logging.getLogger(__name__)
Tensor = torch.Tensor

# Rows of the step that is recorded: of one row, what grows with the rows could not be told from what does not.
_RECORDED: Final = 2
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
    """Returns tapes for a model on a CPU; None where a layer computes with anything that might miss being called.

    Writes slot 0 of page 0, which must be nobody's.
    """
    is_native = all(getattr(kernels, op) is ours for op, ours in _OPS.items())
    if not isinstance(decoder, Decoder) or not all(map(_is_plain, decoder.layers)):
        return None
    if not is_native or decoder.context.size > 1:
        return None
    inputs = static_inputs(max(max_batch_size, _RECORDED), -(-max_model_len // kv_pool.shape[3]), kv_pool.device)
    with torch.inference_mode():
        hidden, angles = decoder.embed(inputs.token_ids, inputs.metadata.positions)
        place = _Place(inputs, hidden.clone(), tuple((cos.clone(), sin.clone()) for cos, sin in angles))
        tapes = DecodeTapes(decoder, kv_pool, place)
    if isinstance(tapes.recording, str):
        logger.info("decode steps are computed op by op: %s", tapes.recording)
        return None
    return tapes


class DecodeTapes:
    """Tapes of steps of up to as many rows as `place` has. recording: what they are of, or why there are none."""

    def __init__(self, decoder: Decoder, kv_pool: Tensor, place: _Place) -> None:
        self._decoder = decoder
        self._place = place
        self._tapes: dict[int, tuple[_Place, Tape]] = {}
        self._arena = torch.empty(0, dtype=torch.uint8)
        # As they are on the tapes.
        self._parts = _parts(decoder)
        self._num_threads = torch.get_num_threads()
        recorded = place.first(_RECORDED)

        def compute() -> Tensor:
            step = Step(recorded.inputs.metadata, recorded.angles)
            return decoder.last_norm(*decoder.through_layers(recorded.hidden, kv_pool, step))

        _, self.recording = record(compute, _RECORDED)

    def run(self, batch: Batch) -> Decoded | None:
        """Runs a step that only decodes. None: it is of another kind, or the model is not what it was."""
        if not only_decodes(batch) or not self._is_as_recorded():
            return None
        place, tape = self._tape_of(batch.metadata.num_rows)
        place.fill(batch, *self._decoder.embed(batch.token_ids, batch.metadata.positions))
        hidden = tape.play(self._arena)
        return Decoded(hidden, self._decoder.logits(hidden))

    def _tape_of(self, num_rows: int) -> tuple[_Place, Tape]:
        found = self._tapes.get(num_rows)
        if found is None:
            assert isinstance(self.recording, Recording)
            found = self._tapes[num_rows] = self._place.first(num_rows), self.recording.tape(num_rows)
            if len(self._arena) < found[1].num_bytes:
                self._arena = torch.empty(found[1].num_bytes, dtype=torch.uint8)
        return found

    def _is_as_recorded(self) -> bool:
        return torch.get_num_threads() == self._num_threads and _parts(self._decoder) == self._parts


def _parts(decoder: Decoder) -> list[tuple[Any, ...]]:
    """What somebody may have replaced."""
    return [(layer, getattr(layer, "attention", None), getattr(layer, "mlp", None)) for layer in decoder.layers]


def _is_plain(layer: Any) -> bool:
    return type(layer) is DecoderLayer and type(layer.attention) is Attention and type(layer.mlp) is GatedMlp
