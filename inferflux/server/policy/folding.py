"""Folding: how two spellings of one text become the same text, so that a blocklist cannot be dodged by spelling.

Unicode NFKC and case folding, and beyond them: accents and other marks set on letters, zero-width and format
characters and control characters go, every run of white space is one space. Compatibility characters are taken apart
(NFKD) rather than put together, so each character folds by itself wherever a text is cut; two texts that are equal
under NFKC and casefold stay equal, the iota subscript (dropped as a mark) aside. Letters that merely look alike
(Latin a, its Cyrillic twin) stay different. Unicode Standard Annex #15, and section 3.13 of the standard.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Final

# A text this long takes a few milliseconds, in which no other thread runs.
_PIECE: Final = 32_768
# Bounds the tables: a caller may send every character there is.
_MAX_CACHED: Final = 32_768
# Stands before each mark until it is known what the mark is set on. A folded text holds no control characters.
_MARK: Final = "\x01"
# No mark that is kept belongs on the scripts before Hebrew (Latin, Greek, Cyrillic, Armenian), on a sign, or nowhere.
_STRAY_MARKS: Final = re.compile(f"(?:\\A|(?<=[\x20-\u058f]))(?:{_MARK}.)+")
_SPACES: Final = re.compile("  +")

# Marks with these combining classes are part of how a word is spelt: nukta, kana voicing, virama, vowels and tones of
# Thai, Lao, Tibetan, Telugu; so are most of class 0. All others (accents, points, cantillation) are dropped.
_SPELLING_CLASSES: Final = frozenset((0, 7, 8, 9, 84, 91, 103, 107, 118, 122, 129, 130, 132))
_IGNORABLE_MARKS: Final = (
    (0x034F, 0x034F), (0x17B4, 0x17B5), (0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF),
)  # fmt: skip
_FILLERS: Final = frozenset("\u115f\u1160\u3164\uffa0")
# Not white space to Unicode, yet it looks like nothing else.
_BLANK_BRAILLE: Final = "\u2800"
# Scripts written without spaces between words (or, Korean, with particles joined on): words have no borders there.
_UNSPACED: Final = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1100, 0x11FF), (0x1780, 0x17FF), (0x1950, 0x19FF), (0x1A20, 0x1AAF),
    (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3040, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA960, 0xA97F),
    (0xAA60, 0xAADF), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
# Korean vowels and final consonants when a syllable is taken apart: they go on with the syllable before them.
_SYLLABLE_PARTS: Final = ((0x1160, 0x11FF), (0xD7B0, 0xD7FF))


class Folding:
    """The fold. Remembers what each character became; one instance may be used by several threads."""

    def __init__(self) -> None:
        self._folded = _Table(_fold_character)
        self._words = _Table(_blank)
        self._raw_words = _Table(lambda character: "".join(map(_blank, _fold_character(character))))

    def fold(self, text: str) -> str:
        """Returns the folded text."""
        pieces, previous = [], ""
        for start in range(0, len(text), _PIECE):
            pieces.append(self._settle(text[start : start + _PIECE].translate(self._folded), previous))
            previous = pieces[-1][-1:] or previous
        return "".join(pieces)

    def fold_next(self, character: str, previous: str) -> str:
        """Returns what a character adds to a folded text that ends in `previous` (empty: nothing yet)."""
        folded = self._folded[ord(character)]
        if len(folded) == 1 and folded != " ":
            return folded
        return self._settle(folded, previous)

    def spaced_words(self, text: str) -> str:
        """Returns the folded text with a space for all that is no part of a word (see `is_word`)."""
        starts = range(0, len(text), _PIECE)
        words = "".join([text[start : start + _PIECE].translate(self._raw_words) for start in starts])
        return self.fold(text).translate(self._words) if _MARK in words else words

    def is_word(self, character: str) -> bool:
        """As the function of this name, faster."""
        return self._words[ord(character)] != " "

    def _settle(self, folded: str, previous: str) -> str:
        """Drops stray marks and repeated spaces, which depends on what stands before them."""
        if _MARK in folded:
            folded = _STRAY_MARKS.sub("", previous + folded)[len(previous) :].replace(_MARK, "")
        if "  " in folded or previous == " " == folded[:1]:
            folded = _SPACES.sub(" ", previous + folded)[len(previous) :]
        return folded


def is_word(character: str) -> bool:
    """Whether a folded character is part of a word that has borders: a letter, digit or mark of a spaced script."""
    return (character.isalnum() or _is_mark(character)) and not _is_in(character, _UNSPACED)


def is_extender(character: str) -> bool:
    """Whether a folded character goes on with the one before it, so that no match can end between the two."""
    return _is_mark(character) or _is_in(character, _SYLLABLE_PARTS)


class _Table(dict[int, str]):
    """What each character (by its code, as `str.translate` wants it) becomes."""

    def __init__(self, make: Callable[[str], str]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, code: int) -> str:
        made = self._make(chr(code))
        if len(self) < _MAX_CACHED:
            self[code] = made
        return made


def _blank(character: str) -> str:
    return character if character == _MARK or is_word(character) else " "


def _fold_character(character: str) -> str:
    if character == _BLANK_BRAILLE:
        return " "
    decomposed = "".join(filter(_counts, unicodedata.normalize("NFKD", character)))
    folded = filter(_counts, unicodedata.normalize("NFKD", decomposed.casefold()))
    return "".join(" " if part.isspace() else _MARK + part if _is_mark(part) else part for part in folded)


def _counts(character: str) -> bool:
    """Whether a character is more than decoration: no accent, no format or control character but white space."""
    category = unicodedata.category(character)
    if category in ("Mn", "Mc"):
        kept = unicodedata.combining(character) in _SPELLING_CLASSES
        return kept and not _is_in(character, _IGNORABLE_MARKS)
    return (category not in ("Me", "Cf", "Cc") or character.isspace()) and character not in _FILLERS


def _is_mark(character: str) -> bool:
    return not character.isascii() and unicodedata.category(character) in ("Mn", "Mc")


def _is_in(character: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    code = ord(character)
    return any(first <= code <= last for first, last in ranges)
