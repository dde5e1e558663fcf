"""Child processes of a benchmark, which end with it: also by SIGTERM, at which Python would leave at once, and a server
of half a gigabyte would stay.

Knows no server.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Final

# By the shell's custom: 128 and the signal's number.
EXIT_TERMINATED: Final = 128 + signal.SIGTERM
GRACE_S: Final = 60.0


@contextlib.contextmanager
def child_process(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """Starts a process, with `options` as Popen takes them, and ends it by SIGTERM. For the main thread."""
    with exits_by_exception():
        process = subprocess.Popen(command, **options)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def exits_by_exception() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit, so that what ends children is run. For the main thread."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        sys.exit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
