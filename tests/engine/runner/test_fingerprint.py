"""Anything that changes what a page's bytes would be must change the fingerprint."""

import os
from collections.abc import Callable
from pathlib import Path

from inferflux.engine.runner.fingerprint import adapter_name, fingerprint
from tests.support.engines import start_engine
from tests.support.models import TinyModel


def write_model(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(1_000_000))
    for file in path.iterdir():
        os.utime(file, ns=(0, 0))
    return path


def test_equal_folders_have_equal_fingerprints(tmp_path: Path):
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    assert fingerprint(first, 16, "bfloat16") == fingerprint(second, 16, "bfloat16")
    assert len(fingerprint(first)) == 32


def test_config_facts_weights_and_times_matter(tmp_path: Path):
    path = write_model(tmp_path / "a")
    seen = {fingerprint(path), fingerprint(path, 16)}
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 64 * 10 + 100] = 1
    weights.write_bytes(data)
    os.utime(weights, ns=(0, 0))
    seen.add(fingerprint(path))
    os.utime(weights, ns=(0, 1))
    seen.add(fingerprint(path))
    (path / "config.json").write_text('{"a": 1}')
    os.utime(path / "config.json", ns=(0, 0))
    seen.add(fingerprint(path))
    assert len(seen) == 5


def test_an_adapter_is_named_by_its_own_files(tmp_path: Path):
    """Pages that outlive a restart must not meet other weights under the same id."""
    path = tmp_path / "a"
    path.mkdir()
    seen = set()
    for config, weights, time in (("{}", b"1", 0), ("{}", b"2", 0), ("{ }", b"2", 0), ("{ }", b"2", 1)):
        for name, data in (("adapter_config.json", config.encode()), ("adapter_model.safetensors", weights)):
            (path / name).write_bytes(data)
            os.utime(path / name, ns=(time, time))
        seen.add(adapter_name(path))
        (path / "README.md").write_text(str(len(seen)))
        assert adapter_name(path) in seen
    assert len(seen) == 4


def test_quantized_pages_of_another_computation_are_foreign(tiny_model: Callable[[str], TinyModel]):
    """Pages of int8 have one shape, whatever type the numbers in them were computed in."""
    folder, pages = tiny_model("llama").folder, {"device_pages": 64, "dtype": "int8"}
    engines = [start_engine(folder, paged_kv=pages, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert engines[0].info.dtype != engines[1].info.dtype
    assert engines[0].executor.fingerprint != engines[1].executor.fingerprint
