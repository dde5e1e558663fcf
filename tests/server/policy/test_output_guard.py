"""Output guards: no part of a blocked term leaves, wherever the text is cut, and everything else does."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextDelta
from inferflux.server.policy.delta_guard import DeltaGuard
from inferflux.server.policy.guardrails import Blocklist
from inferflux.server.policy.output_guard import OutputGuard, Passed

BLOCKLIST = Blocklist(["bomb", "make a bomb", "bombay mix", "contains:zz", "c++", "爆弾", "straße"])
SPELLINGS = [
    "bomb", "BOMB", "ｂｏｍｂ", "b\u200bo\u0301mb", "make  a\nbomb", "Make a BOMB", "bombay mix", "zz", "fizzy", "c++",  # noqa: RUF001
    "爆弾", "straße", "STRASSE", "ﬆrasse", "bombay", "bomber", "make a", "c+", "ﬁ", "\u0301", " ", ".", "\u200b", "z",
]  # fmt: skip


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def run(guard: OutputGuard, pieces: list[str]) -> Passed:
    out = ""
    for piece in pieces:
        text, blocked = guard.feed(piece)
        out += text
        if blocked:
            return Passed(out, True)
    text, blocked = guard.finish()
    return Passed(out + text, blocked)


@given(st.lists(st.sampled_from(SPELLINGS), max_size=8), st.lists(st.integers(0, 1000), max_size=30))
@settings(max_examples=500)
def test_any_cutting_lets_out_the_same(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    whole = run(BLOCKLIST.guard(), [text])
    assert run(BLOCKLIST.guard(), pieces_of(text, cuts)) == whole
    assert run(BLOCKLIST.guard(), list(text)) == whole
    assert whole.blocked == BLOCKLIST.is_in(text)
    assert text.startswith(whole.text)
    assert whole.blocked or whole.text == text
    # A term ends what is out only where, in the whole text, it is the beginning of a longer word.
    assert not BLOCKLIST.is_in(whole.text + "x")


@given(
    st.lists(st.tuples(st.sampled_from([*'bomae 爆弾\n/"\\']), st.booleans()), max_size=16),
    st.lists(st.integers(0, 1000)),
)
@settings(max_examples=500)
def test_terms_are_found_behind_json_escapes(characters: list[tuple[str, bool]], cuts: list[int]) -> None:
    """As a JSON parser will read them, and as they stand; cut anywhere, in an escape too."""
    written = "".join(escaped(character) if hide else json.dumps(character)[1:-1] for character, hide in characters)
    written = f'{{"a": "{written}"}}'
    read = json.loads(written)["a"]
    whole = run(BLOCKLIST.guard(), [written])
    assert run(BLOCKLIST.guard(), pieces_of(written, cuts)) == whole
    assert whole.blocked == (BLOCKLIST.is_in(written) or BLOCKLIST.is_in(read))
    assert written.startswith(whole.text)
    assert whole.blocked or whole.text == written


def escaped(character: str) -> str:
    return f"\\u{ord(character):04X}"


@pytest.mark.parametrize(
    ("fed", "out", "blocked"),
    [
        ("a \\u0062", "a ", False),
        ("a \\u0062omb ", "a ", True),
        ("a b\\u006fmb.", "a ", True),
        ("a make\\u0020a\\nbomb.", "a ", True),
        ("a \\u00", "a ", False),
        ("a \\x", "a \\x", False),
        ("a \\u00e4 ", "a \\u00e4 ", False),
        ("a \\ud83d\\ude00", "a \\ud83d\\ude00", False),
        ("a \\ud83d", "a ", False),
        ("a \\ud83dbomb.", "a \\ud83d", True),
        ("a \\\\u0062omb.", "a \\\\u0062omb.", False),
        ("a \\\\\\u0062omb.", "a \\\\", True),
    ],
)
def test_what_looks_like_an_escape(fed: str, out: str, blocked: bool) -> None:
    assert run_open(BLOCKLIST.guard(), fed) == (out, blocked)


def run_open(guard: OutputGuard, text: str) -> Passed:
    """What comes out while the text may go on."""
    pieces = [guard.feed(character) for character in text]
    return Passed("".join(piece.text for piece in pieces), pieces[-1].blocked)


@given(st.text("bomak e", max_size=12), st.sampled_from(["bomb", "ＭＡＫＥ a bomb", "b\u200bomb"]), st.data())  # noqa: RUF001
def test_nothing_of_a_term_leaves(before: str, term: str, data: st.DataObject) -> None:
    """Not even its first character, and not even when the text breaks off in the term."""
    text = f"{before} {term}"
    cuts = data.draw(st.lists(st.integers(0, 1000), max_size=10))
    assert len(run(BLOCKLIST.guard(), pieces_of(text, cuts)).text) <= len(before) + 1
    guard = BLOCKLIST.guard()
    out = "".join(guard.feed(character).text for character in text[:-1])
    assert len(out) <= len(before) + 1


@pytest.mark.parametrize(
    ("fed", "out"),
    [("hello", "hello"), ("a bomb", "a "), ("a bo", "a "), ("turbo", "turbo"), ("a bombs", "a bombs"), ("x ma", "x ")],
)
def test_holds_back_only_what_may_begin_a_term(fed: str, out: str) -> None:
    assert BLOCKLIST.guard().feed(fed) == (out, False)


def test_a_term_at_the_very_end() -> None:
    guard = BLOCKLIST.guard()
    assert guard.feed("a bomb") == ("a ", False)
    assert guard.finish() == ("", True)
    assert guard.feed("more") == ("", True)
    assert guard.finish() == ("", True)


def test_what_is_held_comes_out_at_the_end() -> None:
    guard = BLOCKLIST.guard()
    assert guard.feed("make a bo") == ("", False)
    assert guard.num_held == 9
    assert guard.finish() == ("make a bo", False)
    assert guard.num_held == 0


def delta(text: str, *token_ids: int, finish_reason: str | None = None, logprobs: bool = False) -> TextDelta:
    entries = [TokenLogprobs(token_id, -0.5, 1, []) for token_id in token_ids] if logprobs else None
    return TextDelta(text, list(token_ids), entries, finish_reason)


def test_tokens_wait_for_their_text() -> None:
    guard = DeltaGuard(BLOCKLIST.guard(), BLOCKLIST.is_in)
    assert guard.feed(delta("hi", 1, logprobs=True)) == delta("hi", 1, logprobs=True)
    assert guard.feed(delta(" bo", 2, logprobs=True)) == delta(" ", logprobs=True)
    assert guard.feed(delta("at", 3, logprobs=True)) == delta("boat", 2, 3, logprobs=True)


def test_a_token_without_text_of_its_own_waits_for_the_next_text() -> None:
    guard = DeltaGuard(BLOCKLIST.guard(), BLOCKLIST.is_in)
    assert guard.feed(delta("", 1)) == delta("")
    assert guard.feed(delta("b", 2)) == delta("")
    assert guard.feed(delta("e", 3)) == delta("be", 1, 2, 3)
    assert guard.feed(delta("", 4, finish_reason="stop")) == delta("", 4, finish_reason="stop")


@pytest.mark.parametrize("ending", ["!", ""])
def test_a_blocked_answer_ends_with_content_filter(ending: str) -> None:
    guard = DeltaGuard(BLOCKLIST.guard(), BLOCKLIST.is_in)
    assert guard.feed(delta("a bo", 1)) == delta("a ")
    last = guard.feed(TextDelta("mb" + ending, [2], None, "stop", "x"))
    assert last == delta("", finish_reason="content_filter")
    assert guard.blocked


def test_the_end_lets_everything_out() -> None:
    guard = DeltaGuard(BLOCKLIST.guard(), BLOCKLIST.is_in)
    guard.feed(delta("make a", 1))
    assert guard.feed(delta(" b", 2, finish_reason="length")) == delta("make a b", 1, 2, finish_reason="length")
    assert not guard.blocked


WORDS = [" bomb", "bomb", " a", "er", " bombs", "fizzy", " make a", " bo", "mb", "\ufffd", "c++", "c", "++"]


def entry(chosen: str, *others: str) -> TokenLogprobs:
    top = [(WORDS.index(word), -float(place)) for place, word in enumerate((chosen, *others))]
    return TokenLogprobs(WORDS.index(chosen), 0.0, 1, top)


@pytest.mark.parametrize(
    ("shown", "others"),
    [
        ((" a", "er", " bombs"), (" a", "er", " bombs")),
        ((" a", " bombs"), (" bomb", " a", "bomb", " bombs", "fizzy")),
        ((" make a",), (" bomb", " make a")),
        ((" bo", "mb", "\ufffd", "c", "++"), (" bo", "mb", "\ufffd", "c", "c++", "++")),
        ((" bombs", " make a"), (" bombs", " make a")),
        ((), ()),
    ],
)
def test_no_alternative_is_a_term(shown: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Though each is likely, and the one that was chosen another."""
    guard = DeltaGuard(BLOCKLIST.guard(), BLOCKLIST.is_in)
    (vetted,) = guard.vet([entry("er", *others)], WORDS.__getitem__)
    assert [WORDS[token_id] for token_id, _ in vetted.top] == ["er", *shown]
    assert dict(vetted.top).items() <= dict(entry("er", *others).top).items()


@given(st.lists(st.sampled_from(SPELLINGS), max_size=8))
@settings(max_examples=500)
def test_each_alternative_counts_by_itself(words: list[str]) -> None:
    guard = DeltaGuard(BLOCKLIST.guard(), BLOCKLIST.is_in)
    (vetted,) = guard.vet([TokenLogprobs(-1, 0.0, 1, [(place, 0.0) for place in range(len(words))])], words.__getitem__)
    assert [words[place] for place, _ in vetted.top] == [word for word in words if not BLOCKLIST.is_in(word)]


def test_the_chosen_token_stays_among_the_likeliest() -> None:
    """What the text is in which it stands, the text's own guard has seen: " bomb" of " bomber" here."""
    guard = DeltaGuard(BLOCKLIST.guard(), BLOCKLIST.is_in)
    assert guard.vet([entry(" bomb", "bomb", " a")], WORDS.__getitem__) == [
        TokenLogprobs(WORDS.index(" bomb"), 0.0, 1, [(WORDS.index(" bomb"), 0.0), (WORDS.index(" a"), -2.0)])
    ]
