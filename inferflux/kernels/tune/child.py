"""One subject's knobs, tried in a process of its own: `python -m inferflux.kernels.tune.child`, told what by stdin.

Prints events, one JSON object a line, each before or after what may end the process (see `apart`). Exit code: 0 when
all knobs are through, LOST when a kernel has left the device useless.
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
from inferflux.kernels.tune.apart import Request
from inferflux.kernels.tune.knobs import Subject, subjects_of
from inferflux.kernels.tune.setting import DeviceLostError, Setting, words
from inferflux.kernels.tune.trial import try_knob

LOST: Final = 3


class FileTurns:
    """Turns of several processes by locks on files, which the system takes from one that dies. Who waits to be alone
    waits at the gate, and lets nobody by: among many who share it would not come before they are all done."""

    def __init__(self, folder: Path, say: Callable[[str], object]) -> None:
        self._gate, self._turn = ((folder / name).open("w") for name in ("gate", "turn"))
        self._say = say

    def shared(self) -> contextlib.AbstractContextManager[None]:
        return self._held(fcntl.LOCK_SH)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return self._held(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _held(self, kind: int) -> Iterator[None]:
        self._say("waiting")
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._turn, kind)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)


class Say:
    """Writes events where the parent reads them; whatever else prints goes to stderr."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        sys.stdout = sys.stderr

    def __call__(self, event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), file=self._stream, flush=True)


def main() -> int:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    say = Say()
    device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting(device, torch.bfloat16, FileTurns(Path(request.turns), say), say, request.check_until)
    (subject,) = (each for each in subjects_of(SHAPES[request.model_size]) if each.name == request.subject)
    try:
        try_subject(subject, request, setting)
    except DeviceLostError as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return LOST
    return 0


def try_subject(subject: Subject, request: Request, setting: Setting) -> None:
    """Tries one knob after another, each with what was chosen for those before it."""
    sizes = SHIPPED
    for knob in subject.knobs:
        if knob.name in request.chosen:
            sizes = knob.changed(sizes, knob.choices(sizes)[request.chosen[knob.name]])
        elif knob.name not in request.failed:
            try:
                sizes = try_knob(knob, sizes, request.problems.get(knob.name, {}), setting)
            except MemoryError as error:
                setting.say("failed", knob=knob.name, problem=words(error))


if __name__ == "__main__":
    sys.exit(main())
