"""Fingerprints of a model's weights and page layout, so that cached pages are never used with another model.

Hashing whole checkpoints would take longer than loading them. Instead: every file's name, size, time of change and
header, and samples spread over its bytes, so that neither an edit in place nor a swapped file of the same shape passes.
"""

import hashlib
from pathlib import Path

from inferflux.engine.models.adapter import WEIGHTS_FILE
from inferflux.engine.models.lora_spec import CONFIG_FILE

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096


def fingerprint(path: Path, *facts: object) -> bytes:
    """Returns 32 bytes that name the model folder `path` and `facts` (whatever else a page's bytes depend on)."""
    return _named(_files(path), *facts)


def contents(path: Path) -> str:
    """Returns a fingerprint of the model's contents, independent of its place and time of writing."""
    return _sampled(_files(path)).hex()


def adapter_name(path: Path) -> bytes:
    """Returns 32 bytes that name the adapter in the folder `path`, so that its pages never meet another's."""
    return _named(_adapter_files(path))


def adapter_contents(path: Path) -> str:
    """As `contents`, of an adapter."""
    return _sampled(_adapter_files(path)).hex()


def _named(files: list[Path], *facts: object) -> bytes:
    times = [(file.name, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((facts, times)).encode() + _sampled(files)).digest()


def _adapter_files(path: Path) -> list[Path]:
    return [path / CONFIG_FILE, path / WEIGHTS_FILE]


def _files(path: Path) -> list[Path]:
    return sorted([path / "config.json", *path.glob("*.safetensors")])


def _sampled(files: list[Path]) -> bytes:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(repr((file.name, size)).encode())
        stride = max(SAMPLE_BYTES, size // SAMPLES_PER_FILE)
        with file.open("rb") as stream:
            for offset in range(0, size, stride):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()
