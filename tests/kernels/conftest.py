"""Fixtures of the kernels' room."""

import time
from pathlib import Path

import pytest

from inferflux.kernels.native import loading


@pytest.fixture(scope="session")
def true_library() -> Path:
    """The native library, built where that is possible; another worker, or the background, may be at it."""
    path, reason = loading.build_now()
    deadline = time.monotonic() + 200
    while reason is not None and "another process" in reason and time.monotonic() < deadline:
        time.sleep(0.5)
        path, reason = loading.build_now()
    if reason is not None:
        pytest.skip(reason)
    return path
