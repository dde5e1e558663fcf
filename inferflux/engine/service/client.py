"""EngineClient: the async face of an engine that runs elsewhere.

Starts the engine, carries requests over and news back, notices a dead or stuck engine, starts it anew with growing
pauses. Lives on one event loop; imports no torch.
"""

import asyncio
import contextlib
import enum
import itertools
import logging
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import msgspec

from inferflux.config import FairnessConfig, ModelConfig, RuntimeConfig
from inferflux.config.tree import AdapterConfig, DistributedConfig, LoggingConfig, SchedulerPolicy
from inferflux.engine.interface import ModelInfo, Output, Submit
from inferflux.engine.service.failures import load_failure, request_failure
from inferflux.engine.service.launch import EngineProcesses, RunningHost, launch_thread
from inferflux.engine.service.mailbox import Mailbox
from inferflux.engine.service.protocol import (
    Abort,
    CacheDropped,
    DropCache,
    Failed,
    FrameReader,
    FromEngine,
    Outputs,
    Ping,
    Pong,
    Ready,
    SetFairness,
    Shutdown,
    Start,
    ToEngine,
    encode,
)
from inferflux.engine.service.sharing import Lender
from inferflux.engine.stats import EngineStats
from inferflux.errors import ConfigError, EngineDeadError, EngineError, ModelLoadError
from inferflux.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

