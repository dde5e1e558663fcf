"""What the environment says about waiting threads stands; only silence is filled."""

import os

import pytest

from inferflux.config.openmp import SPIN_COUNT, share_cores_politely


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_spinning_is_bounded_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back whatever happens
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    share_cores_politely()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
