"""Building the native library: which compiler, which flags, and where the result is kept.

One file per machine, torch and source, in the user's cache. It is put there only after a separate process has found it
correct (see `self_test`); else the reason is kept there in its place. Knows no kernel.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from inferflux.config.process_env import cache_dir, child_environment
from inferflux.kernels import cpu_features

SOURCES: Final = Path(__file__).parent
FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-fPIC",
    "-fopenmp",
)
THIS_CPU: Final = ("-march=native",)
COMPILERS: Final = ("g++", "c++")
LOCK: Final = "native.lock"
WORK: Final = "native-build-"
# At the end of a library: the SHA-256 of the rest.
SEAL_BYTES: Final = 32
# Generous: in the background both run at low priority.
TIMEOUT_S: Final = 600.0
SELF_TEST_TIMEOUT_S: Final = 600.0
# Exit code of a self-test that found the library wrong. Other failures (no memory, say) are not the library's.
REFUSED: Final = 3
FAULTS: Final = (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)


def compiler() -> str | None:
    """Returns the compiler's path, or None."""
    return next((path for name in COMPILERS if (path := shutil.which(name)) is not None), None)


def openmp_library() -> str | None:
    """Returns the GNU OpenMP library that torch computes with, or None.

    A process may have loaded others, from wheels; kernels linked to one of those would have threads of their own, which
    spin on the same cores as torch's.
    """
    flags = os.RTLD_LAZY | getattr(os, "RTLD_NOLOAD", 0)
    try:
        entry = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), mode=flags).GOMP_parallel
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    except (OSError, AttributeError):
        return None
    return mapped_file(maps, ctypes.cast(entry, ctypes.c_void_p).value or 0)


def mapped_file(maps: str, address: int) -> str | None:
    """Returns the file mapped at an address, by the text of /proc/PID/maps; its path may have spaces."""
    for line in maps.splitlines():
        bounds, *_, path = line.split(" ", maxsplit=5)  # and before the path as many spaces as make a column
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address < last:
            return path.strip() or None
    return None


def library_path(openmp: str) -> Path:
    """Returns the path of this machine's library, built or not; machines that differ may share a home folder."""
    return cache_dir() / f"native-{digest_of(THIS_CPU, openmp, cpu_features.description())}.so"


def digest_of(*facts: object) -> str:
    """Returns 20 hex digits that identify these facts, the flags and the sources."""
    digest = hashlib.sha256(repr((FLAGS, *facts)).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def is_whole(path: Path) -> bool:
    """Whether the file is as `build` sealed it. One that lost its end or a block (a crash of the machine, a copy to a
    full disk) may load and end the process later; it counts as not built."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-SEAL_BYTES]).digest() == content[-SEAL_BYTES:]


def _seal(path: Path) -> None:
    """Appends the digest of what is in the file; loaders of libraries ignore what follows the last section."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as file:
        file.write(digest)


def refusal(path: Path) -> str | None:
    """Returns why the library that was compiled for `path` was found wrong, or None."""
    try:
        return _refusal_file(path).read_text()
    except OSError:
        return None


def _refusal_file(path: Path) -> Path:
    return path.with_suffix(".refused")


def python_environment() -> dict[str, str]:
    """Returns an environment in which a child Python process finds the modules that this one has imported."""
    here = [str(SOURCES.parents[2]), *filter(None, sys.path)]
    return child_environment() | {"PYTHONPATH": os.pathsep.join(here)}


def build(path: Path, openmp: str, target: Sequence[str] = THIS_CPU, *, runs_here: bool = True) -> str | None:
    """Compiles and tests the library, and installs it at `path` atomically. Returns why that failed, or None.

    Of several processes the first builds; the others return at once and say so.
    target: the compiler's flags for the CPU. runs_here: whether this CPU can execute it; else it is not tested.
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
                # Laid out as a cache folder, so that the self-test finds the library as a start does.
                place = library_path(openmp)
                candidate = Path(folder) / place.parent.name / place.name
                candidate.parent.mkdir()
                problem = _compile([command, *FLAGS, *target], candidate, openmp)
                return problem or _install(candidate, path, runs_here)
    except BlockingIOError:
        return "another process is building it"
    except OSError as error:
        return f"{path.parent} cannot be written: {error.strerror or error}"


def _compile(command: Sequence[str], result: Path, openmp: str) -> str | None:
    object_file = result.with_suffix(".o")
    # Linked without -fopenmp, which would bring the compiler's own OpenMP library.
    steps = (
        [*command, "-c", str(SOURCES / "kernels.cpp"), "-o", str(object_file)],
        [command[0], "-shared", str(object_file), openmp, "-o", str(result)],
    )
    for step in steps:
        try:
            done = subprocess.run(step, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{command[0]} failed: {error}"
        if done.returncode:
            return f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
    _seal(result)
    return None


def _install(candidate: Path, path: Path, runs_here: bool) -> str | None:
    problem, is_wrong = _self_test(candidate) if runs_here else (None, False)
    if problem is None:
        candidate.replace(path)
        _refusal_file(path).unlink(missing_ok=True)
    elif is_wrong:
        kept = candidate.with_suffix(".reason")
        kept.write_text(problem)
        kept.replace(_refusal_file(path))
    return problem


def _self_test(candidate: Path) -> tuple[str | None, bool]:
    """Returns why the self-test failed, or None, and whether that is the library's fault."""
    command = [sys.executable, "-P", "-m", "inferflux.kernels.native.self_test"]
    # Without spinning threads, which would double the time.
    environment = python_environment() | {"XDG_CACHE_HOME": str(candidate.parents[1]), "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SELF_TEST_TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired as late:
        return f"its self-test did not end within {SELF_TEST_TIMEOUT_S:.0f} s, at {_last(late.stdout)}", True
    if done.returncode in {-fault for fault in FAULTS}:
        return f"its self-test ended with {signal.Signals(-done.returncode).name} at {_last(done.stdout)}", True
    if done.returncode == REFUSED:
        return f"its self-test failed: {_last(done.stdout)}", True
    return f"its self-test could not run: {_last(done.stdout + done.stderr)}" if done.returncode else None, False


def _last(output: str | bytes | None) -> str:
    """Returns the last line. output: bytes or None from a process that was stopped."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return (text.strip().splitlines() or ["its start"])[-1]
