"""DecodeGraphs: decode steps recorded once at load, so that launching one costs the host one call instead of hundreds.

A recording has fixed sizes: a step of fewer rows is padded to the next size with copies of its first row, which write
the same keys and values to the same place again, and whose logits are not used. Kernels are recorded for contexts of up
to some length; the lengths themselves are read on the device. Knows no scheduler and no sampling.

With several ranks the recordings contain collectives, and a recorded collective works only with recorded ones on the
other ranks: all ranks record the same steps in the same order, and if one of them cannot, none of them replays.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, Protocol

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.runner.inputs import Batch
from inferflux.engine.runner.static_inputs import StaticInputs, static_inputs
from inferflux.errors import EngineDeadError, InferFluxError, ModelLoadError
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.metadata import AttentionMetadata

logger = logging.getLogger(__name__)

# Rows of the recordings. At most half of a step is padding, which costs little while reading the weights takes longest.
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Context lengths grow by this factor: launched for the longest context, most programs would be idle in short ones. Up
# to the first length attention is one split with nothing to merge, which saves 3 us per layer on an H200.
FIRST_LENGTH: Final = 512
LENGTH_FACTOR: Final = 4

# Replays a recording.
Replay = Callable[[], None]
# Records a step.
Record = Callable[[Callable[[], None]], Replay]
# Returns whether every rank passed True; every rank calls it at the same points.
Agree = Callable[[bool], bool]


class Vocabulary(Protocol):
    @property
    def vocab_size(self) -> int: ...


class GraphDecoder(Protocol):
    """What a recording needs of a model. context: the ranks that share it."""

    @property
    def context(self) -> ParallelContext: ...

    @property
    def spec(self) -> Vocabulary: ...

    def hidden_states(
        self, token_ids: torch.Tensor, metadata: AttentionMetadata, kv_pool: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        """token_ids int64 [T]; kv_pool [P, L, 2, N, K, D], written in place; indices int64 [S] into the T tokens.
        Returns the hidden states of those tokens, [S, hidden], for `logits`."""
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [rows, hidden] -> logits float32 [rows, V], contiguous, in `out` if that is given; the caller
        may overwrite them."""
        ...


class Decoded(NamedTuple):
    """hidden [rows, hidden], logits float32 [rows, V]: valid until these graphs run another step."""

    hidden: torch.Tensor
    logits: torch.Tensor


@dataclass(slots=True)
class _Graph:
    """One recording: the inputs it reads, and the results it writes."""

    inputs: StaticInputs
    decoded: Decoded | None = None
    replay: Replay | None = None


