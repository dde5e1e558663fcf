"""DecodeGraphs: decode steps recorded once at load, so that launching one costs the host one call and not hundreds.

A recording has fixed sizes: a step of fewer rows is padded to the next size with copies of its first row, which write
the same keys and values to the same place once more, and whose logits nobody looks at. Kernels are recorded for
contexts of up to some length; the lengths themselves are read on the device. Knows no scheduler and no sampling.

Among several ranks the recordings hold collectives, and a recorded collective meets recorded ones only: all ranks
record the same steps in the same order, and where one of them cannot, none of them replays anything.
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

# Rows of the recordings. Between two sizes at most half of a step is padding, which costs little while weights are what
# is read.
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Context lengths grow by this factor: a launch for the longest context would be mostly idle programs for short ones. Up
# to the first one attention is one split with nothing to merge, 3 us less per layer on an H200.
FIRST_LENGTH: Final = 512
LENGTH_FACTOR: Final = 4

# Does what was recorded again.
Replay = Callable[[], None]
# Runs a step once, recording it.
Record = Callable[[Callable[[], None]], Replay]
# Whether every rank says yes; every rank asks at the same points.
Agree = Callable[[bool], bool]


class GraphDecoder(Protocol):
    """What is recorded of a model. context: the ranks that share it."""

    @property
    def context(self) -> ParallelContext: ...

    def hidden_states(
        self, token_ids: torch.Tensor, metadata: AttentionMetadata, kv_pool: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        """token_ids int64 [T]; kv_pool [P, L, 2, N, K, D], written in place; indices int64 [S] into the T tokens.
        Returns what `logits` wants of those tokens, [S, hidden]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Some rows of hidden states -> logits float32 [rows, V], contiguous and the caller's."""
        ...


class Decoded(NamedTuple):
    """hidden [rows, hidden], logits float32 [rows, V]: good until the next step of these graphs is run."""

    hidden: torch.Tensor
    logits: torch.Tensor


@dataclass(slots=True)
class _Graph:
    """One recording: the inputs it reads, and the results it writes."""

    inputs: StaticInputs
    decoded: Decoded | None = None
    replay: Replay | None = None


class DecodeGraphs:
    """Steps of each of `sizes` rows for contexts of up to each of `lengths` tokens, all recorded when this is made.

    Recording writes slot 0 of page 0, which must be nobody's yet.
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
        # Largest first, so that the others fit into the memory it took.
        self._graphs = {
            (size, length): self._record(size, length, record)
            for size in reversed(self._sizes)
            for length in reversed(self._lengths)
        }

    def run(self, batch: Batch) -> Decoded | None:
        """Runs a step that only decodes. None: it is of another kind, or larger than what was recorded."""
        num_rows, longest = len(batch.lengths), int(batch.ends.max(initial=0))
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
            graph.decoded = Decoded(hidden, self._decoder.logits(hidden))

        graph.replay = record(step)
        return graph


class Recorder(Protocol):
    """Knows one kind of graph."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Runs the step: what is compiled, allocated or connected on a first call must not be recorded."""
        ...

    def capture(self, step: Callable[[], None]) -> Replay:
        """Records the step without computing it. Raises RuntimeError or InferFluxError when that cannot be."""
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
    """Returns the recordings for a GPU; None, with a line in the log, where one of the ranks cannot have them.

    Every rank calls this at once. Raises ModelLoadError when a step fails that is run to get ready for its recording
    and other ranks have begun theirs, whose collectives it leaves unanswered.
    """
    recorder = recorder_for(kv_pool.device)
    if recorder is None:
        return None
    attention = next(choice for choice in kernels.choices if choice.op == "attention")
    try:
        # A recording cannot see the host's lengths change: it would go on with those it was made with.
        if not agree(attention.device_lengths):
            raise NoGraphError(
                f"attention is {attention.backend}'s here, and some rank's may need the host in every step "
                "(its module does not say DEVICE_LENGTHS = True)"
            )
        record = partial(record_together, recorder, agree, decoder.context)
        with torch.inference_mode():
            return DecodeGraphs(decoder, kv_pool, sizes_to(max_batch_size), lengths_to(max_model_len), record)
    except NoGraphError as error:
        logger.warning("no CUDA graphs, every kernel is launched by itself: %s", error)
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
            f"a decode step fails that a CUDA graph is to hold (runtime.cuda_graphs: off does without): {error}"
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
    """Returns what records on the device; None: nothing does."""
    return CudaRecorder() if device.type == "cuda" else None


class CudaRecorder:
    """Records with CUDA graphs, all in one pool of memory: only one of them runs at a time.

    One stream for all, warming up too: NCCL keeps buffers by stream. Other threads may use the device meanwhile (those
    that watch over collectives or move pages), which a capture that is not its thread's own would forbid them.
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
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        except (RuntimeError, InferFluxError):
            torch.cuda.synchronize()
            raise
        return graph.replay


def sizes_to(max_batch_size: int) -> list[int]:
    """Returns the sizes to record: none above what can occur, the largest that can occur among them if it is not too
    large."""
    sizes = [size for size in SIZES if size < max_batch_size]
    return [*sizes, max_batch_size] if max_batch_size <= SIZES[-1] else sizes


def lengths_to(max_model_len: int) -> list[int]:
    """Returns the context lengths to record: growing by LENGTH_FACTOR, the largest that can occur last."""
    lengths, length = [], FIRST_LENGTH
    while length < max_model_len:
        lengths.append(length)
        length *= LENGTH_FACTOR
    return [*lengths, max_model_len]
