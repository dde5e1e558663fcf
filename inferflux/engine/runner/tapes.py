"""StepTapes: steps on a CPU whose layers run without Python.

A decode step is recorded at load (see `kernels.native.tape`), and with adapters once more for steps that hold rows of
some. Of steps that only decode, the first of each number of rows makes the tape that all of them play; for one with
chunks of prompts a tape is made each time, unless the chunks are long. They compute the very same as op by op. Knows no
scheduler and no sampling.
"""

import logging
from typing import Any, Final, NamedTuple

import torch

from inferflux.engine.layers.attention import Attention, Step
from inferflux.engine.layers.low_rank import Adapted
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

# Rows of the step that is recorded: a prime, so that what does not grow with them shows (see `record`).
_RECORDED: Final = 13
# Tokens of the largest step with chunks that is played: making its tape takes 0.4 ms, and Python 4 ms for the 272 calls
# of a model of 30 layers, of 44 that a step of 128 tokens takes in int8 (two cores of a Zen 5 EPYC). Larger steps would
# gain less, and what is allocated for a tape is kept.
_MOST_TOKENS: Final = 512
# What a tape stands for: on a decoder itself, rather than its class, they are somebody's own.
_METHODS: Final = frozenset(("hidden_states", "embed", "through_layers", "last_norm", "scores", "logits"))
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


class _Inputs(NamedTuple):
    """Where the layers of a step of some number of tokens read what they are given. angles [T, 2, R]: the cosines and
    sines of each rope. adapters int32: each token's, see `Adapted`."""

    static: StaticInputs
    hidden: Tensor
    angles: tuple[Tensor, ...]
    adapters: Tensor

    def first(self, size: int) -> "_Inputs":
        """Of the first tokens, each a row by itself; how long those are is read in each step."""
        angles = tuple(own[:size] for own in self.angles)
        return _Inputs(self.static.first(size, 1), self.hidden[:size], angles, self.adapters[:size])


class _Filler:
    """Writes steps of so many tokens, of num_rows rows, where their tape reads them."""

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
    """hidden, scores: what a play leaves in the arena; None: no scores are on the tape. decoded: both, if the scores
    are logits already."""

    filler: _Filler
    tape: Tape
    hidden: Tensor
    scores: Tensor | None
    decoded: Decoded | None

    def decode(self, decoder: Decoder) -> Decoded:
        """Returns what the last play computed."""
        if self.decoded is not None:
            return self.decoded
        hidden, scores = self.hidden, self.scores
        return Decoded(hidden, decoder.logits(hidden) if scores is None else decoder.as_logits(scores))


