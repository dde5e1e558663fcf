"""The native library as the ops see it: functions over raw addresses, or the reason why there are none here.

A library that is not built yet is built in the background and serves from the next start on; `inferflux kernels build`
does it ahead. Where some came with the package (`portable`), the best of them serves instead. A start never waits for a
compiler. One that was built and found wrong is not tried again, but by that command.
"""

import ctypes
import functools
from ctypes import c_char_p, c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from inferflux.kernels.native.background import start_build
from inferflux.kernels.native.build import build, compiler, library_path, openmp_library, refusal
from inferflux.kernels.native.portable import portable_library

# Element types by the numbers that the C functions take.
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3, torch.uint8: 4}

_SIGNATURES: Final = {
    "norm": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_float, c_int),
    "rope": (c_int, c_char_p),
    "gate": (c_int, c_void_p, c_void_p, c_long, c_long, c_int, c_int),
    "attention": (c_int, c_char_p),
    "integers": (c_int, c_char_p),
    "floats": (c_int, c_char_p),
}


class Library(NamedTuple):
    """The functions; all None, with a reason, where the library cannot be used."""

    norm: Any = None
    rope: Any = None
    gate: Any = None
    attention: Any = None
    integers: Any = None
    floats: Any = None
    reason: str | None = None


@functools.cache
def library() -> Library:
    """Returns this process's library, loaded at the first call."""
    openmp = openmp_library()
    if openmp is None:
        return Library(reason="needs Linux and a torch with GNU OpenMP")
    path = library_path(openmp)
    if path.exists():
        return _load(path)
    refused = refusal(path)
    if refused is not None:
        return Library(reason=f"built, but not used: {refused} (`inferflux kernels build` tries again)")
    portable = portable_library()
    if portable is not None:
        return _load(portable)
    if compiler() is None:
        return Library(reason="there is no C++ compiler to build it with")
    hindrance = start_build(path.parent)
    return Library(reason=hindrance or "not built yet: it is being built for the next start")


def build_now() -> tuple[Path, str | None]:
    """Builds the library unless it is there. Returns where it lies, and why it does not, or None."""
    openmp = openmp_library()
    if openmp is None:
        return Path(), "needs Linux and a torch with GNU OpenMP"
    path = library_path(openmp)
    return path, None if path.exists() else build(path, openmp)


def _load(path: Path) -> Library:
    try:
        handle = ctypes.CDLL(str(path))
        functions = {name: getattr(handle, f"inferflux_{name}") for name in _SIGNATURES}
    except (OSError, AttributeError) as error:
        return Library(reason=f"{path} cannot be loaded: {error}")
    for name, function in functions.items():
        function.argtypes, function.restype = _SIGNATURES[name], None
    return Library(**functions)
