"""Policy stores written by processes that are killed: run as a program by tests/server/policy/test_crash.py.

Reads orders from stdin, one a line: `NUMBER step STEP` or `NUMBER after SECONDS`. A forked child then saves documents
from NUMBER on, and is killed (SIGKILL) before its STEP-th system call on files, or after that time. Prints `saved N`
for each acknowledged save, and `over` when the child is gone. Forking spares the children the imports and the scrypt.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferflux.server.policy import envelope
from inferflux.server.policy.document import Guardrails, PolicyDocument
from inferflux.server.policy.store_file import PolicyFile
from inferflux.server.sealed import Seal

PASSPHRASE = "a passphrase for tests"
DISK_CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "fchmod")


def document_of(number: int) -> PolicyDocument:
    """A document that tells its number, and is large enough for a half-written one to be possible."""
    return PolicyDocument(guardrails=Guardrails(blocklist=tuple(f"term {number} {index}" for index in range(200))))


def say(text: str) -> None:
    """In one system call, so that no kill cuts a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def write_until_killed(path: Path, first: int) -> None:
    file = PolicyFile(path, PASSPHRASE)
    file.load()
    number = first
    while True:
        file.save(document_of(number))
        say(f"saved {number}")
        number += 1


def kill_before(step: int) -> None:
    """From now on, the process dies before its step-th disk call."""
    count = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in DISK_CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def main() -> None:
    envelope.Seal = functools.cache(Seal)  # type: ignore[misc, assignment]
    path = Path(sys.argv[1])
    file = PolicyFile(path, PASSPHRASE)
    assert file.load() is not None
    file.close()
    for line in sys.stdin:
        number, how, amount = line.split()
        child = os.fork()
        if child == 0:
            if how == "step":
                kill_before(int(amount))
            write_until_killed(path, int(number))
        if how == "after":
            time.sleep(float(amount))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        say("over")


if __name__ == "__main__":
    main()
