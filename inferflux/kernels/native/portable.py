"""Libraries shipped inside the package, one per level of CPU, for machines without a compiler: container images.

`inferflux kernels build --portable` builds them into the package's folder. A level is tested where it is built, if that
CPU can run it. A library that was built for the machine itself takes precedence.
"""

import platform
from pathlib import Path
from typing import Final, NamedTuple

from inferflux.kernels import cpu_features
from inferflux.kernels.native.build import SOURCES, build, digest_of, is_whole, openmp_library

FOLDER: Final = SOURCES / "portable"


class Level(NamedTuple):
    """flags: for the compiler. features: Linux's names of the instruction sets that they use."""

    name: str
    machine: str
    flags: tuple[str, ...]
    features: frozenset[str]

    def runs_here(self) -> bool:
        return self.is_of_this_machine() and self.features.issubset(cpu_features.description().split())

    def is_of_this_machine(self) -> bool:
        return self.machine == platform.machine()

    def path(self) -> Path:
        return FOLDER / f"{self.name}-{digest_of(self.flags)}.so"


_AVX2: Final = frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"))
_AVX512: Final = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# The best first. avx512vbmi (Zen 4, Sapphire Rapids and newer) widens pages of 8 bits by permutations of bytes: decode
# of 512 tokens of int8 or fp8, 32 heads over 4 of 128, 52 us instead of 56, 14 over 2 of 64 21.5 instead of 21.9 (two
# runs in turns, the best of 300, one core of a Zen 5 EPYC). avx512bf16 is left for Cooper Lake.
LEVELS: Final = (
    Level(
        "avx512vbmi",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"),
        _AVX512 | {"avx512_vnni", "avx512_bf16", "avx512vbmi"},
    ),
    Level(
        "avx512bf16",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        _AVX512 | {"avx512_vnni", "avx512_bf16"},
    ),
    Level("avx512vnni", "x86_64", ("-march=x86-64-v4", "-mavx512vnni"), _AVX512 | {"avx512_vnni"}),
    Level("avx512", "x86_64", ("-march=x86-64-v4",), _AVX512),
    Level("avx2vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), _AVX2 | {"avx_vnni"}),
    Level("avx2", "x86_64", ("-march=x86-64-v3",), _AVX2),
    Level("armv8", "aarch64", ("-march=armv8-a",), frozenset(("asimd",))),
)


def portable_library() -> Path | None:
    """Returns the best library of the package that runs here, or None."""
    return next((path for level in LEVELS if level.runs_here() and is_whole(path := level.path())), None)


def build_portable() -> dict[str, str | None]:
    """Builds every level of this kind of machine. Returns, by its name, why that failed, or None."""
    openmp = openmp_library()
    levels = [level for level in LEVELS if level.is_of_this_machine()]
    if openmp is None or not levels:
        return {platform.machine(): "needs Linux, x86_64 or aarch64, and a torch with GNU OpenMP"}
    FOLDER.mkdir(exist_ok=True)  # others will read it, unlike a cache
    return {level.name: build(level.path(), openmp, level.flags, runs_here=level.runs_here()) for level in levels}
