"""The loaded native library: its C functions, or the reason why there are none.

A library that is not built yet, or is damaged, is built in the background and used from the next start on; `inferflux
kernels build` builds it now. If the package has some (`portable`), the best of them is used instead. A start never
waits for a compiler. A library that was built and found wrong is rebuilt only by that command.
"""

import ctypes
import functools
from ctypes import c_char_p, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any, Final, NamedTuple

from inferflux.kernels.native.background import start_build
from inferflux.kernels.native.build import build, compiler, is_whole, library_path, openmp_library, refusal
from inferflux.kernels.native.portable import portable_library

_SIGNATURES: Final = {
    "call": (c_int, c_int, c_char_p, c_int),
    "replay": (c_char_p, c_long, c_void_p, c_int, c_void_p),
}


class Library(NamedTuple):
    """The functions that `calls` and `tape` use; None, with a reason, where the library cannot be used."""

    call: Any = None
    replay: Any = None
    reason: str | None = None


@functools.cache
def library() -> Library:
    """Returns this process's library, loaded at the first call."""
    openmp = openmp_library()
    if openmp is None:
        return Library(reason="needs Linux and a torch with GNU OpenMP")
    path = library_path(openmp)
    if is_whole(path):
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
    return path, None if is_whole(path) else build(path, openmp)


def _load(path: Path) -> Library:
    try:
        handle = ctypes.CDLL(str(path))
        functions = {name: getattr(handle, f"inferflux_{name}") for name in _SIGNATURES}
    except (OSError, AttributeError) as error:
        return Library(reason=f"{path} cannot be loaded: {error}")
    for name, function in functions.items():
        function.argtypes, function.restype = _SIGNATURES[name], c_int
    return Library(**functions)
