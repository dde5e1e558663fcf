"""Large pages: moves a loaded model's weights into pages of 2 MiB (x86-64) where Linux supports it.

In pages of 4 KiB a model of 250 MB needs 60 000 address translations per decode step, more than a TLB holds. The kernel
may refuse; results are the same without, a little slower. Tokens per second of one request in
small and in large pages: 135M parameters in float32 38 and 44, bfloat16 69 and 74, int8 104 and 113; 500M in bfloat16
25.5 and 30; with 32 requests there is no difference (two cores of a Zen 3 EPYC, runs that were not kept).
"""

import ctypes
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

_SETTINGS: Final = Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE: Final = 25  # MADV_COLLAPSE of Linux 6.1; older kernels return an error
# Weights are not aligned to pages: a page's other contents move too, and its free parts take memory. Of the S and M
# shapes in all types 88 to 97 % of the weights are in pages that are full enough.
_MIN_FULL: Final = 0.75
# The system may take 7 ms per page, 3 s for a model of 800 MB. Requests that come meanwhile matter more.
_NICENESS: Final = 10


def collapse_in_background(model: object) -> threading.Thread | None:
    """Starts to move a model's tensors in CPU memory. Returns the thread, None if large pages are not available."""
    size = _page_size()
    pages = [] if size is None else _full_pages(model, size)
    if not pages:
        return None
    thread = threading.Thread(target=_collapse, args=(pages, size), name="large-pages", daemon=True)
    thread.start()
    return thread


def _collapse(pages: Iterable[int], size: int) -> None:
    """pages: by their numbers."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in pages:
        advise(page * size, size, _COLLAPSE)


def _page_size() -> int | None:
    """Returns the bytes of a large page; None if there are none or the operator has disabled them."""
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return None
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return None


def _full_pages(model: object, size: int) -> list[int]:
    """Returns the numbers of the pages that consist mostly of the model's tensors."""
    filled: Counter[int] = Counter()
    for first, last in {_span(tensor) for tensor in _tensors(model, set()) if not tensor.is_mkldnn}:
        for page in range(first // size, -(-last // size)):
            filled[page] += min(last, (page + 1) * size) - max(first, page * size)
    return sorted(page for page, num_bytes in filled.items() if num_bytes >= _MIN_FULL * size)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the start and end address of its memory."""
    memory = tensor.untyped_storage()
    return memory.data_ptr(), memory.data_ptr() + memory.nbytes()


def _tensors(part: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yields the tensors on the CPU among the attributes of our own classes, and in lists and tuples, however deep."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        if part.device.type == "cpu":
            yield part
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _tensors(item, seen)
    elif type(part).__module__.startswith("inferflux."):
        slots = [name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ())]
        for name in (*getattr(part, "__dict__", ()), *slots):
            yield from _tensors(getattr(part, name, None), seen)
