"""Writing safetensors files by hand, sound and broken ones."""

import json
from pathlib import Path

INDEX_FILE = "model.safetensors.index.json"


def file_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a file's bytes. header: JSON or bytes as they are; length: what the first 8 bytes claim of it."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def entry(dtype: object = "F32", shape: object = (2,), start: object = 0, stop: object = 8) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_shards(folder: Path, shards: dict[str, bytes], weight_map: object) -> None:
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
