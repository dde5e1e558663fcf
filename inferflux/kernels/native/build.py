"""Building the native library: which compiler, which flags, and where the result is kept.

One file per machine, torch and source, in the user's cache; a change of any of them is another file. Knows no kernel.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch

from inferflux.config.cache_dir import cache_dir
from inferflux.kernels import cpu_features

SOURCES: Final = Path(__file__).parent
FLAGS: Final = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")
COMPILERS: Final = ("g++", "c++")
LOCK: Final = "native.lock"
WORK: Final = "native-build-"
TIMEOUT_S: Final = 180.0


def compiler() -> str | None:
    """Returns the compiler's path, or None."""
    return next((path for name in COMPILERS if (path := shutil.which(name)) is not None), None)


def openmp_library() -> str | None:
    """Returns the GNU OpenMP library that torch computes with, or None.

    A process may hold others, which wheels bring along; kernels in one of those would have threads of their own, that
    wait for work on the same cores as torch's.
    """
    flags = os.RTLD_LAZY | getattr(os, "RTLD_NOLOAD", 0)
    try:
        entry = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), mode=flags).GOMP_parallel
        lines = Path("/proc/self/maps").read_text().splitlines()
    except (OSError, AttributeError):
        return None
    address = ctypes.cast(entry, ctypes.c_void_p).value or 0
    for line in lines:
        first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[-1]
    return None


def library_path(openmp: str) -> Path:
    """Returns where the library of this machine lies, built or not; a home folder may be shared by unlike machines."""
    digest = hashlib.sha256(repr((FLAGS, openmp, cpu_features.description())).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    return cache_dir() / f"native-{digest.hexdigest()[:20]}.so"


def build(path: Path, openmp: str) -> str | None:
    """Compiles the library to `path`, which appears whole or not at all. Returns why that failed, or None.

    Of several processes that want to, the first does it; the others return at once, saying so.
    """
    command = compiler()
    if command is None:
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (path.parent / LOCK).open("w") as lock:
            # Held until it is closed, or this process ends in the middle.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left_behind in path.parent.glob(f"{WORK}*"):
                shutil.rmtree(left_behind, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=WORK) as folder:
                return _compile(command, Path(folder), path, openmp)
    except BlockingIOError:
        return "another process is building it"
    except OSError as error:
        return f"{path.parent} cannot be written: {error.strerror or error}"


def _compile(command: str, folder: Path, path: Path, openmp: str) -> str | None:
    object_file, result = folder / "kernels.o", folder / path.name
    # Linked without -fopenmp, which would bring the compiler's own OpenMP library.
    steps = (
        [command, *FLAGS, "-c", str(SOURCES / "kernels.cpp"), "-o", str(object_file)],
        [command, "-shared", str(object_file), openmp, "-o", str(result)],
    )
    for step in steps:
        try:
            done = subprocess.run(step, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command} failed: {error}"
        if done.returncode:
            return f"{command} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
    result.replace(path)
    return None
