"""`inferctl`: talks to a server over HTTP, for people and for scripts. Knows nothing of the server's insides.

The rest is imported only when a command runs: Ctrl-C ends it quietly from its first moment on.
"""

import importlib
from collections.abc import Sequence

from inferflux.command_line import EXIT_INTERRUPTED, open_streams


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 ok, 1 failed, 2 usage, 130 interrupted."""
    open_streams()
    try:
        code: int = importlib.import_module("inferflux.ctl.program").run(argv)
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
