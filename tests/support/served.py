"""`inferflux serve` as a process of its own, with the demo model: for what only the whole server can show."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.programs import ROOT
from tests.support.waiting import PATIENCE_S


@dataclass(frozen=True)
class Served:
    """A running server. log: all that it printed, on both outputs."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path


@contextmanager
def served(config: Path, log: Path, environment: Mapping[str, str]) -> Iterator[Served]:
    """Runs a server on a free port until the body ends; the body begins when the model is ready."""
    command = [sys.executable, "-m", "inferflux", "serve", "--config", str(config), "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        yield Served(_wait_ready(process, log), process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        process.kill()
        process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        printed = log.read_text()
        found = re.search(r"listens on (https?://[^;\s]+);", printed)
        if found and " ready in " in printed:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not get ready:\n{log.read_text()}")
