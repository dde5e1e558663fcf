"""Opening the store a configuration names: what is logged, and what is refused before anything is written."""

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from inferflux.config import Config
from inferflux.errors import ConfigError
from inferflux.server.policy.opening import open_policy

KEY = "sk-test-0123456789abcdef"


def config(path: Path, **auth: Any) -> Config:
    return msgspec.convert({"policy": {"store": str(path)}, "auth": auth}, Config)


async def test_a_first_start_without_callers_makes_no_store(tmp_path: Path) -> None:
    """Else the store, which decides from then on, would have no key for good."""
    path = tmp_path / "policy.enc"
    with pytest.raises(ConfigError, match=r"^auth\.api_keys: needs at least one key"):
        open_policy(config(path), None)
    assert not path.exists()
    await open_policy(config(path, api_keys=[{"key": KEY}]), None).close()
    await open_policy(config(path), None).close()


async def test_a_store_without_keys_is_refused_unless_there_are_other_callers(tmp_path: Path) -> None:
    path = tmp_path / "policy.enc"
    await open_policy(config(path, allow_anonymous=True), None).close()
    with pytest.raises(ConfigError, match=r"^policy\.store: .* has no API key"):
        open_policy(config(path, api_keys=[{"key": KEY}]), None)


async def test_what_the_store_overrules_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "policy.enc"
    await open_policy(config(path, api_keys=[{"key": KEY}]), None).close()
    with caplog.at_level(logging.WARNING):
        await open_policy(config(path, api_keys=[{"key": KEY + "x"}], rate_limit_per_minute=5), None).close()
    text = caplog.text
    assert "1 configured keys are not in the policy store" in text
    assert "auth.rate_limit_per_minute: the policy store says otherwise" in text
    assert KEY not in text
