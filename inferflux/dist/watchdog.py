"""Watchdog: ends the process when it has made no progress for too long.

A collective whose peer is gone may never return, and its thread cannot do anything about that: it takes another thread.
Knows no ranks; no torch.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

logger = logging.getLogger(__name__)

EXIT_CODE: Final = 1
CHECKS_PER_TIMEOUT: Final = 20


def end_process() -> NoReturn:
    """Exits immediately, without waiting for whatever hangs."""
    os._exit(EXIT_CODE)


class Watchdog:
    """Calls `expire` in a thread of its own once `feed` has not been called for timeout_s seconds, until `stop`."""

    def __init__(self, timeout_s: float, name: str, expire: Callable[[], object] = end_process) -> None:
        self._timeout_s = timeout_s
        self._name = name
        self._expire = expire
        self._last = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def feed(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._timeout_s / CHECKS_PER_TIMEOUT):
            if time.monotonic() - self._last > self._timeout_s:
                logger.error("%s: no progress for %.0f s; exiting", self._name, self._timeout_s)
                self._expire()
                return
