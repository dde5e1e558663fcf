"""Expressions: which of some names a regular expression matches whole, found within a time limit.

Python's `re` goes back and tries again, for some expressions in times that double with every letter, and no other
thread runs meanwhile. So what is more than letters and dots is tried in a process of its own, which can be ended. Knows
strings only.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Final, Self

from inferflux.config.process_env import child_environment

# Of a CPU's time, for all expressions of an adapter together; those in use take milliseconds. By the clock, a machine
# that stood still for so long would have an adapter refused.
LIMIT_S: Final = 5.0
# Nothing here can be tried in more than one way.
_PLAIN: Final = re.compile(r"[\w.-]*(?:\\\.[\w.-]*)*")
_PROGRAM: Final = """
import json, re, signal, sys
signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))  # whose signal ends it
names = json.loads(sys.stdin.readline())
for line in sys.stdin:
    found = re.compile(json.loads(line)).fullmatch
    print(json.dumps([name for name in names if found(name)]), flush=True)
"""


class Expressions:
    """Tries expressions on `names`. A context manager: leaving it ends the process, if there is one."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def matching(self, pattern: str, before: str = "") -> frozenset[str]:
        """Returns the names that `pattern`, behind what `before` matches, matches whole. before: an expression that
        takes no long time by itself.

        Raises TimeoutError when that is not found in time, re.error and the like when it is no expression.
        """
        whole = re.compile(f"{before}(?:{pattern})" if before else pattern)
        if _PLAIN.fullmatch(pattern):
            return frozenset(name for name in self.names if whole.fullmatch(name))
        self._process = self._process or self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its time may have been over
            print(json.dumps(whole.pattern), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise TimeoutError
        return frozenset(json.loads(answer))

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(LIMIT_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=child_environment(),
            process_group=0,
        )
        assert process.stdin is not None
        print(json.dumps(self.names), file=process.stdin, flush=True)
        return process
