"""StepTapes: steps on a CPU whose layers run without Python.

A decode step is recorded at load (see `kernels.native.tape`), and once more for steps with adapters if there are any.
The first decode step of each number of rows makes the tape that later ones play; a step with prompt chunks makes its
own, unless it is large. Results are bit-equal to those computed op by op. Knows no scheduler and no sampling.
"""

import logging
from typing import Any, Final, NamedTuple

import torch

from inferflux.engine.layers.attention import Attention, Step
from inferflux.engine.layers.lora import StepAdapters
from inferflux.engine.layers.mlp import GatedMlp
from inferflux.engine.models.decoder import Decoder, DecoderLayer
from inferflux.engine.runner.graphs import Decoded
from inferflux.engine.runner.inputs import Batch
from inferflux.engine.runner.static_inputs import StaticInputs, static_inputs
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.native import activation, attention, norm, rope
from inferflux.kernels.native.tape import Recording, Tape, record
from inferflux.kernels.torch import linear, quantized_linear

logger = logging.getLogger(__name__)
Tensor = torch.Tensor

# Rows of the recorded step: a prime, so that what does not grow with the rows is noticed (see `record`).
_RECORDED: Final = 13
# Tokens of the largest step with prompt chunks that gets a tape. Making one takes 0.4 ms; without one, Python takes 4
# ms for the 272 calls of a model of 30 layers, of the 44 ms of a step of 128 tokens in int8 (two cores of a Zen 5
# EPYC). Larger steps would gain less, and the memory for a tape is kept.
_MAX_TOKENS: Final = 512
# Methods that a tape replaces. One set on a decoder itself, rather than on its class, is a user's own.
_METHODS: Final = frozenset(("hidden_states", "embed", "run_layers", "apply_final_norm", "local_logits", "logits"))
# The ops that a tape can hold. A user's own op must be called.
_OPS: Final[dict[str, Any]] = {
    "attention": attention.attention,
    "norm": norm.norm,
    "add_norm": norm.add_norm,
    "rope": rope.rope,
    "activation": activation.activation,
    "linear": linear,
    "quantized_linear": quantized_linear,
}


class _Inputs(NamedTuple):
    """The memory from which the layers of a taped step read their inputs. angles [T, 2, R]: cosines and sines of each
    rope. adapters int32 [T]: see `StepAdapters`."""

    static: StaticInputs
    hidden: Tensor
    angles: tuple[Tensor, ...]
    adapters: Tensor

    def first(self, size: int) -> "_Inputs":
        """The inputs of the first `size` tokens, one per row; each step reads the rows' lengths."""
        angles = tuple(own[:size] for own in self.angles)
        return _Inputs(self.static.first(size, 1), self.hidden[:size], angles, self.adapters[:size])


class _Filler:
    """Copies a batch of a fixed number of tokens, in num_rows rows, to where its tape reads it."""

    def __init__(self, decoder: Decoder, inputs: _Inputs, num_rows: int) -> None:
        metadata = inputs.static.metadata
        self._embed = decoder.writer(inputs.hidden, inputs.angles)
        self._query_starts = metadata.query_starts.numpy()[: num_rows + 1]
        self._kv_lengths = metadata.kv_lengths.numpy()[:num_rows]
        self._page_table = metadata.page_table.numpy()[:num_rows]
        self._kv_slots = metadata.slots.numpy()
        self._positions = metadata.positions.numpy()
        self._adapters = inputs.adapters.numpy()

    def fill(self, batch: Batch) -> None:
        arrays = batch.arrays
        self._query_starts[:] = arrays.query_starts
        self._kv_lengths[:] = arrays.kv_lengths
        self._page_table[:, : arrays.page_table.shape[1]] = arrays.page_table
        self._kv_slots[:] = arrays.kv_slots
        self._positions[:] = arrays.positions
        if batch.adapters is not None:
            self._adapters[:] = batch.adapters.numbers
        self._embed(arrays.token_ids, arrays.positions)


