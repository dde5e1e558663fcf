"""Which models the demo model stands in for, and when it may not."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from inferflux.config import Config
from inferflux.config.tree import DEMO_MODEL_ID
from inferflux.engine.demo import demo_model_path
from inferflux.errors import ConfigError
from inferflux.server.model_source import find_sources, require_adapters


def sources(models: list[dict[str, Any]], *, allow_stub: bool = True):
    return find_sources(msgspec.convert({"models": models, "runtime": {"allow_stub": allow_stub}}, Config))


def test_a_folder_that_exists_is_taken_as_it_is(tmp_path: Path):
    (source,) = sources([{"id": "m", "path": str(tmp_path), "dtype": "float32"}], allow_stub=False)
    assert (source.model.path, source.model.dtype, source.stub, source.fallback) == (
        str(tmp_path),
        "float32",
        False,
        None,
    )


@pytest.mark.parametrize("extra", [{"path": "stub"}, {"backend": "stub"}, {"path": "/tmp", "backend": "stub"}])
def test_the_demo_model_by_name(extra: dict[str, Any]):
    """Asked for by name it is no fallback, and so is not forbidden by allow_stub: false."""
    (source,) = sources([{"id": "m", "max_model_len": 64, **extra}], allow_stub=False)
    assert (source.model.path, source.model.backend) == (str(demo_model_path()), "auto")
    assert (source.stub, source.fallback, source.model.max_model_len) == (True, None, 64)


@pytest.mark.parametrize("path", ["/no/such/folder", None, __file__])
def test_a_missing_folder(path: str | None):
    model = {"id": "m", "max_model_len": 100_000, "dtype": "float16", **({"path": path} if path else {})}
    (source,) = sources([model])
    assert (source.stub, source.model.id, source.model.path) == (True, "m", str(demo_model_path()))
    assert (source.model.max_model_len, source.model.dtype) == (None, "auto"), "the missing model's settings do not fit"
    assert (path or "no path") in (source.fallback or "")
    with pytest.raises(ConfigError, match=r"models: m: .*runtime\.allow_stub is false"):
        sources([model], allow_stub=False)


def test_no_model_at_all():
    (source,) = sources([])
    assert (source.model.id, source.stub, source.fallback) == (DEMO_MODEL_ID, True, None)
    with pytest.raises(ConfigError, match="at least one is needed"):
        sources([], allow_stub=False)


def test_adapters_go_with_their_model(tmp_path: Path):
    tree = {
        "models": [{"id": "a", "path": str(tmp_path)}, {"id": "b", "path": "/no/such/folder"}],
        "adapters": [{"id": f"of-{base}", "path": str(tmp_path), "base": base} for base in "ab"],
    }
    a, b = find_sources(msgspec.convert(tree, Config))
    assert [adapter.id for adapter in a.adapters] == ["of-a"]
    assert b.adapters == (), "the demo model is another one than they were trained for"
    assert "adapters (of-b) are not served" in (b.fallback or "")


def test_an_adapters_folder_must_be_there(tmp_path: Path):
    tree = {"adapters": [{"id": "x", "path": str(tmp_path / "gone"), "base": DEMO_MODEL_ID}]}
    with pytest.raises(ConfigError, match=r"^adapters\[0\]\.path: must be a folder \(got .*gone"):
        require_adapters(msgspec.convert(tree, Config))
