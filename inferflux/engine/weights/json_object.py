"""Reading JSON from a file that is not trusted. Knows sizes and syntax; nothing of what is meant."""

import json
from pathlib import Path

from inferflux.errors import ModelLoadError

MAX_JSON_BYTES = 16 * 1024 * 1024


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """Returns the JSON object in `path`. Raises ModelLoadError when there is none to be had."""
    value = _read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: must be a JSON object (got {type(value).__name__})")
    return value


def read_json_array(path: Path, max_bytes: int = MAX_JSON_BYTES) -> list[object]:
    """Returns the JSON array in `path`. Raises ModelLoadError when there is none to be had."""
    value = _read_json(path, max_bytes)
    if not isinstance(value, list):
        raise ModelLoadError(f"{path}: must be a JSON array (got {type(value).__name__})")
    return value


def _read_json(path: Path, max_bytes: int) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise ModelLoadError(f"{path}: must be at most {max_bytes} bytes")
    try:
        value: object = json.loads(data)
        return value
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: is not valid JSON: {error}") from error
