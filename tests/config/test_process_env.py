"""Children are given no secret; the cache folder follows the environment, and a user without a home has none."""

from pathlib import Path

import pytest

from inferflux.config.process_env import cache_dir, engine_environment, without_secrets
from inferflux.kernels.native import build


def test_secrets_stay_here_and_the_rest_goes_along() -> None:
    kept = {"PATH": "/bin", "RANK": "0", "INFERFLUX_RUNTIME__DTYPE": "float32", "OMP_NUM_THREADS": "1"}
    secret = {
        "INFERFLUX_API_KEYS": "k:admin",
        "INFERFLUX_AUTH__API_KEYS": '[{"key": "k"}]',
        "INFERFLUX_AUTH__API_KEYS__0__KEY": "k",
        "INFERFLUX_POLICY_PASSPHRASE": "p",
        "INFERCTL_API_KEY": "k",
    }
    assert without_secrets(kept | secret) == kept


def test_an_engines_threads_sleep_soon_unless_the_user_says_how_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERFLUX_API_KEYS", "k:admin")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert int(engine_environment()["GOMP_SPINCOUNT"]) <= 10_000  # by default 300,000
    assert "INFERFLUX_API_KEYS" not in engine_environment()
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert engine_environment()["GOMP_SPINCOUNT"] == "77"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in engine_environment()


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
