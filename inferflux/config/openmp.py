"""How the engine's process waits for its own threads; to be said before torch is imported.

OpenMP threads that meet at the end of each operator spin, by default for about a millisecond. On cores shared with the
HTTP server and its neighbours a spinning thread keeps away the very thread it waits for.
"""

import os
from typing import Final

# Decode of a 135M model in float32, tokens/s alone and beside one busy process, 2 cores of a Zen 3 EPYC, torch 2.13:
# libgomp's default 17.6 and 3.8; 20000 14.7 and 4.0; 2000 15.9 and 10.3; 100 13.6 and 11.6.
SPIN_COUNT: Final = "2000"


def share_cores_politely() -> None:
    """Bounds the spinning of this process's OpenMP threads, unless its environment says how they are to wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
