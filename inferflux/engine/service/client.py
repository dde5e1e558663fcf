"""EngineClient: the async interface of an engine in another process or thread.

Starts the engine, sends requests and receives outputs, and restarts an engine that has died, after growing pauses. The
stream to one engine is `connection`'s. Lives on one event loop; imports no torch.
"""

import asyncio
import contextlib
import enum
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

import msgspec

from inferflux.config import FairnessConfig, ModelConfig, RuntimeConfig
from inferflux.config.tree import AdapterConfig, DistributedConfig, LoggingConfig, SchedulerPolicy
from inferflux.engine.interface import ModelInfo, Output, Submit
from inferflux.engine.service.connection import Connection
from inferflux.engine.service.failures import request_failure
from inferflux.engine.service.launch import EngineProcesses, launch_thread
from inferflux.engine.service.mailbox import Mailbox
from inferflux.engine.service.protocol import (
    Abort,
    CacheDropped,
    DropCache,
    FromEngine,
    Outputs,
    Pong,
    SetFairness,
    Shutdown,
    Start,
    ToEngine,
)
from inferflux.engine.service.sharing import ShareSender
from inferflux.engine.stats import EngineStats
from inferflux.errors import ConfigError, EngineDeadError, EngineError, ModelLoadError
from inferflux.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Longest silence of a busy engine: the scheduler cuts prompts so that a step takes seconds, not a minute.
WATCHDOG_S = 60.0
# How long a request whose engine died before its first output waits for the next engine.
RETRY_WAIT_S = 60.0
# With several ranks, the others give up after `distributed.timeout_s`; this one must before them.
WATCHDOG_SHARE = 0.8
FIRST_RESTART_PAUSE_S = 0.5
LONGEST_RESTART_PAUSE_S = 10.0
# After serving this long an engine counts as healthy: the next pause is the first one again.
STEADY_S = 60.0


class ClientState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    CLOSED = "closed"


