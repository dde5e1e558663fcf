"""Recording steps without a GPU: a recording is the step itself, run again over the same fixed inputs.

What CUDA and NCCL add is checked by scripts/gpu_check.sh, on one GPU. As a kernel backend (`runtime.kernels.attention`)
this is attention that reads lengths from the tensors alone, as recorded kernels do.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from inferflux.config.tree import DistributedConfig
from inferflux.dist.context import ParallelContext
from inferflux.engine.runner import graphs
from inferflux.engine.runner.runner import Runner
from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.reference.attention import attention as reference_attention
from inferflux.sampling_params import SamplingParams
from tests.support.engines import Result
from tests.support.world import answer

DEVICE_LENGTHS = True
ALONE = ParallelContext(0, 1, torch.device("cpu"))


class StepRecorder:
    """fail_at: the number of the capture that fails, of the warm-up with `in_warm_up`. replays: numbers of the captures
    that were replayed, in order."""

    def __init__(self, fail_at: int | None = None, *, in_warm_up: bool = False) -> None:
        self.num_captures = 0
        self.replays: list[int] = []
        self._fail_at = fail_at
        self._in_warm_up = in_warm_up

    def warm_up(self, step: Callable[[], None]) -> None:
        if self._in_warm_up and self.num_captures == self._fail_at:
            raise RuntimeError("out of memory")
        step()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        number = self.num_captures
        if number == self._fail_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_captures += 1

        def replay() -> None:
            self.replays.append(number)
            step()

        return replay


def attention(query: torch.Tensor, kv_pages: torch.Tensor, metadata: AttentionMetadata, **options: Any) -> torch.Tensor:
    lengths = tuple(metadata.kv_lengths.tolist())
    return reference_attention(query, kv_pages, replace(metadata, kv_lengths_host=lengths), **options)


def _record(runner: Runner, max_model_len: int, agree: graphs.Agree) -> None:
    """Has a runner record as on a GPU, wherever it runs."""
    runner._graphs = graphs.record_decode_graphs(
        runner.decoder, runner._kernels, runner._kv_pool, len(runner._newest), max_model_len, agree
    )


class Recorded(NamedTuple):
    """What a rank did. results: rank 0's."""

    results: list[Result] | None
    num_captures: int
    replays: list[int]


def answer_recorded(
    distributed: DistributedConfig,
    folder: Path,
    runtime: dict[str, Any],
    prompts: Sequence[list[int]],
    params: SamplingParams,
    failing: tuple[int, int] | None = None,
) -> Recorded:
    """A job: `answer`, planned ahead and with steps recorded. failing: a rank, and which of its captures fails."""
    recorder = StepRecorder(failing[1] if failing is not None and failing[0] == distributed.rank else None)
    kernels = {"kernels": {"attention": "tests.support.recorded"}}
    with patch.object(graphs, "recorder_for", lambda device: recorder), patch.object(Runner, "record_graphs", _record):
        answered = answer(distributed, folder, runtime | kernels, prompts, params, True)
    return Recorded(answered and answered[0], recorder.num_captures, recorder.replays)
