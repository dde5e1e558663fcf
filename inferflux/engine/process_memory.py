"""How much main memory another process holds, where the system says so (Linux's /proc)."""

import os
from pathlib import Path


def resident_bytes(pid: int) -> int | None:
    """Returns the bytes of the process that are in main memory; None when it is gone or nobody can tell."""
    try:
        num_pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return num_pages * os.sysconf("SC_PAGE_SIZE")
