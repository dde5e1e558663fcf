"""The table of sizes that `inferflux kernels tune` measured here: one JSON file per GPU and Triton in the user's cache.

It can say how kernels cut their work and nothing else (see `sizes`). One that is damaged, another GPU's or out of
bounds is as good as none, which the log says; deleting it brings the shipped sizes back. Imports no Triton.
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import msgspec

from inferflux.config.process_env import cache_dir
from inferflux.kernels.triton.sizes import Sizes

logger = logging.getLogger(__name__)

# Of what the sizes mean to the kernels: tables of another one are ignored.
VERSION: Final = 2
# A whole table has less than 4 KiB.
_MOST_BYTES: Final = 2**16


@dataclass(frozen=True)
class SizeTable:
    """gpu, triton: what it was measured on and with. date, model_size: of the last run. sizes: only those that were
    better than the shipped ones."""

    version: int
    gpu: str
    triton: str
    date: str
    model_size: str
    sizes: Sizes

    def entries(self) -> Iterator[str]:
        """Names what it has in the place of shipped sizes: "prefill 128", "products int8"."""
        for each in fields(self.sizes):
            yield from (f"{each.name} {key}" for key in getattr(self.sizes, each.name))


def path_of(gpu: str, triton: str) -> Path:
    """Returns where the table of a GPU, by its name, and a Triton's version lies."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu} triton {triton}")
    return cache_dir() / f"sizes-{name}.json"


def read(gpu: str, triton: str) -> SizeTable | None:
    """Returns the table, or None where there is none to be used; why not is logged."""
    path = path_of(gpu, triton)
    try:
        with path.open("rb") as file:
            table = msgspec.json.decode(file.read(_MOST_BYTES), type=SizeTable)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        problem: str | None = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    else:
        problem = _foreign(table, gpu, triton)
        if problem is None:
            return table
    logger.warning("%s: measured sizes are ignored, shipped ones serve: %s", path, problem)
    return None


def _foreign(table: SizeTable, gpu: str, triton: str) -> str | None:
    if table.version != VERSION:
        return f"it is of version {table.version}, not {VERSION} (`inferflux kernels tune` measures anew)"
    if (table.gpu, table.triton) != (gpu, triton):
        return f"it was measured on {table.gpu} with triton {table.triton}, not on {gpu} with {triton}"
    return None


def write(table: SizeTable, path: Path) -> None:
    """The file appears whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
