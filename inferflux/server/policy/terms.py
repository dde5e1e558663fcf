"""Blocklist terms: how an operator writes them, and what each matches.

`some phrase` or `word:some phrase` stands alone: no letter or digit touches it. In scripts written without spaces
between words there is nothing to stand apart from, and it matches anywhere. `contains:some phrase` also matches
inside longer words. Spelling is folded (see `folding`); white space in a term is any white space in a text.
Knows no matching.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from inferflux.errors import RequestError
from inferflux.server.policy.folding import Folding, is_extender, is_word

# The automaton of a blocklist this large takes about 50 MB and a second to make.
MAX_TOTAL_CHARS: Final = 250_000
_CONTAINS: Final = "contains:"
_WORD: Final = "word:"


class Term(NamedTuple):
    """text: folded. starts_word, ends_word: no letter or digit may stand before it, after it."""

    text: str
    starts_word: bool
    ends_word: bool


def parse_terms(written: Iterable[str], folding: Folding) -> frozenset[Term]:
    """Returns the terms, each once. Raises RequestError naming the place of a term that cannot match any text, or when
    they are too long together."""
    terms = frozenset(_parse(text, index, folding) for index, text in enumerate(written))
    total = sum(len(term.text) for term in terms)
    if total > MAX_TOTAL_CHARS:
        message = f"blocklist: must have at most {MAX_TOTAL_CHARS} characters in all (got {total})"
        raise RequestError(message, param="blocklist")
    return terms


def _parse(written: str, index: int, folding: Folding) -> Term:
    contains = written.startswith(_CONTAINS)
    text = folding.fold(written.removeprefix(_CONTAINS) if contains else written.removeprefix(_WORD)).strip(" ")
    while text and is_extender(text[0]):
        text = text[1:]
    if not text:
        place = f"blocklist[{index}]"
        raise RequestError(f"{place}: must have at least one visible character", param=place)
    return Term(text, is_word(text[0]) and not contains, is_word(text[-1]) and not contains)
