"""The background build: `inferflux kernels build` as a process that outlives the one that starts it.

It is fully detached: in a session of its own, with no open file of the starting process but a lock, and not its child,
so that no signal or wait of that process concerns it. Only one runs at a time: nothing is started while the lock is
held.
"""

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Final

from inferflux.kernels.native.build import python_environment

# Held by the process from start to end, since it inherits the open file.
LOCK: Final = "native-background.lock"
COMMAND: Final = ("-P", "-m", "inferflux", "kernels", "build")
# The shell exits at once, so that the process is reparented to init. Where sessions share the processor (Linux's
# autogroups), niceness counts only within a session, so the session gets the same.
SCRIPT: Final = '{ echo 15 >/proc/self/autogroup; } 2>/dev/null; nice -n 15 "$@" &'


def start_build(folder: Path) -> str | None:
    """Starts a process that builds the library in the cache's `folder`, unless one runs. Returns why not, or None."""
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
