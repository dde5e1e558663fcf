"""The cache folder follows the environment, and a user without a home has none rather than an error."""

from pathlib import Path

import pytest

from inferflux.config.cache_dir import cache_dir
from inferflux.kernels.native import build


def test_it_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "inferflux"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "inferflux"


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(build, "compiler", lambda: "false")
    assert "cannot be written" in str(build.build(cache_dir() / "native.so", "libgomp.so"))
