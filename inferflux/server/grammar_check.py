"""GrammarCheck: whether a caller's grammar compiles, found out before the engine sees it. Knows no HTTP."""

import threading
from collections import OrderedDict
from typing import Final

from inferflux.engine.interface import ModelInfo
from inferflux.engine.structured.compiling import compile_grammar
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.engine.text import Tokenizer
from inferflux.sampling_params import Grammar

MAX_REMEMBERED: Final = 256


class GrammarCheck:
    """One model's. Remembers the grammars it has passed lately; any number of threads may ask."""

    def __init__(self, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self._tokenizer = tokenizer
        self._info = info
        self._vocabulary: Vocabulary | None = None
        self._passed: OrderedDict[Grammar, None] = OrderedDict()
        self._turn = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Takes up to a second. Raises RequestError, without a param, for a grammar that cannot be used."""
        with self._turn:
            if grammar in self._passed:
                self._passed.move_to_end(grammar)
                return
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._info.vocab_size, self._info.eos_token_ids)
        compile_grammar(self._vocabulary, grammar)
        with self._turn:
            self._passed[grammar] = None
            if len(self._passed) > MAX_REMEMBERED:
                self._passed.popitem(last=False)
