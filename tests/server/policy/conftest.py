"""What all tests of the policy store share."""

import functools
from collections.abc import Callable

import pytest

from inferflux.server.policy import envelope, store_file
from inferflux.server.sealed import Derivation, Seal

PASSPHRASE = "a passphrase for tests"


@pytest.fixture(scope="session")
def derive_once() -> Callable[[str, Derivation], Seal]:
    return functools.cache(Seal)


@pytest.fixture(autouse=True)
def fast_scrypt(monkeypatch: pytest.MonkeyPatch, derive_once: Callable[[str, Derivation], Seal]) -> None:
    """Derives a key from the same passphrase and salt once: a tenth of a second each is too much for many loads."""
    monkeypatch.setattr(envelope, "Seal", derive_once)
    monkeypatch.setattr(store_file, "Seal", derive_once)
