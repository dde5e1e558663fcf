"""Stop strings: the earliest match ends the text, nothing of it leaks, and how the text is cut makes no difference."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux.engine.text.stops import Automaton, StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    """Returns what came out piece by piece (the last from `finish`) and the stop string that was found."""
    matcher = StopMatcher(stops)
    released = []
    for piece in pieces:
        released.append(matcher.feed(piece))
        if matcher.matched is not None:
            return released, matcher.matched
    return [*released, matcher.finish()], None


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """The definition: the match that ends first; of those, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


alphabet = st.sampled_from("ab\n")
words = st.text(alphabet, min_size=1, max_size=5)


@settings(max_examples=500, deadline=None)
@given(stops=st.lists(words, min_size=1, max_size=4), pieces=st.lists(st.text(alphabet, max_size=4), max_size=12))
def test_any_text_in_any_pieces(stops: list[str], pieces: list[str]) -> None:
    released, matched = run(stops, pieces)
    assert ("".join(released), matched) == expected(stops, "".join(pieces))


@settings(max_examples=300, deadline=None)
@given(stops=st.lists(words, min_size=1, max_size=4), pieces=st.lists(st.text(alphabet, max_size=4), max_size=12))
def test_no_more_is_held_back_than_may_begin_a_stop(stops: list[str], pieces: list[str]) -> None:
    matcher, fed, out = StopMatcher(stops), "", ""
    for piece in pieces:
        fed += piece
        out += matcher.feed(piece)
        if matcher.matched is not None:
            return
        ends = [fed[-size:] for size in range(1, len(fed) + 1)]
        longest = max((len(end) for end in ends if any(stop.startswith(end) for stop in stops)), default=0)
        assert out == fed[: len(fed) - longest]


@pytest.mark.parametrize(
    ("stops", "pieces", "released", "matched"),
    [
        (["\n\n"], ["one\n", "\n", "two"], ["one", ""], "\n\n"),
        (["User:"], ["Us", "eful"], ["", "Useful", ""], None),
        (["abcd", "c"], ["xabc", "d"], ["xab"], "c"),
        (["bc", "abc"], ["ab", "c"], ["", ""], "abc"),
        (["aab"], ["aa", "aab"], ["", "aa"], "aab"),
        (["x"], ["", "y"], ["", "y", ""], None),
        (["😀"], ["a😀b"], ["a"], "😀"),
    ],
)
def test_known_cases(stops: list[str], pieces: list[str], released: list[str], matched: str | None) -> None:
    assert run(stops, pieces) == (released, matched)


def test_a_match_that_ends_unarmed_is_text_and_one_that_ends_armed_is_not() -> None:
    matcher = StopMatcher(["END"])
    out = matcher.feed("END EN", armed=False)
    assert (out, matcher.matched) == ("END ", None)
    assert matcher.feed("D", armed=True) == ""
    assert matcher.matched == "END"


def test_the_worst_stop_strings_cost_little_per_character() -> None:
    """16 stop strings of 256 characters that all but match: a search per piece would take minutes."""
    stops = ["a" * 255 + chr(ord("b") + index) for index in range(16)]
    started = time.process_time()
    released, matched = run(stops, ["a" * 4] * 10_000)
    assert "".join(released) == "a" * 40_000
    assert matched is None
    assert time.process_time() - started < 2


def test_sequences_with_the_same_stops_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand prompts with a few kilobytes of stop strings held a server up for twenty seconds."""
    made = []
    link = Automaton._link
    monkeypatch.setattr(Automaton, "_link", lambda automaton: (made.append(automaton), link(automaton)))
    matchers = [StopMatcher(["shared", "by all"]) for _ in range(1024)]
    assert len(made) == 1
    assert [matcher.feed("a text by all") for matcher in matchers] == ["a text "] * 1024
    assert {matcher.matched for matcher in matchers} == {"by all"}
