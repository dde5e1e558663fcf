"""Runs tuning tasks in worker processes, several at a time.

When a kernel kills a process or hangs it, the entry it was at is left out and a new process goes on with the rest,
until all tasks are done or time is up. Knows requests and events (see `worker`); knows no GPU.
"""

import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final

import msgspec

from inferflux.kernels.native.build import python_environment
from inferflux.kernels.tune.knobs import TuningTask

# An entry without an event for this long hangs, or would take too long to compile at a start.
SILENCE_S: Final = 60.0
# Share of the time in which entries are checked; the rest is for timing.
CHECKS_SHARE: Final = 0.6
NO_TIME: Final = "there was no time left"


class Request(msgspec.Struct):
    """What a process reads from stdin. task, model_size: what to try. lock_folder: for `FileLock`. check_until: see
    `TrialContext`. From earlier processes of the task: problems by knob and entry, chosen entries and failed knobs."""

    task: str
    model_size: str
    lock_folder: str
    check_until: float
    problems: dict[str, dict[str, str]] = {}
    chosen: dict[str, str] = {}
    failed: list[str] = []


@dataclass
class Outcome:
    """The result of one knob. left_out: entries that failed, each with its problem. us: medians in microseconds by
    workload and entry, of the last timing. entry: the chosen one, None if there is none; gain: how many times faster it
    is than `current`, None if they are the same or `current` failed. problem: why nothing was chosen, or a workload not
    timed."""

    left_out: dict[str, str] = field(default_factory=dict)
    us: dict[str, dict[str, float]] = field(default_factory=dict)
    current: str | None = None
    entry: str | None = None
    gain: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Limits:
    """seconds: for everything. silence_s: for one entry. processes: at a time."""

    seconds: float
    silence_s: float = SILENCE_S
    processes: int = 4


async def run_workers(
    tasks: Sequence[TuningTask],
    model_size: str,
    command: Sequence[str],
    limits: Limits,
    on_progress: Callable[[str], object],
) -> dict[str, Outcome]:
    """Returns the outcomes by knob. command: starts a process that reads a Request from stdin. on_progress: called with
    a line of text that says what is being done."""
    slots = asyncio.Semaphore(limits.processes)
    deadline = time.monotonic() + limits.seconds
    check_until = time.time() + CHECKS_SHARE * limits.seconds

    with tempfile.TemporaryDirectory(prefix="inferflux-tune-") as lock_folder:

        async def run(task: TuningTask) -> dict[str, Outcome]:
            request = Request(task.name, model_size, lock_folder, check_until)
            runner = TaskRunner(task, request, on_progress)
            async with slots:
                await runner.run(command, limits.silence_s, deadline)
            return runner.outcomes

        parts = await asyncio.gather(*map(run, tasks))
    return {name: outcome for part in parts for name, outcome in part.items()}


class TaskRunner:
    """One task's processes, one after another."""

    def __init__(self, task: TuningTask, request: Request, on_progress: Callable[[str], object]) -> None:
        self.outcomes = {knob.name: Outcome() for knob in task.knobs}
        self._request = request
        self._on_progress = on_progress
        # The knob and entry at work (entry None: all valid ones, for timing); None: nothing is.
        self._current: tuple[str, str | None] | None = None

    async def run(self, command: Sequence[str], silence_s: float, deadline: float) -> None:
        while True:
            before = self._known()
            problem = await self._run_once(command, silence_s, deadline)
            if problem is None:
                break
            self._blame(problem)
            if problem == NO_TIME or self._known() == before:
                break
        undecided = [each for each in self.outcomes.values() if each.entry is None and each.problem is None]
        for outcome in undecided:
            outcome.problem = problem or "it was not tried"

    def _known(self) -> int:
        """Returns how many facts are known: after a process that adds none, no other is started."""
        request = self._request
        return sum(map(len, request.problems.values())) + len(request.chosen) + len(request.failed)

    async def _run_once(self, command: Sequence[str], silence_s: float, deadline: float) -> str | None:
        """Returns what was wrong with the process, or None."""
        self._current = None
        if time.monotonic() >= deadline:
            return NO_TIME
        with tempfile.TemporaryFile() as errors:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=errors,
                    env=python_environment(),
                    start_new_session=True,
                )
            except OSError as error:
                return f"no process could be started: {error.strerror or error}"
            try:
                await self._ask(process)
                late = await self._listen(process, silence_s, deadline)
                return late or _exit_problem(await process.wait(), errors)
            finally:
                # With what it has started, compilers among them.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    async def _ask(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode(self._request))
            await process.stdin.drain()
        process.stdin.close()

    async def _listen(self, process: asyncio.subprocess.Process, silence_s: float, deadline: float) -> str | None:
        """Takes events until there are no more; returns what was wrong when they did not come, or None."""
        assert process.stdout is not None
        while True:
            left = deadline - time.monotonic()
            patience = left if self._current is None else min(silence_s, left)
            try:
                line = await asyncio.wait_for(process.stdout.readline(), patience)
            except ValueError:
                continue  # a library printed a line longer than the stream's limit
            except TimeoutError:
                return NO_TIME if time.monotonic() >= deadline else f"it came to no end within {silence_s:g} s"
            if not line:
                return None
            event = _event_of(line)
            if event is not None:
                self._take(**event)

    def _take(self, event: str, knob: str = "", entry: str | None = None, **facts: Any) -> None:
        outcome = self.outcomes.get(knob, Outcome())
        problem = facts.get("problem")
        self._current = None
        match event:
            case "started":
                self._current = (knob, entry)
                self._on_progress(f"{knob}: {entry or 'timing'}")
            case "checked" if entry is not None and problem is not None:
                self._leave_out(knob, entry, problem)
            case "timed":
                outcome.us[facts["workload"]] = outcome.us.get(facts["workload"], {}) | facts["us"]
            case "untimed":
                outcome.problem = f"{facts['workload']}: {problem}"
            case "failed":
                self._fail(knob, str(problem))
            case "chosen":
                outcome.current, outcome.entry, outcome.gain = facts["current"], entry, facts["gain"]
                self._request.chosen[knob] = str(entry)

    def _leave_out(self, knob: str, entry: str, problem: str) -> None:
        self.outcomes[knob].left_out[entry] = problem
        self._request.problems.setdefault(knob, {})[entry] = problem

    def _fail(self, knob: str, problem: str) -> None:
        self.outcomes[knob].problem = problem
        self._request.failed.append(knob)

    def _blame(self, problem: str) -> None:
        if self._current is None or problem == NO_TIME:
            return
        knob, entry = self._current
        if entry is None:
            self._fail(knob, problem)
        else:
            self._leave_out(knob, entry, problem)


def _event_of(line: bytes) -> dict[str, Any] | None:
    """Returns None for what a library prints."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _exit_problem(code: int, errors: IO[bytes]) -> str | None:
    if code == 0:
        return None
    errors.seek(0)
    last = (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1][:300]
    how = f"with {signal.Signals(-code).name}" if code < 0 else f"with {code}"
    return f"its process ended {how}" + (f": {last}" if last else "")
