"""Where an engine's loop runs: in a process of its own, or in a thread of this one.

Both speak the same frames over a socket pair, so the client cannot tell them apart. A rank other than 0 has no client:
it follows rank 0 in this very process. Imports torch only for the thread and for such a rank.
"""

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.child_env import child_environment
from inferflux.config.tree import AdapterConfig, DistributedConfig, LoggingConfig

TERMINATE_GRACE_S = 5.0


class RunningHost(Protocol):
    """A started loop. `pid` is None when it shares this process."""

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

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> None:
        try:
            async with asyncio.timeout(TERMINATE_GRACE_S):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()


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


async def launch_process(log: LoggingConfig) -> tuple[RunningHost, socket.socket]:
    """Starts the loop in a child process, which logs as `log` says; returns it with this side's end of the pair."""
    ours, theirs = socket.socketpair()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "inferflux.engine.service.host",
            str(theirs.fileno()),
            log.level,
            log.format,
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            env=child_environment(),
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
    """Computes this rank's share until rank 0 lets it go; see `follower.follow`."""
    from inferflux.engine.service.follower import follow  # brings torch in, which rank 0's server never needs

    return follow(model, runtime, distributed, adapters, grace_s)
