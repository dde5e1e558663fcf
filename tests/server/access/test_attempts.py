"""Failed attempts: whoever guesses is slowed down, whoever proved themselves is not locked out by a neighbour."""

import pytest

from inferflux.server.access.attempts import FailedAttempts, TooManyAttemptsError, source_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def attempts(clock: Clock) -> FailedAttempts:
    return FailedAttempts(clock, failures_per_minute=5, max_sources=100)


def guess(attempts: FailedAttempts, address: str, count: int) -> int:
    """Returns how many of `count` wrong keys are looked at."""
    looked_at = 0
    for index in range(count):
        try:
            attempts.check(address, f"guess {index}")
        except TooManyAttemptsError:
            continue
        looked_at += 1
        attempts.failed(address, f"guess {index}")
    return looked_at


def test_guesses_are_bounded_by_time(attempts: FailedAttempts, clock: Clock) -> None:
    assert guess(attempts, "192.0.2.1", 100) == 5
    clock.now += 24
    assert guess(attempts, "192.0.2.1", 100) == 2


def test_right_guess_is_refused_too(attempts: FailedAttempts) -> None:
    guess(attempts, "192.0.2.1", 10)
    with pytest.raises(TooManyAttemptsError) as caught:
        attempts.check("192.0.2.1", "the right key")
    assert caught.value.retry_after_s == 12


def test_other_addresses_are_not_concerned(attempts: FailedAttempts) -> None:
    guess(attempts, "192.0.2.1", 10)
    attempts.check("192.0.2.2", "key")


def test_proven_caller_behind_the_same_address_is_let_through(attempts: FailedAttempts) -> None:
    attempts.succeeded("192.0.2.1", "alice's key")
    guess(attempts, "192.0.2.1", 10)
    attempts.check("192.0.2.1", "alice's key")
    with pytest.raises(TooManyAttemptsError):
        attempts.check("192.0.2.1", "alice's kez")


def test_proof_is_of_one_address(attempts: FailedAttempts) -> None:
    attempts.succeeded("192.0.2.2", "alice's key")
    guess(attempts, "192.0.2.1", 10)
    with pytest.raises(TooManyAttemptsError):
        attempts.check("192.0.2.1", "alice's key")


def test_revoked_key_is_no_proof(attempts: FailedAttempts) -> None:
    attempts.succeeded("192.0.2.1", "revoked")
    attempts.failed("192.0.2.1", "revoked")
    guess(attempts, "192.0.2.1", 10)
    with pytest.raises(TooManyAttemptsError):
        attempts.check("192.0.2.1", "revoked")


def test_ipv6_sites_count_as_one(attempts: FailedAttempts) -> None:
    assert sum(guess(attempts, f"2001:db8:0:1::{index:x}", 1) for index in range(1, 50)) == 5
    assert guess(attempts, "2001:db8:0:2::1", 1) == 1


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("/run/inferflux.sock", "/run/inferflux.sock"),
    ],
)
def test_source_of(address: str, source: str) -> None:
    assert source_of(address) == source


def test_tables_are_bounded(attempts: FailedAttempts) -> None:
    for index in range(1000):
        attempts.failed(f"198.51.{index // 256}.{index % 256}", "x")
    assert len(attempts._failures) == 100


def test_proof_used_lately_is_kept_longest(attempts: FailedAttempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferflux.server.access.attempts.MAX_PROVEN", 2)
    for key in ("alice's key", "bob's key", "alice's key", "carol's key"):
        attempts.succeeded("192.0.2.1", key)
    guess(attempts, "192.0.2.1", 10)
    attempts.check("192.0.2.1", "alice's key")
    attempts.check("192.0.2.1", "carol's key")
    with pytest.raises(TooManyAttemptsError):
        attempts.check("192.0.2.1", "bob's key")


def test_memory_holds_no_token(attempts: FailedAttempts) -> None:
    attempts.succeeded("192.0.2.1", "canary-token")
    assert "canary" not in repr(vars(attempts))
