"""Grammars: an engine's compiled grammars, each compiled once and off the engine's thread.

One that a request holds, from when it is compiled for it until the request ends, is never given up: a request that
waits, or starts again after a preemption, finds it. What nobody holds is kept for a while.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from llguidance import LLMatcher

from inferflux.engine.structured.compiling import compile_grammar
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.sampling_params import Grammar

# Different grammars held at once; who would hold one more waits until one is let go. A schema of 10 fields takes
# 0.2 MB, one of 40 fields 0.35 MB, over a vocabulary of 4096.
MAX_HELD: Final = 512
# Different grammars kept besides.
MAX_KEPT: Final = 64


class Grammars:
    """The grammars of one model. `load`: makes the vocabulary, when the first grammar needs it.

    No call waits for the compiling of a grammar but its own. `prepare` and `release` are called by one thread.
    """

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        self._load = load
        self._vocabulary: Vocabulary | None = None
        # By request: what is still to be compiled for it, in order, and what it holds.
        self._due: dict[int, tuple[Grammar, Future[LLMatcher]]] = {}
        self._holds: dict[int, Grammar] = {}
        self._num_holders: Counter[Grammar] = Counter()
        self._held: dict[Grammar, LLMatcher] = {}
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        # For looking and noting down; never held while something is compiled.
        self._turn = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    def prepare(self, request_id: int, grammar: Grammar) -> Future[LLMatcher]:
        """Compiles the grammar in a thread, behind those asked for before, for a request that holds it from then on;
        the future raises RequestError when that cannot be done. Cancelled before its turn, it costs nothing."""
        prepared: Future[LLMatcher] = Future()
        self._due[request_id] = grammar, prepared
        self._start_due()
        return prepared

    def release(self, request_ids: Iterable[int]) -> None:
        """These requests hold and want nothing any more; those that never did are ignored."""
        for request_id in request_ids:
            self._due.pop(request_id, None)
            grammar = self._holds.pop(request_id, None)
            if grammar is not None:
                with self._turn:
                    self._let_go(grammar)
        self._start_due()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """Returns a matcher of the caller's own at the grammar's start: at once when a request holds it.

        Raises RequestError as `prepare`'s future does.
        """
        return self._find(grammar).deep_copy()

    def _start_due(self) -> None:
        while self._due:
            request_id, (grammar, prepared) = next(iter(self._due.items()))
            with self._turn:
                if grammar not in self._num_holders and len(self._num_holders) >= MAX_HELD:
                    return
                self._num_holders[grammar] += 1
                if grammar in self._kept:
                    self._held[grammar] = self._kept.pop(grammar)
            del self._due[request_id]
            self._holds[request_id] = grammar
            self._pool.submit(self._fulfil, grammar, prepared)

    def _fulfil(self, grammar: Grammar, prepared: Future[LLMatcher]) -> None:
        if not prepared.set_running_or_notify_cancel():
            return
        try:
            prepared.set_result(self._find(grammar))
        except BaseException as error:
            prepared.set_exception(error)

    def _find(self, grammar: Grammar) -> LLMatcher:
        with self._turn:
            compiled = self._held.get(grammar, self._kept.get(grammar))
        if compiled is not None:
            return compiled
        if self._vocabulary is None:
            self._vocabulary = self._load()
        compiled = compile_grammar(self._vocabulary, grammar)
        with self._turn:
            self._keep(grammar, compiled)
        return compiled

    def _let_go(self, grammar: Grammar) -> None:
        self._num_holders[grammar] -= 1
        if not self._num_holders[grammar]:
            del self._num_holders[grammar]
            compiled = self._held.pop(grammar, None)
            if compiled is not None:
                self._keep(grammar, compiled)

    def _keep(self, grammar: Grammar, compiled: LLMatcher) -> None:
        if grammar in self._num_holders:
            self._held[grammar] = compiled
            return
        self._kept[grammar] = compiled
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
