"""Token buckets: what they let through over any window, what changing a limit does, what they tell the caller."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux.server.access.bucket import Bucket
from inferflux.server.access.rate_limit import Limits, RateLimitedError, RateLimiter, Reservation


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> RateLimiter:
    return RateLimiter(clock)


def take(limiter: RateLimiter, count: int, limits: Limits, who: str = "alice") -> int:
    """Returns how many of `count` requests are let through."""
    passed = 0
    for _ in range(count):
        try:
            limiter.take_request(who, limits)
            passed += 1
        except RateLimitedError:
            pass
    return passed


def within_bound(spent: list[tuple[float, int]], capacity: int) -> bool:
    """Over every window between two events, at most capacity + rate * time is spent."""
    for first, (start, _) in enumerate(spent):
        total = 0
        for at, amount in spent[first:]:
            total += amount
            if total > capacity + (at - start) * capacity / 60 + 1e-5:
                return False
    return True


@settings(max_examples=100, deadline=None)
@given(
    limit=st.integers(1, 50),
    pauses=st.lists(st.one_of(st.just(0.0), st.floats(0, 90), st.floats(0, 1)), min_size=1, max_size=80),
)
def test_requests_over_any_window(limit: int, pauses: list[float]) -> None:
    clock = Clock()
    limiter = RateLimiter(clock)
    spent = []
    for pause in pauses:
        clock.now += pause
        if take(limiter, 1, Limits(requests_per_minute=limit)):
            spent.append((clock.now, 1))
    assert within_bound(spent, limit)


Action = tuple[str, float, int]
ACTIONS = st.tuples(st.sampled_from(["reserve", "spend", "close"]), st.floats(0, 40), st.integers(1, 150))


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(1, 100), actions=st.lists(ACTIONS, min_size=1, max_size=80))
def test_tokens_over_any_window(limit: int, actions: list[Action]) -> None:
    """Whatever is reserved, spent late or given back in between: what is spent stays within the bound."""
    clock = Clock()
    limiter = RateLimiter(clock)
    open_ones: list[tuple[Reservation, int]] = []
    spent = []
    for action, pause, amount in actions:
        clock.now += pause
        if action == "reserve":
            try:
                open_ones.append((limiter.reserve_tokens("alice", Limits(0, limit), amount), amount))
            except RateLimitedError:
                continue
        elif open_ones:
            reservation, left = open_ones.pop(amount % len(open_ones))
            if action == "close":
                reservation.close()
                continue
            used = min(left, amount)
            reservation.spend(used)
            spent.append((clock.now, used))
            open_ones.append((reservation, left - used))
    assert within_bound(spent, limit)


@given(limits=st.lists(st.integers(1, 100), min_size=1, max_size=30), pauses=st.lists(st.floats(0, 5), min_size=30))
def test_changing_limits_never_refills(limits: list[int], pauses: list[float]) -> None:
    """What is there at most grows by time at the limit that was in force."""
    bucket = Bucket(limits[0], 0.0)
    assert bucket.hold(limits[0])
    bucket.spend(limits[0], 0.0)
    now, earned, before = 0.0, 0.0, limits[0]
    for limit, pause in zip(limits, pauses, strict=False):
        now += pause
        earned += pause * before / 60
        bucket.advance(limit, now)
        assert bucket.allowance().remaining <= earned + 1e-5
        before = limit


def test_changing_a_limit_there_and_back_refills_nothing(limiter: RateLimiter) -> None:
    assert take(limiter, 20, Limits(10)) == 10
    for limit in (1000, 0, 1, 10, 1000):
        if limit:
            assert take(limiter, 1, Limits(limit)) == 0


def test_lowered_limit_holds_at_once(limiter: RateLimiter) -> None:
    take(limiter, 1, Limits(1000))
    assert take(limiter, 1000, Limits(5)) == 5


def test_principals_do_not_share(limiter: RateLimiter) -> None:
    assert take(limiter, 3, Limits(2), "alice") == 2
    assert take(limiter, 3, Limits(2), "bob") == 2


def test_no_limit(limiter: RateLimiter) -> None:
    assert limiter.take_request("alice", Limits()) is None
    with limiter.reserve_tokens("alice", Limits(), 10**9) as reservation:
        reservation.spend(10**9)
        assert reservation.allowance is None


def test_waiting_as_long_as_told_helps(limiter: RateLimiter, clock: Clock) -> None:
    take(limiter, 7, Limits(7))
    with pytest.raises(RateLimitedError) as caught:
        limiter.take_request("alice", Limits(7))
    assert caught.value.retry_after_s == math.ceil(60 / 7)
    clock.now += caught.value.retry_after_s
    assert take(limiter, 2, Limits(7)) == 1


def test_unit_is_there_after_exactly_its_time(limiter: RateLimiter, clock: Clock) -> None:
    """Sums of floats come out a hair short; nobody should be turned away for that."""
    take(limiter, 60, Limits(60))
    for _ in range(1000):
        clock.now += 1.0
        assert take(limiter, 1, Limits(60)) == 1


def test_what_headers_need(limiter: RateLimiter, clock: Clock) -> None:
    allowance = limiter.take_request("alice", Limits(60))
    assert allowance is not None
    assert (allowance.limit, allowance.remaining, allowance.reset_s) == (60, 59, pytest.approx(1.0))
    take(limiter, 100, Limits(60))
    with pytest.raises(RateLimitedError) as caught:
        limiter.take_request("alice", Limits(60))
    assert (caught.value.kind, caught.value.allowance.remaining, caught.value.retry_after_s) == ("requests", 0, 1)
    assert caught.value.allowance.reset_s == pytest.approx(60.0)


def test_tokens_are_reserved_and_the_rest_given_back(limiter: RateLimiter) -> None:
    limits = Limits(tokens_per_minute=100)
    with limiter.reserve_tokens("alice", limits, 80) as reservation:
        with pytest.raises(RateLimitedError, match="100 tokens a minute, and this request needs up to 21"):
            limiter.reserve_tokens("alice", limits, 21)
        reservation.spend(10)
        reservation.spend(5)
    reservation.close()
    assert reservation.allowance is not None
    assert reservation.allowance.remaining == 20
    assert limiter.reserve_tokens("alice", limits, 85).allowance == (100, 0, pytest.approx(60.0))


def test_full_bucket_gains_nothing_from_what_is_spent_later(limiter: RateLimiter, clock: Clock) -> None:
    """The minute that a request took must not count as time to refill what it used at its end."""
    limits = Limits(tokens_per_minute=100)
    with limiter.reserve_tokens("alice", limits, 40) as reservation:
        clock.now += 60
        reservation.spend(40)
    with pytest.raises(RateLimitedError):
        limiter.reserve_tokens("alice", limits, 61)
    assert limiter.reserve_tokens("alice", limits, 60)


def test_failed_request_gives_its_tokens_back(limiter: RateLimiter) -> None:
    limits = Limits(tokens_per_minute=100)
    with pytest.raises(ZeroDivisionError), limiter.reserve_tokens("alice", limits, 100):
        raise ZeroDivisionError
    limiter.reserve_tokens("alice", limits, 100)


def test_request_that_can_never_pass_says_so(limiter: RateLimiter) -> None:
    with pytest.raises(RateLimitedError, match="smaller max_tokens") as caught:
        limiter.reserve_tokens("alice", Limits(tokens_per_minute=10), 10_000)
    assert caught.value.retry_after_s == 120
    assert limiter.reserve_tokens("alice", Limits(tokens_per_minute=10), 10)


def test_clock_that_goes_back_refills_nothing(limiter: RateLimiter, clock: Clock) -> None:
    take(limiter, 5, Limits(5))
    clock.now -= 500
    assert take(limiter, 1, Limits(5)) == 0
    clock.now += 500
    assert take(limiter, 1, Limits(5)) == 0


def test_number_of_buckets_is_bounded(clock: Clock) -> None:
    limiter = RateLimiter(clock, max_principals=10)
    take(limiter, 5, Limits(5), "alice")
    for index in range(100):
        take(limiter, 1, Limits(5), f"stranger {index}")
        assert take(limiter, 1, Limits(5), "alice") == 0, "who is active keeps their bucket"
    assert len(limiter._requests) == 10
