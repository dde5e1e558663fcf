"""Processes that try subjects, several at a time: whatever a kernel does to one, the entry to blame is left out and
another goes on with the rest, until all are through or time is up.

Knows what a process is asked and what it tells (see `child`), and nothing of GPUs.
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
from inferflux.kernels.tune.knobs import Subject

# An entry that is heard nothing of for so long hangs, or takes a start too long to compile.
SILENCE_S: Final = 60.0
# The part of the time in which entries are checked; the rest is for taking times.
CHECKS_SHARE: Final = 0.6
NO_TIME: Final = "there was no time left"


class Request(msgspec.Struct):
    """What a process is asked. subject, model_size: what to try. turns: a folder for them. check_until: see `Setting`.
    From processes before it: problems by knob and entry, what was chosen by knob, and knobs to leave alone."""

    subject: str
    model_size: str
    turns: str
    check_until: float
    problems: dict[str, dict[str, str]] = {}
    chosen: dict[str, str] = {}
    failed: list[str] = []


@dataclass
class Outcome:
    """What became of one knob. left_out: entries with what is wrong with them. us: medians by workload and entry, of
    the last times taken. entry: what was chosen, None where nothing could be; gain: how many times faster it is than
    `present`, None where it is the same or that one fails. problem: why nothing was chosen, or a workload not timed."""

    left_out: dict[str, str] = field(default_factory=dict)
    us: dict[str, dict[str, float]] = field(default_factory=dict)
    present: str | None = None
    entry: str | None = None
    gain: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Limits:
    """seconds: for everything. silence_s: for one entry. processes: at a time."""

    seconds: float
    silence_s: float = SILENCE_S
    processes: int = 4


async def try_apart(
    subjects: Sequence[Subject], model_size: str, command: Sequence[str], limits: Limits, tell: Callable[[str], object]
) -> dict[str, Outcome]:
    """Returns the outcomes by knob. command: starts a process that reads a request from stdin. tell: takes what is
    being done, in words."""
    slots = asyncio.Semaphore(limits.processes)
    deadline = time.monotonic() + limits.seconds
    check_until = time.time() + CHECKS_SHARE * limits.seconds

    with tempfile.TemporaryDirectory(prefix="inferflux-tune-") as turns:

        async def run(subject: Subject) -> dict[str, Outcome]:
            request = Request(subject.name, model_size, turns, check_until)
            watched = Watched(subject, request, tell)
            async with slots:
                await watched.run(command, limits.silence_s, deadline)
            return watched.outcomes

        parts = await asyncio.gather(*map(run, subjects))
    return {name: outcome for part in parts for name, outcome in part.items()}


class Watched:
    """One subject's processes, one after another."""

    def __init__(self, subject: Subject, request: Request, tell: Callable[[str], object]) -> None:
        self.outcomes = {knob.name: Outcome() for knob in subject.knobs}
        self._request = request
        self._tell = tell
        # The knob and entry (None: all that are right, for times) at work; None: nothing is.
        self._doing: tuple[str, str | None] | None = None

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
        """How much is known: a process that adds nothing is not started again."""
        request = self._request
        return sum(map(len, request.problems.values())) + len(request.chosen) + len(request.failed)

    async def _run_once(self, command: Sequence[str], silence_s: float, deadline: float) -> str | None:
        """Returns what was wrong with the process, or None."""
        self._doing = None
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
                return late or _ended(await process.wait(), errors)
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
            patience = left if self._doing is None else min(silence_s, left)
            try:
                line = await asyncio.wait_for(process.stdout.readline(), patience)
            except ValueError:
                continue  # a library's chatter without a line's end
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
        self._doing = None
        if event == "doing":
            self._doing = (knob, entry)
            self._tell(f"{knob}: {entry or 'taking times'}")
        elif event == "checked" and entry is not None and problem is not None:
            self._leave_out(knob, entry, problem)
        elif event == "timed":
            outcome.us[facts["workload"]] = outcome.us.get(facts["workload"], {}) | facts["us"]
        elif event == "untimed":
            outcome.problem = f"{facts['workload']}: {problem}"
        elif event == "failed":
            self._fail(knob, str(problem))
        elif event == "chosen":
            outcome.present, outcome.entry, outcome.gain = facts["present"], entry, facts["gain"]
            self._request.chosen[knob] = str(entry)

    def _leave_out(self, knob: str, entry: str, problem: str) -> None:
        self.outcomes[knob].left_out[entry] = problem
        self._request.problems.setdefault(knob, {})[entry] = problem

    def _fail(self, knob: str, problem: str) -> None:
        self.outcomes[knob].problem = problem
        self._request.failed.append(knob)

    def _blame(self, problem: str) -> None:
        if self._doing is None or problem == NO_TIME:
            return
        knob, entry = self._doing
        if entry is None:
            self._fail(knob, problem)
        else:
            self._leave_out(knob, entry, problem)


def _event_of(line: bytes) -> dict[str, Any] | None:
    """None of what a library prints."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _ended(code: int, errors: IO[bytes]) -> str | None:
    if code == 0:
        return None
    errors.seek(0)
    last = (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1][:300]
    how = f"with {signal.Signals(-code).name}" if code < 0 else f"with {code}"
    return f"its process ended {how}" + (f": {last}" if last else "")
