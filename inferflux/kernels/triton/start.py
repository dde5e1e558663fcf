"""When a kernel starts: once the one before it in the stream has ended or, by programmatic dependent launch, as soon as
all programs of that one have started, so that what starting takes passes meanwhile (Hopper and newer).

Whoever may be started early calls `begin` in every program before it reads what another kernel has written, and before
it writes. What is read before is weights alone.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def begin(EARLY: tl.constexpr):
    """Lets the next kernel start and, where this one was started EARLY, waits for the end of the one before; which has
    waited for those before itself."""
    if EARLY:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
