"""The build in the background: `inferflux kernels build` as a process that outlives the one that wants the library.

It belongs to nobody: it has a session of its own, nothing open of the process that started it but a lock, and is not
its child, so that no signal, exit code or wait there is about it. One at a time: who finds the lock taken starts none.
"""

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Final

from inferflux.kernels.native.build import python_environment

# Held by the process from its start to its end, though it does not know: it inherits the open file.
LOCK: Final = "native-background.lock"
COMMAND: Final = ("-P", "-m", "inferflux", "kernels", "build")
# The shell leaves at once, and the process it started has no parent but the system's. Where sessions share the
# processor (Linux's autogroups) niceness counts within one only, so the session gets the same.
SCRIPT: Final = '{ echo 15 >/proc/self/autogroup; } 2>/dev/null; nice -n 15 "$@" &'


def start_build(folder: Path) -> str | None:
    """Sees to it that a process builds the library in the cache's `folder`. Returns why none does, or None."""
    if not sys.executable:
        return "not built, and this Python cannot start another (`inferflux kernels build` builds it)"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            subprocess.run(
                ["/bin/sh", "-c", SCRIPT, "sh", sys.executable, *COMMAND],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
                env=python_environment(),
                check=False,
            )
    except BlockingIOError:
        return None
    except OSError as error:
        return f"not built, and {folder} cannot be written or no process started: {error.strerror or error}"
    return None
