"""Grammars: an engine's compiled grammars, each compiled once and off the engine's thread."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from llguidance import LLMatcher

from inferflux.engine.structured.compiling import compile_grammar
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.sampling_params import Grammar

MAX_KEPT: Final = 64


class Grammars:
    """The latest MAX_KEPT grammars of one model. `load`: makes the vocabulary, when the first grammar needs it.

    No call waits for the compiling of a grammar but its own.
    """

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        self._load = load
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        # For looking and noting down; never held while something is compiled.
        self._turn = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def prepare(self, grammar: Grammar) -> Future[LLMatcher]:
        """Compiles the grammar in a thread, behind those asked for before; the future raises RequestError when that
        cannot be done. Cancelled before its turn, it costs nothing."""
        return self._pool.submit(self._find, grammar)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """Returns a matcher of the caller's own at the grammar's start: at once when `prepare` has been there.

        Raises RequestError as `prepare`'s future does.
        """
        return self._find(grammar).deep_copy()

    def _find(self, grammar: Grammar) -> LLMatcher:
        with self._turn:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return compiled
        if self._vocabulary is None:
            self._vocabulary = self._load()
        compiled = compile_grammar(self._vocabulary, grammar)
        with self._turn:
            self._compiled[grammar] = compiled
            if len(self._compiled) > MAX_KEPT:
                self._compiled.popitem(last=False)
        return compiled
