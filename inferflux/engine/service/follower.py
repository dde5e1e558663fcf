"""A rank other than 0: no HTTP and no requests; loads its share of the model and computes rank 0's plans.

Runs in the rank's own process. Ends when rank 0 closes the channel, when a rank is lost, or when it was asked to stop
and rank 0 has had its time to drain.
"""

import logging
import signal
import time
from collections.abc import Sequence
from types import FrameType

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import AdapterConfig, DistributedConfig
from inferflux.dist.watchdog import Watchdog, end_process
from inferflux.engine.executor import Executor
from inferflux.errors import EngineDeadError, InferFluxError

logger = logging.getLogger(__name__)


class StopRequest:
    """SIGTERM and Ctrl-C reach every rank at once, but the others are needed until rank 0 has drained.

    exit_code: 0; 130 after Ctrl-C. is_due: the grace is over, and rank 0 has not closed the channel.
    """

    def __init__(self, grace_s: float) -> None:
        self.exit_code = 0
        self._grace_s = grace_s
        self._due: float | None = None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    @property
    def is_due(self) -> bool:
        return self._due is not None and time.monotonic() > self._due

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.exit_code = 128 + number
        if self._due is None:
            self._due = time.monotonic() + self._grace_s


def follow(
    model: ModelConfig,
    runtime: RuntimeConfig,
    distributed: DistributedConfig,
    adapters: Sequence[AdapterConfig],
    grace_s: float,
) -> int:
    """Follows rank 0; returns the exit status. grace_s: how long after a signal to stop it waits for rank 0 to close
    the channel.

    A failure, or the loss of another rank, ends the process at once: taking a broken group down may hang.
    Raises ModelLoadError and ConfigError as Executor does.
    """
    name = f"rank {distributed.rank}"
    try:
        executor = Executor(model, runtime, distributed, adapters)
        logger.info("%s of %d is ready", name, distributed.world_size)
        return _follow(executor, Watchdog(distributed.timeout_s, name), StopRequest(grace_s))
    except EngineDeadError as error:
        logger.error("%s: %s", name, error)
    except InferFluxError:
        raise
    except Exception:
        logger.exception("%s failed", name)
    return end_process()


def _follow(executor: Executor, watchdog: Watchdog, stop: StopRequest) -> int:
    stop.listen()
    for _ in executor.follow():
        watchdog.feed()
        if stop.is_due:
            logger.warning("told to stop while rank 0 goes on: exiting")
            return stop.exit_code
    executor.close()
    watchdog.stop()
    return stop.exit_code
