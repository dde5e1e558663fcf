"""Where an engine's loop runs: in a process of its own, or in a thread of this one.

Both use the same frames over a socket pair, so the client cannot tell them apart. A rank other than 0 has no client: it
follows rank 0 in this process. Imports torch only for the thread and for such a rank.
"""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.process_env import engine_environment
from inferflux.config.tree import AdapterConfig, DistributedConfig, LoggingConfig

TERMINATE_GRACE_S = 5.0


class RunningHost(Protocol):
    """A started loop. `pid` is None when it is a thread of this process."""

    @property
    def pid(self) -> int | None: ...

    def kill(self) -> None:
        """Ends it at once, where that is possible."""
        ...

    async def wait(self) -> None:
        """Waits for its end, killing it when it does not come."""
        ...


class ProcessHost:
    """`python -m inferflux.engine.service.host` with one end of the socket pair."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> None:
        try:
            await asyncio.to_thread(self._process.wait, TERMINATE_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            await asyncio.to_thread(self._process.wait)


class ThreadHost:
    """The same loop in a daemon thread: for research and debugging; it cannot be killed."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    @property
    def pid(self) -> int | None:
        return None

    def kill(self) -> None:
        """A thread cannot be killed; closing the socket makes it leave after its step."""

    async def wait(self) -> None:
        await asyncio.to_thread(self._thread.join, TERMINATE_GRACE_S)


class EngineProcesses:
    """Starts the loop in child processes, which log as `log` says.

    The first can be started early with `prepare`, so that its imports (above all torch, which takes longest) run in
    parallel with the server's. `close` ends it if it was not used.
    """

    def __init__(self, log: LoggingConfig) -> None:
        self._log = log
        self._prepared: tuple[ProcessHost, socket.socket] | None = None

    def prepare(self) -> None:
        self._prepared = self._start()

    async def launch(self) -> tuple[RunningHost, socket.socket]:
        """Returns a process that waits for its first frame, and this side's end of the socket pair."""
        prepared, self._prepared = self._prepared, None
        return prepared or self._start()

    def close(self) -> None:
        if self._prepared is not None:
            host, ours = self._prepared
            host.kill()
            ours.close()
            self._prepared = None

    def _start(self) -> tuple[ProcessHost, socket.socket]:
        ours, theirs = socket.socketpair()
        descriptor = theirs.fileno()
        command = [sys.executable, "-m", "inferflux.engine.service.host", str(descriptor)]
        try:
            process = subprocess.Popen(
                [*command, self._log.level, self._log.format],
                pass_fds=(descriptor,),
                stdin=subprocess.DEVNULL,
                env=engine_environment(),
                # A terminal's Ctrl-C reaches a whole group; the server decides when this process ends.
                process_group=0,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ProcessHost(process), ours


async def launch_thread() -> tuple[RunningHost, socket.socket]:
    """Starts the loop in a thread of this process; returns it with this side's end of the socket pair."""
    from inferflux.engine.service.host import serve  # brings torch in, which a server with a child process never needs

    ours, theirs = socket.socketpair()
    thread = threading.Thread(
        target=serve, args=(theirs,), kwargs={"exit_when_orphaned": False}, name="engine", daemon=True
    )
    thread.start()
    return ThreadHost(thread), ours


def follow_first_rank(
    model: ModelConfig,
    runtime: RuntimeConfig,
    distributed: DistributedConfig,
    adapters: Sequence[AdapterConfig],
    grace_s: float,
) -> int:
    """Computes this rank's share until rank 0 releases it; see `follower.follow`."""
    from inferflux.engine.service.follower import follow  # brings torch in, which rank 0's server never needs

    return follow(model, runtime, distributed, adapters, grace_s)
