"""What all tests of the audit log share."""

from pathlib import Path

import pytest

from inferflux.server.audit.keys import AuditKeys, key_path, open_keys


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


@pytest.fixture
def keys(log_path: Path) -> AuditKeys:
    return open_keys(key_path(log_path), None)
