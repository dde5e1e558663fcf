"""The blocklist: what a term matches, however it is spelt."""

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux.errors import RequestError
from inferflux.server.policy import guardrails
from inferflux.server.policy.folding import Folding
from inferflux.server.policy.guardrails import Blocklist, texts_of_parts
from inferflux.server.policy.terms import MAX_TOTAL_CHARS

FOLDING = Folding()
# Without bare marks, and without the iota subscript, which the fold drops and casefold makes a letter of.
CHARACTERS = st.characters(exclude_categories=["Cn", "Cs", "Co", "Mn", "Mc"]).filter(
    lambda character: "\u0345" not in unicodedata.normalize("NFD", character)
)

MATCHES = [
    ("bomb", "a bomb."),
    ("bomb", "BOMB"),
    ("BoMb", "bomb"),
    ("bomb", "ｂｏｍｂ"),  # noqa: RUF001
    ("bomb", "\U0001d41b\U0001d428\U0001d426\U0001d41b"),  # mathematical letters
    ("bomb", "b\u200bo\u2060m\ufeffb"),  # zero width
    ("bomb", "bo\u00admb"),  # soft hyphen
    ("bomb", "b\u0336o\u0336m\u0336b\u0336"),  # struck through
    ("bomb", "b\u20ddomb"),  # enclosed
    ("bomb", "bo\U000e0100mb"),  # variation selector
    ("bomb", "bo\u094dmb"),  # a mark of another script
    ("bomb", "\u0e48bomb"),  # and one set on nothing
    ("bomb", "bo\x00m\x1b\x7fb"),
    ("bomb", "\u202ebomb\u202c"),
    ("bomb", "bo\u0345mb"),
    ("bomb", "x_bomb_x"),
    ("bomb", "(bomb)"),
    ("file", "the ﬁle"),
    ("strasse", "STRASSE straße"),
    ("straße", "strasse"),
    ("café", "CAFE"),
    ("cafe", "cafe\u0301"),
    ("Δίκη", "ΔΊΚΗ"),
    ("τέλος", "ΤΈΛΟΣ"),
    ("make a bomb", "Make\u00a0 a\n\tbomb!"),
    ("make  a\nbomb", "make a bomb"),
    ("make a bomb", "make \u200b a bomb"),
    ("make a bomb", "make a a make a bomb"),
    ("word:bomb", "bomb"),
    ("contains:bomb", "bombastic carbomb"),
    ("contains:a b", "extra bold"),
    ("c++", "in C++20"),
    (".env", "prod.env"),
    ("$$$", "give me $$$$!"),
    ("爆弾", "彼は爆弾を作った"),
    ("爆弾", "x爆弾x"),
    ("폭탄", "폭탄을"),
    ("폭탄", unicodedata.normalize("NFD", "폭탄을")),
    ("ระเบิด", "ทำระเบิดเอง"),
    ("बम", "यह बम है"),
    ("क़", "\u0915\u093c"),  # composed and not
    ("ガス", "ｶﾞｽ"),
    ("12", "at 12."),
    ("make a bomb", "make\u2800a\u2800bomb"),
]

MISSES = [
    ("bomb", "bombastic"),
    ("bomb", "carbomb"),
    ("bomb", "bomb2"),
    ("bomb", "b omb"),
    ("bomb", "b-o-m-b"),
    ("bomb", ""),
    ("make a bomb", "make a bombast"),
    ("make a bomb", "remake a bomb"),
    ("make a bomb", "make, a bomb"),
    ("c++", "xc++"),
    ("बम", "बमबारी"),  # a longer word
    ("कम", "काम"),  # another vowel
    ("は", "ば"),  # another consonant
    ("contains:하", "한"),  # another syllable
    ("ด", "ดี"),  # another vowel
]


@pytest.mark.parametrize(("term", "text"), MATCHES)
def test_matches(term: str, text: str) -> None:
    assert Blocklist([term]).is_in(text)


