"""A name for a model's weights and for the shape of its pages, so that cached pages never meet another model.

Hashing whole checkpoints would take longer than loading them. Instead: every file's name, size, time of change and
header, and samples spread over its bytes, so that neither an edit in place nor a swapped file of the same shape passes.
"""

import hashlib
from pathlib import Path

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096


def fingerprint(path: Path, *facts: object) -> bytes:
    """Returns 32 bytes that name the model folder `path` and `facts` (whatever else a page's bytes depend on)."""
    digest = hashlib.sha256(repr(facts).encode())
    for file in sorted([path / "config.json", *path.glob("*.safetensors")]):
        stat = file.stat()
        digest.update(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode())
        stride = max(SAMPLE_BYTES, stat.st_size // SAMPLES_PER_FILE)
        with file.open("rb") as stream:
            for offset in range(0, stat.st_size, stride):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()
