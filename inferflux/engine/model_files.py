"""Reading a model folder's small files with bounds: a broken or oversize file is a ModelLoadError that names it.

Knows sizes and syntax; nothing of what the files mean. Runs no code and reads no pickle.
"""

import json
from pathlib import Path
from typing import Any

from inferflux.errors import ModelLoadError

MAX_JSON_BYTES = 16 * 1024 * 1024


def check_size(path: Path, max_bytes: int) -> None:
    """Raises ModelLoadError unless `path` is a readable regular file of at most `max_bytes` bytes."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    if not path.is_file():
        raise ModelLoadError(f"{path}: is not a file")
    if size > max_bytes:
        raise ModelLoadError(f"{path}: is too large: {size} bytes, at most {max_bytes} are accepted")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Returns the file's bytes. Raises ModelLoadError when it cannot be read or is larger than `max_bytes`."""
    check_size(path, max_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path, max_bytes: int) -> str:
    """Returns the file's text. Raises ModelLoadError when it cannot be read, is too large or is not UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path}: is not UTF-8 text: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file. Raises ModelLoadError when there is none to be had."""
    value = _read_json(path)
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: must be a JSON object (got {type(value).__name__})")
    return value


def read_json_array(path: Path) -> list[Any]:
    """Returns the JSON array in the file. Raises ModelLoadError when there is none to be had."""
    value = _read_json(path)
    if not isinstance(value, list):
        raise ModelLoadError(f"{path}: must be a JSON array (got {type(value).__name__})")
    return value


def _read_json(path: Path) -> object:
    try:
        value: object = json.loads(read_text(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: is not valid JSON: {error}") from error
    return value
