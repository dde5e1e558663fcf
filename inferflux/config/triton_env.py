"""Whether Triton is to interpret its kernels on a CPU, told without importing Triton."""

import os


def asks_for_interpreter() -> bool:
    """Whether the variable is set that Triton reads, to whatever: its meaning is Triton's to know."""
    return bool(os.environ.get("TRITON_INTERPRET"))