class _Playable(NamedTuple):
    """hidden, local_logits: the results in the arena; local_logits None: the tape has none. decoded: both, if the local
    logits are final."""

    filler: _Filler
    tape: Tape
    hidden: Tensor
    local_logits: Tensor | None
    decoded: Decoded | None

    def decode(self, decoder: Decoder) -> Decoded:
        """Returns the results of the last play."""
        if self.decoded is not None:
            return self.decoded
        hidden, local_logits = self.hidden, self.local_logits
        return Decoded(hidden, decoder.logits(hidden) if local_logits is None else decoder.finish_logits(local_logits))


def step_tapes(
    decoder: object, kernels: KernelSet, kv_pool: Tensor, max_batch_size: int, max_model_len: int
) -> "StepTapes | None":
    """Returns tapes for a model on a CPU; None, with a line in the log, if it cannot have any.

    Writes slot 0 of page 0, which no request may hold.
    """
    if type(decoder) is not Decoder or decoder.context.size > 1:
        return None
    static = static_inputs(max(max_batch_size, _MAX_TOKENS), -(-max_model_len // kv_pool.shape[3]), kv_pool.device)
    with torch.inference_mode():
        hidden, angles = decoder.embed(static.token_ids, static.metadata.positions)
        own_angles = tuple(torch.stack(pair, dim=1) for pair in angles)
        inputs = _Inputs(static, hidden.clone(), own_angles, torch.zeros(len(hidden), dtype=torch.int32))
        recorded = inputs.first(_RECORDED)
        recording = _obstacle(decoder, kernels) or _record(decoder, kv_pool, recorded, with_adapters=False)
        if isinstance(recording, str):
            logger.info("steps are computed op by op: %s", recording)
            return None
        if not decoder.is_adapted:
            return StepTapes(decoder, inputs, recording)
        with_adapters = _record(decoder, kv_pool, recorded, with_adapters=True)
    if isinstance(with_adapters, str):
        logger.info("steps with adapters are computed op by op: %s", with_adapters)
        return StepTapes(decoder, inputs, recording)
    return StepTapes(decoder, inputs, recording, with_adapters)


class StepTapes:
    """Tapes of a recording, for steps of up to as many tokens as `inputs` hold. with_adapters: the recording for steps
    that use adapters; None: those run op by op."""

    def __init__(
        self, decoder: Decoder, inputs: _Inputs, recording: Recording, with_adapters: Recording | None = None
    ) -> None:
        self._decoder = decoder
        self._inputs = inputs
        self._recordings = {False: recording, True: with_adapters}
        # For steps with prompt chunks, which need few logits.
        self._without_logits = {
            is_adapted: None if one is None else one.first_result() for is_adapted, one in self._recordings.items()
        }
        self._tapes: dict[tuple[int, bool], _Playable] = {}
        self._arena = torch.empty(0, dtype=torch.uint8)
        # The layers and parts that are on the tapes.
        self._layers = decoder.layers.copy()
        layers: list[Any] = decoder.layers
        self._parts = [(layer, layer.attention, layer.mlp) for layer in layers]
        self._has_changed = False

    def run(self, batch: Batch) -> Decoded | None:
        """Runs a step. Returns None if it has no tape: it is too large, uses adapters that are not recorded, or the
        model has been changed."""
        is_adapted = batch.adapters is not None
        recording = (self._recordings if batch.only_decodes else self._without_logits)[is_adapted]
        if recording is None or not self._is_as_recorded():
            return None
        if not batch.only_decodes:
            return self._run_chunks(batch, recording)
        key = len(batch.lengths), is_adapted
        playable = self._tapes.get(key) or self._add(key, recording)
        playable.filler.fill(batch)
        playable.tape.play(self._arena)
        return playable.decode(self._decoder)

    def _add(self, key: tuple[int, bool], recording: Recording) -> _Playable:
        num_rows, _ = key
        tape = recording.tape(num_rows)
        self._make_room(tape)
        filler = _Filler(self._decoder, self._inputs.first(num_rows), num_rows)
        added = self._tapes[key] = self._playable(filler, tape)
        return added

    def _run_chunks(self, batch: Batch, recording: Recording) -> Decoded | None:
        """Runs a step with prompt chunks: it needs the hidden states of some tokens, and the logits of fewer.

        recording: without logits.
        """
        num_tokens, num_rows = len(batch.arrays.token_ids), len(batch.lengths)
        if num_tokens > _MAX_TOKENS:
            return None
        tape = recording.tape(num_tokens, num_rows)
        self._make_room(tape)
        _Filler(self._decoder, self._inputs.first(num_tokens), num_rows).fill(batch)
        tape.play(self._arena)
        hidden = tape.results(self._arena)[0].index_select(0, batch.tensors.logit_indices)
        return Decoded(hidden, self._decoder.logits(hidden[: len(batch.sampled)]))

    def _make_room(self, tape: Tape) -> None:
        if len(self._arena) < tape.num_bytes:
            self._arena = torch.empty(tape.num_bytes, dtype=torch.uint8)
            for key, known in self._tapes.items():
                self._tapes[key] = self._playable(known.filler, known.tape)

    def _playable(self, filler: _Filler, tape: Tape) -> _Playable:
        hidden, *others = tape.results(self._arena)
        local_logits = others[0] if others else None
        if local_logits is None or not self._decoder.are_final(local_logits):
            return _Playable(filler, tape, hidden, local_logits, None)
        return _Playable(filler, tape, hidden, local_logits, Decoded(hidden, local_logits))

    def _is_as_recorded(self) -> bool:
        decoder = self._decoder
        same = (
            _METHODS.isdisjoint(vars(decoder))
            and decoder.layers == self._layers
            and all(layer.attention is attention and layer.mlp is mlp for layer, attention, mlp in self._parts)
        )
        if not same and not self._has_changed:
            logger.info("steps are computed op by op: the model has changed since load")
        self._has_changed = not same
        return same


def _obstacle(decoder: Decoder, kernels: KernelSet) -> str | None:
    """Returns why tapes cannot be used, or None: a user's own op or layer would not be called."""
    others = [op for op, ours in _OPS.items() if getattr(kernels, op) is not ours]
    if others:
        chosen = [choice for choice in kernels.choices if choice.op in others]
        refused = {reason for choice in chosen for name, reason in choice.refused if name == "native"}
        why = f" ({'; '.join(sorted(refused))})" if refused else ""
        return f"{', '.join(others)} not by the native library{why}"
    return None if all(map(_is_plain, decoder.layers)) else "a layer has parts that compute in torch"


def _record(decoder: Decoder, kv_pool: Tensor, inputs: _Inputs, *, with_adapters: bool) -> Recording | str:
    """Records a step, without the logits if only torch can multiply by the output matrix."""

    def compute() -> tuple[Tensor, ...]:
        angles = tuple((own[:, 0], own[:, 1]) for own in inputs.angles)
        step = Step(inputs.static.metadata, angles, StepAdapters(inputs.adapters, ()) if with_adapters else None)
        return (decoder.apply_final_norm(*decoder.run_layers(inputs.hidden, kv_pool, step)),)

    def compute_logits() -> tuple[Tensor, ...]:
        (hidden,) = compute()
        return hidden, decoder.local_logits(hidden)

    try:
        whole = record(compute_logits, len(inputs.hidden))
        return whole if isinstance(whole, Recording) else record(compute, len(inputs.hidden))
    except RuntimeError as error:  # a batch of this many tokens may be more than the model can compute
        return str(error)


def _is_plain(layer: Any) -> bool:
    return type(layer) is DecoderLayer and type(layer.attention) is Attention and type(layer.mlp) is GatedMlp