@pytest.mark.parametrize(("term", "text"), MISSES)
def test_misses(term: str, text: str) -> None:
    assert not Blocklist([term]).is_in(text)


@pytest.mark.parametrize("term", ["", " \n", "\u200b", "contains:", "word: ", "\u0301", "\u094d"])
def test_refuses_a_term_that_could_match_nothing_or_everything(term: str) -> None:
    with pytest.raises(RequestError, match=r"blocklist\[1\]"):
        Blocklist(["sound", term])


def test_refuses_more_than_it_can_hold() -> None:
    with pytest.raises(RequestError, match=str(MAX_TOTAL_CHARS)):
        Blocklist(f"{index:0200}" for index in range(MAX_TOTAL_CHARS // 200 + 1))


def test_finds_a_term_anywhere_in_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guardrails, "_WINDOW", 16)
    monkeypatch.setattr("inferflux.server.policy.folding._PIECE", 8)
    blocklist = Blocklist(["blocked phrase", "longerthanawindow"])
    for offset in range(40):
        padding = "ab " * 13 + "x" * (offset % 3) + " "
        for term in ("BLOCKED  PHRASE", "longer\u0301than\u200bawindow"):
            assert blocklist.is_in(padding[:offset] + " " + term + " " + padding)
        assert not blocklist.is_in(padding[:offset] + " blocked phrases " + padding)


def test_an_empty_list_blocks_nothing() -> None:
    blocklist = Blocklist([])
    assert not blocklist
    assert not blocklist.is_in("anything")


def test_parts_are_checked_as_the_model_reads_them() -> None:
    blocklist = Blocklist(["bomb"])
    assert any(map(blocklist.is_in, texts_of_parts(["a bo", "mb"])))
    assert any(map(blocklist.is_in, texts_of_parts(["bomb", "astic"])))
    assert any(map(Blocklist(["make a bomb"]).is_in, texts_of_parts(["make a", "bomb"])))
    assert texts_of_parts(["one"]) == ["one"]


@given(st.text(), st.text())
@settings(max_examples=300)
def test_the_fold_does_not_depend_on_where_a_text_is_cut(first: str, second: str) -> None:
    folded = ""
    for character in first + second:
        folded += FOLDING.fold_next(character, folded[-1:])
    assert folded == FOLDING.fold(first + second)


@given(st.text(CHARACTERS))
@settings(max_examples=300)
def test_the_fold_goes_beyond_nfkc_and_casefold(text: str) -> None:
    """What is equal under them is equal under the fold; a fold of a fold changes nothing."""
    known = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    assert FOLDING.fold(known) == FOLDING.fold(text)
    assert FOLDING.fold(FOLDING.fold(text)) == FOLDING.fold(text)


@given(st.text(max_size=40))
def test_a_folded_text_holds_nothing_invisible(text: str) -> None:
    folded = FOLDING.fold(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2060\ufeff]|  ", folded)


@given(data=st.data())
@settings(max_examples=300)
def test_one_verdict_whichever_way_it_is_found(data: st.DataObject) -> None:
    """A search term by term and a walk through the text agree."""
    letters = st.text("abA +\u0301\u200b爆", min_size=1, max_size=4)
    prefixes = st.sampled_from(["", "", "contains:"])
    terms = data.draw(st.lists(st.builds(str.__add__, prefixes, letters), min_size=1, max_size=4))
    text = data.draw(st.text("abA +\u0301\u200b爆", max_size=20))
    try:
        blocklist = Blocklist(terms)
    except RequestError:
        return
    searched = blocklist.is_in(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guardrails, "_MAX_SEARCHES", -1)
        assert blocklist.is_in(text) == searched


def test_the_guide_says_how_terms_are_written() -> None:
    """Who does not know of `contains:` expects a term to be found within words, too."""
    guide = (Path(__file__).parents[3] / "docs" / "AdminGuide.md").read_text()
    assert all(f"`{written}`" in guide for written in ("bomb", "word:bomb", "contains:bomb"))