def step_tapes(
    decoder: object, kernels: KernelSet, kv_pool: Tensor, max_batch_size: int, max_model_len: int
) -> "StepTapes | None":
    """Returns tapes for a model on a CPU; None, with a line in the log, where there can be none.

    Writes slot 0 of page 0, which must be nobody's.
    """
    if type(decoder) is not Decoder or decoder.context.size > 1:
        return None
    static = static_inputs(max(max_batch_size, _MOST_TOKENS), -(-max_model_len // kv_pool.shape[3]), kv_pool.device)
    with torch.inference_mode():
        hidden, angles = decoder.embed(static.token_ids, static.metadata.positions)
        own_angles = tuple(torch.stack(pair, dim=1) for pair in angles)
        inputs = _Inputs(static, hidden.clone(), own_angles, torch.zeros(len(hidden), dtype=torch.int32))
        recording = _hindrance(decoder, kernels) or _record(decoder, kv_pool, inputs.first(_RECORDED), adapted=False)
        if isinstance(recording, str):
            logger.info("steps are computed op by op: %s", recording)
            return None
        if not decoder.is_adapted:
            return StepTapes(decoder, inputs, recording)
        with_adapters = _record(decoder, kv_pool, inputs.first(_RECORDED), adapted=True)
    if isinstance(with_adapters, str):
        logger.info("steps with adapters are computed op by op: %s", with_adapters)
        return StepTapes(decoder, inputs, recording)
    return StepTapes(decoder, inputs, recording, with_adapters)


class StepTapes:
    """Tapes of a recording, for steps of up to as many tokens as `inputs` have. with_adapters: of steps with some of
    their rows; None: those are not on tape."""

    def __init__(
        self, decoder: Decoder, inputs: _Inputs, recording: Recording, with_adapters: Recording | None = None
    ) -> None:
        self._decoder = decoder
        self._inputs = inputs
        self._recordings = {False: recording, True: with_adapters}
        # Of steps with chunks, whose logits are few.
        self._without_scores = {
            is_adapted: None if one is None else one.first_result() for is_adapted, one in self._recordings.items()
        }
        self._tapes: dict[tuple[int, bool], _Playable] = {}
        self._arena = torch.empty(0, dtype=torch.uint8)
        # As they are on the tapes.
        self._layers = decoder.layers.copy()
        layers: list[Any] = decoder.layers
        self._parts = [(layer, layer.attention, layer.mlp) for layer in layers]
        self._num_threads = torch.get_num_threads()
        self._has_changed = False

    def run(self, batch: Batch) -> Decoded | None:
        """Runs a step. None: it is too large, its adapters are not on tape, or the model is not what it was."""
        is_adapted = batch.adapters is not None
        recording = (self._recordings if batch.only_decodes else self._without_scores)[is_adapted]
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
        """Only some of the tokens' hidden states are wanted, and of those only some of the logits.

        recording: without scores.
        """
        num_tokens, num_rows = len(batch.arrays.token_ids), len(batch.lengths)
        if num_tokens > _MOST_TOKENS:
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
        scores = others[0] if others else None
        decoded = Decoded(hidden, scores) if scores is not None and self._decoder.are_logits(scores) else None
        return _Playable(filler, tape, hidden, scores, decoded)

    def _is_as_recorded(self) -> bool:
        decoder = self._decoder
        same_model = (
            _METHODS.isdisjoint(vars(decoder))
            and decoder.layers == self._layers
            and all(layer.attention is attention and layer.mlp is mlp for layer, attention, mlp in self._parts)
        )
        same = same_model and torch.get_num_threads() == self._num_threads
        if not same and not self._has_changed:
            what = "the number of threads" if same_model else "the model"
            logger.info("steps are computed op by op: %s is not what it was at load", what)
        self._has_changed = not same
        return same


def _hindrance(decoder: Decoder, kernels: KernelSet) -> str | None:
    """Returns why something might go uncalled if there were tapes, or None."""
    others = [op for op, ours in _OPS.items() if getattr(kernels, op) is not ours]
    if others:
        return f"{', '.join(others)} not by the native library"
    return None if all(map(_is_plain, decoder.layers)) else "a layer has parts that compute in torch"


def _record(decoder: Decoder, kv_pool: Tensor, inputs: _Inputs, *, adapted: bool) -> Recording | str:
    """The output matrix may be one that only torch multiplies by."""

    def compute() -> tuple[Tensor, ...]:
        angles = tuple((own[:, 0], own[:, 1]) for own in inputs.angles)
        step = Step(inputs.static.metadata, angles, Adapted(inputs.adapters, ()) if adapted else None)
        return (decoder.last_norm(*decoder.through_layers(inputs.hidden, kv_pool, step)),)

    def compute_scores() -> tuple[Tensor, ...]:
        (hidden,) = compute()
        return hidden, decoder.scores(hidden)

    try:
        whole = record(compute_scores, len(inputs.hidden))
        return whole if isinstance(whole, Recording) else record(compute, len(inputs.hidden))
    except RuntimeError as error:  # computing for so many tokens at once was not asked for
        return str(error)


def _is_plain(layer: Any) -> bool:
    return type(layer) is DecoderLayer and type(layer.attention) is Attention and type(layer.mlp) is GatedMlp
