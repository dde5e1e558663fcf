"""A world of ranks on this machine: processes that run the same job side by side, as torchrun's would.

They are forked from one process that has imported torch, which is far cheaper than that many imports.
"""

import multiprocessing
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import msgspec

from benchmarks.ports import free_port
from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import DistributedConfig
from inferflux.engine.engine import Engine
from inferflux.engine.executor import Executor
from inferflux.engine.layers import moe
from inferflux.sampling_params import SamplingParams
from tests.support.engines import Result, adapter_configs, run_requests

JOB_TIMEOUT_S = 120.0

Job = Callable[..., Any]


class World:
    """`size` processes. `run(job, *args)` calls job(distributed, *args) in each, and returns rank 0's result; `run_all`
    returns those of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.world", "inferflux.engine.runner.build"])
        self._processes = []
        self._pipes: list[Connection] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, job: Job, *args: Any) -> Any:
        return self.run_all(job, *args)[0]

    def run_all(self, job: Job, *args: Any) -> list[Any]:
        port = free_port()
        for rank, pipe in enumerate(self._pipes):
            distributed = DistributedConfig(
                rank=rank, world_size=self.size, backend="gloo", master_port=port, timeout_s=60
            )
            pipe.send((job, (distributed, *args)))
        answers = [self._answer(rank) for rank in range(self.size)]
        failures = [f"rank {rank}:\n{problem}" for rank, (_, problem) in enumerate(answers) if problem]
        assert not failures, "\n".join(failures)
        return [result for result, _ in answers]

    def _answer(self, rank: int) -> tuple[Any, str | None]:
        pipe = self._pipes[rank]
        assert pipe.poll(JOB_TIMEOUT_S), f"rank {rank} hangs"
        answer: tuple[Any, str | None] = pipe.recv()
        return answer

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(pipe: Connection) -> None:
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((job(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def answer(
    distributed: DistributedConfig,
    folder: Path,
    runtime: dict[str, Any],
    prompts: Sequence[list[int]],
    params: SamplingParams,
    overlap: bool | None = None,
    adapters: Mapping[str, Path] | None = None,
    chosen: Sequence[str | None] | None = None,
) -> tuple[list[Result], int] | None:
    """A job: the engine's answers to the prompts, all at once, and how often it preempted. overlap: see `Engine`.
    chosen: each prompt's of the adapters."""
    additions = adapter_configs(adapters or {})
    model = ModelConfig(id="model", path=str(folder))
    settings = msgspec.convert({"dtype": "float32", **runtime}, RuntimeConfig)
    if distributed.rank > 0:
        executor = Executor(model, settings, distributed, additions)
        for _ in executor.follow():
            pass
        executor.close()
        return None
    engine = Engine(model, settings, distributed, additions, overlap=overlap)
    results = run_requests(engine, prompts, params, adapters=chosen)
    engine.close()
    return results, engine.stats().preemptions


def answer_all_to_all(*arguments: Any) -> tuple[list[Result], int] | None:
    """As `answer`, with experts' rows sent to the rank that adds them up, however few tokens there are."""
    with patch.object(moe, "ALL_TO_ALL_TOKENS", 1):
        return answer(*arguments)
