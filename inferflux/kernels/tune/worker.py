"""Tries one task's knobs in a process of its own: `python -m inferflux.kernels.tune.worker`, with a Request on stdin.

Prints events, one JSON object a line, before and after everything that may end the process (see `workers`). Exit code:
0 when all knobs are done, LOST when a kernel has left the device unusable.
"""

import contextlib
import fcntl
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.triton.tuning import SHIPPED
from inferflux.kernels.tune.knobs import TuningTask, tasks_of
from inferflux.kernels.tune.trial import try_knob
from inferflux.kernels.tune.trial_context import DeviceLostError, TrialContext, error_line
from inferflux.kernels.tune.workers import Request

LOST: Final = 3


class FileLock:
    """A DeviceLock over processes, by locks on files, which the system releases when their holder dies. A waiter holds
    the gate, so that one waiting for exclusive access is not overtaken by any number of shared holders."""

    def __init__(self, folder: Path, emit: Callable[[str], object]) -> None:
        self._gate, self._device = ((folder / name).open("w") for name in ("gate", "device"))
        self._emit = emit

    def shared(self) -> contextlib.AbstractContextManager[None]:
        return self._held(fcntl.LOCK_SH)

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return self._held(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _held(self, kind: int) -> Iterator[None]:
        self._emit("waiting")
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._device, kind)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._device, fcntl.LOCK_UN)


class EventWriter:
    """Writes events to stdout, where the parent reads them; anything else that prints goes to stderr."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        sys.stdout = sys.stderr

    def __call__(self, event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), file=self._stream, flush=True)


def main() -> int:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    emit = EventWriter()
    device = torch.device("cuda", torch.cuda.current_device())
    context = TrialContext(device, torch.bfloat16, FileLock(Path(request.lock_folder), emit), emit, request.check_until)
    (task,) = (each for each in tasks_of(SHAPES[request.model_size]) if each.name == request.task)
    try:
        run_task(task, request, context)
    except DeviceLostError as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return LOST
    return 0


def run_task(task: TuningTask, request: Request, context: TrialContext) -> None:
    """Tries one knob after another, each with what was chosen for the ones before it."""
    sizes = SHIPPED
    for knob in task.knobs:
        if knob.name in request.chosen:
            sizes = knob.changed(sizes, knob.choices(sizes)[request.chosen[knob.name]])
        elif knob.name not in request.failed:
            try:
                sizes = try_knob(knob, sizes, request.problems.get(knob.name, {}), context)
            except MemoryError as error:
                context.emit("failed", knob=knob.name, problem=error_line(error))


if __name__ == "__main__":
    sys.exit(main())