class DecodeGraphs:
    """Recordings for each of `sizes` rows and contexts of up to each of `lengths` tokens, all made by the constructor.

    Recording writes slot 0 of page 0, which no request may hold.
    """

    def __init__(
        self,
        decoder: GraphDecoder,
        kv_pool: torch.Tensor,
        sizes: Sequence[int],
        lengths: Sequence[int],
        record: Record,
    ) -> None:
        self._decoder = decoder
        self._kv_pool = kv_pool
        self._sizes = sorted(sizes)
        self._lengths = sorted(lengths)
        # One set of inputs for all: a recording of fewer rows reads the first ones.
        num_pages = -(-self._lengths[-1] // kv_pool.shape[3])
        self._inputs = static_inputs(self._sizes[-1], num_pages, kv_pool.device)
        # And one place for the logits: each recording's own, of 128256 tokens for up to 128 rows in five lengths, would
        # be 0.65 GB together.
        shape = (self._sizes[-1], decoder.spec.vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=kv_pool.device)
        # Largest first, so that the others fit into its memory.
        self._graphs = {
            (size, length): self._record(size, length, record)
            for size in reversed(self._sizes)
            for length in reversed(self._lengths)
        }

    def run(self, batch: Batch) -> Decoded | None:
        """Runs a step that only decodes. Returns None for any other, and for one larger than any recording."""
        num_rows, longest = len(batch.lengths), int(batch.next_positions.max(initial=0))
        size = next((size for size in self._sizes if size >= num_rows), None)
        length = next((length for length in self._lengths if length >= longest), None)
        if not batch.only_decodes or batch.adapters is not None or size is None or length is None:
            return None
        graph = self._graphs[size, length]
        graph.inputs.fill(batch)
        assert graph.replay is not None
        assert graph.decoded is not None
        graph.replay()
        return Decoded(*(tensor[:num_rows] for tensor in graph.decoded))

    def _record(self, size: int, length: int, record: Record) -> _Graph:
        inputs = self._inputs.first(size, length)
        graph = _Graph(inputs)

        def step() -> None:
            hidden = self._decoder.hidden_states(inputs.token_ids, inputs.metadata, self._kv_pool, inputs.indices)
            graph.decoded = Decoded(hidden, self._decoder.logits(hidden, self._logits[:size]))

        graph.replay = record(step)
        return graph


class Recorder(Protocol):
    """Knows one kind of graph."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Runs the step once: compilation, allocation and connections of a first call must not be recorded."""
        ...

    def capture(self, step: Callable[[], None]) -> Replay:
        """Records the step without computing it. Raises RuntimeError or InferFluxError when that fails."""
        ...


class NoGraphError(Exception):
    """A step cannot be recorded, on this rank or on another."""


def record_decode_graphs(
    decoder: GraphDecoder,
    kernels: KernelSet,
    kv_pool: torch.Tensor,
    max_batch_size: int,
    max_model_len: int,
    agree: Agree,
) -> DecodeGraphs | None:
    """Returns the recordings for a GPU; None, with a line in the log, if one of the ranks cannot have them.

    Every rank calls this at once. Raises ModelLoadError when the warm-up of a step fails on one of several ranks: the
    others wait in its collectives.
    """
    recorder = recorder_for(kv_pool.device)
    if recorder is None:
        return None
    attention = next(choice for choice in kernels.choices if choice.op == "attention")
    try:
        # A recording does not see the host's lengths change: it would keep those it was made with.
        if not agree(attention.device_lengths):
            raise NoGraphError(
                f"attention is {attention.backend}'s here, and on some rank it may need the host in every step "
                "(its module does not say DEVICE_LENGTHS = True)"
            )
        record = partial(record_together, recorder, agree, decoder.context)
        with torch.inference_mode():
            return DecodeGraphs(decoder, kv_pool, sizes_to(max_batch_size), lengths_to(max_model_len), record)
    except NoGraphError as error:
        logger.warning("no CUDA graphs; every kernel is launched separately: %s", error)
        return None


def record_together(recorder: Recorder, agree: Agree, context: ParallelContext, step: Callable[[], None]) -> Replay:
    """Records a step here if every rank can record its own. Raises NoGraphError on all ranks, ModelLoadError on one."""
    try:
        recorder.warm_up(step)
    except EngineDeadError:
        raise
    except (RuntimeError, InferFluxError) as error:
        if context.size == 1:
            raise NoGraphError(str(error)) from error
        raise ModelLoadError(
            f"the decode step to be recorded as a CUDA graph fails (runtime.cuda_graphs: off avoids this): {error}"
        ) from error
    replay, problem = None, "another rank cannot record a step"
    try:
        replay = recorder.capture(step)
    except (RuntimeError, InferFluxError) as error:
        problem = str(error)
    if not agree(replay is not None) or replay is None:
        raise NoGraphError(problem)
    return replay


def recorder_for(device: torch.device) -> Recorder | None:
    """Returns a recorder for the device, or None."""
    return CudaRecorder() if device.type == "cuda" else None


class CudaRecorder:
    """Records CUDA graphs, all in one memory pool: only one of them runs at a time.

    All use one stream, warm-up too: NCCL keeps buffers by stream. Captures are thread-local, so other threads (those
    that watch collectives or move pages) may use the device meanwhile.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def warm_up(self, step: Callable[[], None]) -> None:
        """See `Recorder.warm_up`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, step: Callable[[], None]) -> Replay:
        """See `Recorder.capture`."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        failure: Exception | None = None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    step()
                except Exception as error:
                    failure = error
                    raise
        except (RuntimeError, InferFluxError) as error:
            # The end of a capture that has failed raises once more, which says less, and torch stays on its stream.
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
            raise failure or error from None
        return graph.replay


def sizes_to(max_batch_size: int) -> list[int]:
    """Returns the numbers of rows to record, up to max_batch_size, and that itself unless it is above the largest."""
    sizes = [size for size in SIZES if size < max_batch_size]
    return [*sizes, max_batch_size] if max_batch_size <= SIZES[-1] else sizes


def lengths_to(max_model_len: int) -> list[int]:
    """Returns the context lengths to record: growing by LENGTH_FACTOR, max_model_len last."""
    lengths, length = [], FIRST_LENGTH
    while length < max_model_len:
        lengths.append(length)
        length *= LENGTH_FACTOR
    return [*lengths, max_model_len]
