"""Compiling a grammar within limits: the same on the server, which refuses bad ones, and in the engine, which runs
them. A grammar that passes here costs bounded memory and time; what it may cost at each step is bounded too."""

from typing import Final

from llguidance import LLMatcher, LLParserLimits

from inferflux.engine.structured.grammar import library_text
from inferflux.engine.structured.library import shielded
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.errors import RequestError
from inferflux.sampling_params import MAX_GRAMMAR_CHARS, Grammar

MAX_ERROR_CHARS: Final = 300
_SILENT: Final = 0


def compile_grammar(vocabulary: Vocabulary, grammar: Grammar) -> LLMatcher:
    """Returns a matcher at the grammar's start. Takes up to a few hundred milliseconds; other threads run meanwhile.

    Raises RequestError, without a param, saying what is wrong with the grammar.
    """
    return shielded(_compile, vocabulary, grammar)


def _compile(vocabulary: Vocabulary, grammar: Grammar) -> LLMatcher:
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise RequestError(f"must have at most {MAX_GRAMMAR_CHARS} characters")
    limits = _limits()
    text = library_text(grammar, vocabulary.markers)
    matcher = LLMatcher(vocabulary.library, text, log_level=_SILENT, limits=limits)
    if not matcher.is_error():
        # Some faults, and whether anything can be said at all, show only with the first mask.
        mask = matcher.compute_bitmask()
        if not matcher.is_error() and not any(mask):
            raise RequestError("allows no answer at all")
    if matcher.is_error():
        raise RequestError(error_words(matcher))
    return matcher


def _limits() -> LLParserLimits:
    """A fifth of a second to build, a few milliseconds for a mask: a request beyond that fails, and no other."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def error_words(matcher: LLMatcher) -> str:
    """The library's message on one line, with what it says of its own inside left out."""
    line = " ".join(matcher.get_error().split())
    return line[:MAX_ERROR_CHARS] or "cannot be compiled"