RECV_BYTES = 1 << 18
PING_INTERVAL_S = 1.0
# Longest silence of a busy engine: the scheduler cuts prompts so that a step takes seconds, not a minute.
WATCHDOG_S = 60.0
# The largest model from a slow disk is there sooner; a load that is not over by then never will be.
LOAD_LIMIT_S = 3600.0
# How long a request that lost its engine before it got anything waits for the next one.
RETRY_WAIT_S = 60.0
# Of several ranks the others give up after `distributed.timeout_s`; this one before them.
WATCHDOG_SHARE = 0.8
FIRST_RESTART_PAUSE_S = 0.5
LONGEST_RESTART_PAUSE_S = 10.0
# An engine that served this long is healthy again: the next pause starts small.
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
    stats: the last one's, as of its last word; when it has died, with nothing under way.
    stuck: silent past its watchdog, and (a thread, say) it could not be killed.
    num_restarts: times the engine was started anew after a death. num_retries: requests that were given to the new one.
    on_lost: hears why the engine died, and then nothing is started anew; for one of several ranks, which cannot come
    back alone. processes: where its engines come from. adapters: the model's.
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
        self.stuck = False
        self.num_engines = 0
        self.num_restarts = 0
        self.num_retries = 0
        self._settled = asyncio.Event()
        self._mailboxes: dict[int, Mailbox] = {}
        self._drops: deque[asyncio.Future[None]] = deque()
        self._ids = itertools.count()
        self._lender = Lender(self._send)
        self._host: RunningHost | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_word = 0.0
        self._ready_time = 0.0
        self._pause_s = FIRST_RESTART_PAUSE_S

    @property
    def pid(self) -> int | None:
        """The engine's process id; None while it has none."""
        return self._host.pid if self._host is not None else None

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
            if isinstance(error, asyncio.CancelledError) and self._host is not None:
                self._host.kill()  # it has nothing to finish, and would not hear a word before it has loaded
            await self._stop_host()
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
    ) -> AsyncIterator[Output]:
        """Runs one sequence and yields its news; the last has a finish_reason. Leaving early aborts it.

        When the engine dies before there was any news, the next one is asked, once. Raises RequestError when the engine
        refuses the sequence, EngineDeadError when the engine is not there or dies, EngineError when this sequence alone
        failed.
        """
        if self.state is not ClientState.READY:
            raise EngineDeadError(f"the engine of model {self.model.id} is {self.state.value}")
        request_id = next(self._ids)
        submit = Submit(request_id, prompt_token_ids, sampling, priority, tenant, salt, adapter=adapter)
        submit = self._lender.lend(submit)
        may_retry = True
        try:
            mailbox = self._submit(submit)
            while True:
                try:
                    output = await mailbox.get()
                except EngineDeadError:
                    if not may_retry or not await self._comes_back():
                        raise
                    may_retry = False
                    self.num_retries += 1
                    mailbox = self._submit(submit)
                    continue
                may_retry = False
                if output.finish_reason is not None:
                    self._mailboxes.pop(request_id, None)
                if output.finish_reason == "error":
                    raise request_failure(output)
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if self._mailboxes.pop(request_id, None) is not None:
                self._send(Abort([request_id]))
            self._lender.take_back(submit)

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
        await self._stop_host()
        self._fail_all("the engine was shut down")

    async def _launch(self) -> ModelInfo:
        inline = self.runtime.isolation == "inline"
        self._host, ours = await (launch_thread() if inline else self._processes.launch())
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RECV_BYTES)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(Start(self.model, self.runtime, self.distributed, self.adapters))
        frames: FrameReader[FromEngine] = FrameReader(FromEngine)
        first = await _first_frame(reader, frames, self.model.id)
        if not isinstance(first, Ready):
            raise load_failure(self.model.id, first)
        self.info, self.phases = first.info, first.phases
        self.stats = EngineStats(device_pages_total=first.info.device_pages)
        self.num_engines += 1
        self._last_word = self._ready_time = time.monotonic()
        self._lender.repeat()
        self._become(ClientState.READY)
        self._spawn(self._read(reader, frames))
        return first.info

    async def _read(self, reader: asyncio.StreamReader, frames: FrameReader[FromEngine]) -> None:
        """Delivers the engine's frames until its end, then sees to a new one."""
        watchdog = asyncio.create_task(self._watch())
        reason = "the engine process died"
        try:
            while data := await reader.read(RECV_BYTES):
                self._last_word = time.monotonic()
                for frame in frames.feed(data):
                    if isinstance(frame, Outputs):
                        self._deliver(frame)
                    elif isinstance(frame, Pong):
                        self.stats = frame.stats
                    elif isinstance(frame, CacheDropped):
                        self.stats = frame.stats
                        _answer(self._drops.popleft(), None)
                    elif isinstance(frame, Failed):
                        reason = frame.message
        except (ConnectionError, ValueError) as error:
            reason = f"the engine's stream broke: {error}"
        finally:
            watchdog.cancel()
            self.stuck = False
            self.stats = self.stats.at_rest()
        if self.state is ClientState.READY:
            self._become(ClientState.RESTARTING if self._on_lost is None else ClientState.FAILED)
            logger.error("model %s: %s; it had %d requests", self.model.id, reason, len(self._mailboxes))
            self._fail_all(reason)
            if self._on_lost is None:
                self._spawn(self._restart())
            else:
                self._on_lost(reason)

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
        """Ends a sequence whose reader does not come for its news."""
        mailbox = self._mailboxes.pop(request_id)
        mailbox.fail(EngineError("it was stopped since nobody read it"))
        self._send(Abort([request_id]))

    async def _watch(self) -> None:
        """Asks for a sign of life every second; an engine silent for too long is killed, which `_read` notices.

        Silence is counted in questions without an answer, not by the clock: had this process itself been asleep, the
        answers would be waiting to be read.
        """
        num_unanswered = 0
        while True:
            asked = time.monotonic()
            self._send(Ping())
            await asyncio.sleep(PING_INTERVAL_S)
            num_unanswered = 0 if self._last_word >= asked else num_unanswered + 1
            was_stuck, self.stuck = self.stuck, num_unanswered * PING_INTERVAL_S >= self._watchdog_s
            if self.stuck and not was_stuck and self._host is not None:
                logger.error("model %s: engine silent for %.0f s; killing it", self.model.id, self._watchdog_s)
                self._host.kill()

    async def _restart(self) -> None:
        if time.monotonic() - self._ready_time > STEADY_S:
            self._pause_s = FIRST_RESTART_PAUSE_S
        while self.state is ClientState.RESTARTING:
            await self._stop_host()
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_RESTART_PAUSE_S)
            self.num_restarts += 1
            try:
                await self._launch()
            except (ModelLoadError, ConfigError, EngineDeadError, OSError) as error:
                logger.error("model %s: restart failed: %s", self.model.id, error)
            else:
                logger.warning("model %s: engine restarted (%d so far)", self.model.id, self.num_restarts)

    async def _stop_host(self) -> None:
        """Closes the stream behind what the engine was told last, and waits for the engine's end."""
        if self._writer is not None:
            self._writer.close()
        if self._host is not None:
            await self._host.wait()
            self._host = None
        if self._writer is not None:
            # A stuck engine has not read all of it, and never will: waiting for that would be for ever.
            self._writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
            self._writer = None

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
        """Queues the frame on the socket; a dead engine's frames go nowhere, and `_read` deals with its death."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(frame))

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


async def _first_frame(
    reader: asyncio.StreamReader, frames: FrameReader[FromEngine], model_id: str
) -> FromEngine | None:
    """Returns the frame that ends loading; None when the stream ended without one. Raises ModelLoadError when neither
    comes, EngineDeadError when the stream breaks or makes no sense."""
    try:
        async with asyncio.timeout(LOAD_LIMIT_S):
            while data := await reader.read(RECV_BYTES):
                for frame in frames.feed(data):
                    return frame
    except (ConnectionError, ValueError) as error:
        raise EngineDeadError(f"the stream of model {model_id}'s engine broke while loading: {error}") from error
    except TimeoutError:
        raise ModelLoadError(f"{model_id}: loading has not ended in {LOAD_LIMIT_S:.0f} s, and was given up") from None
    return None


def _answer(waiter: asyncio.Future[None], error: Exception | None) -> None:
    """Ends a wait, unless nobody waits any more."""
    if waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)