class EngineClient:
    """One engine, its requests and its health.

    state: only READY accepts requests. info: set once READY. num_engines: engines that were ready so far.
    stats: the latest that the engine has sent; after its death, with nothing running.
    num_restarts: how often the engine was restarted after a death. num_retries: requests given to the next engine.
    on_lost: called with the reason when the engine has died, instead of a restart; for one of several ranks, which can
    only be restarted together. processes: starts the engines. adapters: the model's.
    """

    def __init__(
        self,
        model: ModelConfig,
        runtime: RuntimeConfig,
        distributed: DistributedConfig | None = None,
        on_lost: Callable[[str], None] | None = None,
        processes: EngineProcesses | None = None,
        adapters: Sequence[AdapterConfig] = (),
    ) -> None:
        self.model = model
        self.adapters = tuple(adapters)
        self.runtime = runtime
        self.distributed = distributed or DistributedConfig()
        self._on_lost = on_lost
        self._processes = processes or EngineProcesses(LoggingConfig())
        self._watchdog_s = WATCHDOG_S if on_lost is None else self.distributed.timeout_s * WATCHDOG_SHARE
        self.state = ClientState.STARTING
        self.info: ModelInfo | None = None
        self.phases: list[tuple[str, float]] = []
        self.stats = EngineStats()
        self.num_engines = 0
        self.num_restarts = 0
        self.num_retries = 0
        self._settled = asyncio.Event()
        self._mailboxes: dict[int, Mailbox] = {}
        self._drops: deque[asyncio.Future[None]] = deque()
        self._ids = itertools.count()
        self._shares = ShareSender(self._send)
        self._connection: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready_time = 0.0
        self._pause_s = FIRST_RESTART_PAUSE_S

    @property
    def pid(self) -> int | None:
        """The engine's process id; None while it has none."""
        return self._connection.host.pid if self._connection is not None else None

    @property
    def stuck(self) -> bool:
        """Whether the engine is silent past its watchdog, and (a thread, say) could not be killed."""
        return self._connection is not None and self._connection.stuck

    @property
    def num_requests(self) -> int:
        """Requests submitted and not finished."""
        return len(self._mailboxes)

    async def start(self) -> ModelInfo:
        """Starts the engine and waits until the model is loaded.

        Raises ModelLoadError or ConfigError with the engine's reason, EngineDeadError when it dies while loading.
        """
        try:
            return await self._launch()
        except BaseException as error:
            self._become(ClientState.FAILED)
            if isinstance(error, asyncio.CancelledError) and self._connection is not None:
                self._connection.host.kill()  # it has nothing to finish, and reads no frame before it has loaded
            await self._stop()
            raise

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        salt: bytes = b"",
        adapter: str | None = None,
    ) -> AsyncGenerator[Output, None]:
        """Runs one sequence and yields its outputs; the last has a finish_reason. Leaving early aborts it.

        When the engine dies before the first output, the next engine gets the sequence, once. Raises RequestError when
        the engine refuses the sequence, EngineDeadError when the engine is not there or dies, EngineError when this
        sequence alone failed.
        """
        if self.state is not ClientState.READY:
            raise EngineDeadError(f"the engine of model {self.model.id} is {self.state.value}")
        request_id = next(self._ids)
        submit = Submit(request_id, prompt_token_ids, sampling, priority, tenant, salt, adapter=adapter)
        submit = self._shares.strip(submit)
        try:
            output, mailbox = await self._first_output(submit)
            while output.finish_reason is None:
                yield output
                output = await mailbox.get()
            self._mailboxes.pop(request_id, None)
            if output.finish_reason == "error":
                raise request_failure(output)
            yield output
        finally:
            if self._mailboxes.pop(request_id, None) is not None:
                self._send(Abort([request_id]))
            self._shares.release(submit)

    def set_fairness(self, policy: SchedulerPolicy, fairness: FairnessConfig) -> None:
        """Schedules by another policy from now on, over restarts too."""
        scheduler = msgspec.structs.replace(self.runtime.scheduler, policy=policy)
        self.runtime = msgspec.structs.replace(self.runtime, scheduler=scheduler, fairness=fairness)
        self._send(SetFairness(policy, fairness))

    async def drop_cache(self) -> None:
        """Has the engine forget every cached page; returns when it has. Raises EngineDeadError when it is not there or
        dies."""
        if self.state is not ClientState.READY:
            raise EngineDeadError(f"the engine of model {self.model.id} is {self.state.value}")
        dropped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drops.append(dropped)
        self._send(DropCache())
        await dropped

    async def close(self) -> None:
        """Ends the engine; what still runs on it fails with EngineDeadError."""
        self._become(ClientState.CLOSED)
        self._send(Shutdown())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stop()
        self._fail_all("the engine was shut down")

    async def _launch(self) -> ModelInfo:
        inline = self.runtime.isolation == "inline"
        host, sock = await (launch_thread() if inline else self._processes.launch())
        self._connection = connection = Connection(self.model.id, host, self._watchdog_s)
        ready = await connection.open(sock, Start(self.model, self.runtime, self.distributed, self.adapters))
        self.info, self.phases = ready.info, ready.phases
        self.stats = EngineStats(device_pages_total=ready.info.device_pages)
        self.num_engines += 1
        self._ready_time = time.monotonic()
        self._shares.resend()
        self._become(ClientState.READY)
        self._spawn(self._read(connection))
        return ready.info

    async def _read(self, connection: Connection) -> None:
        """Delivers the engine's frames until its end, then starts another."""
        try:
            reason = await connection.read(self._receive)
        finally:
            self.stats = self.stats.at_rest()
        if self.state is ClientState.READY:
            self._become(ClientState.RESTARTING if self._on_lost is None else ClientState.FAILED)
            logger.error("model %s: %s; it had %d requests", self.model.id, reason, len(self._mailboxes))
            self._fail_all(reason)
            if self._on_lost is None:
                self._spawn(self._restart())
            else:
                self._on_lost(reason)

    def _receive(self, frame: FromEngine) -> None:
        if isinstance(frame, Outputs):
            self._deliver(frame)
        elif isinstance(frame, Pong):
            self.stats = frame.stats
        elif isinstance(frame, CacheDropped):
            self.stats = frame.stats
            _answer(self._drops.popleft(), None)

    def _deliver(self, frame: Outputs) -> None:
        self.stats = frame.stats
        mailboxes = self._mailboxes
        for output in frame.outputs:
            mailbox = mailboxes.get(output.request_id)
            if mailbox is not None:
                mailbox.put(output)
                if mailbox.is_full:
                    self._stop_unread(output.request_id)

    def _stop_unread(self, request_id: int) -> None:
        """Ends a sequence whose outputs are not read."""
        mailbox = self._mailboxes.pop(request_id)
        mailbox.fail(EngineError("it was stopped because its output was not read"))
        self._send(Abort([request_id]))

    async def _restart(self) -> None:
        if time.monotonic() - self._ready_time > STEADY_S:
            self._pause_s = FIRST_RESTART_PAUSE_S
        while self.state is ClientState.RESTARTING:
            await self._stop()
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_RESTART_PAUSE_S)
            self.num_restarts += 1
            try:
                await self._launch()
            except (ModelLoadError, ConfigError, EngineDeadError, OSError) as error:
                logger.error("model %s: restart failed: %s", self.model.id, error)
            else:
                logger.warning("model %s: engine restarted (%d so far)", self.model.id, self.num_restarts)

    async def _stop(self) -> None:
        """Waits for the engine's end, after the frames sent so far."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def _first_output(self, submit: Submit) -> tuple[Output, Mailbox]:
        """Submits a sequence and returns its first output; when the engine dies before that, the next one gets it,
        once."""
        mailbox = self._submit(submit)
        try:
            return await mailbox.get(), mailbox
        except EngineDeadError:
            if not await self._comes_back():
                raise
        self.num_retries += 1
        mailbox = self._submit(submit)
        return await mailbox.get(), mailbox

    def _submit(self, submit: Submit) -> Mailbox:
        # What cannot be sent is not waited for.
        self._send(submit)
        mailbox = self._mailboxes[submit.request_id] = Mailbox()
        return mailbox

    def _become(self, state: ClientState) -> None:
        self.state = state
        if state is ClientState.RESTARTING:
            self._settled.clear()
        else:
            self._settled.set()

    async def _comes_back(self) -> bool:
        """Waits while the engine is being restarted; returns whether there is one then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY_WAIT_S):
                await self._settled.wait()
        return self.state is ClientState.READY

    def _send(self, frame: ToEngine) -> None:
        if self._connection is not None:
            self._connection.send(frame)

    def _fail_all(self, reason: str) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.fail(EngineDeadError(reason))
        self._mailboxes.clear()
        while self._drops:
            _answer(self._drops.popleft(), EngineDeadError(reason))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _answer(waiter: asyncio.Future[None], error: Exception | None) -> None:
    """Resolves a future, unless its waiter was cancelled."""
    if waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)
