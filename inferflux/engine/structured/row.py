"""RowGrammar: where one request stands in its grammar. Advances with the tokens the request has taken on.

What went before a preemption is read again from the history, and what a prefix hit saved is prompt and none of its
business; so a grammar's place is a function of the output tokens alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from inferflux.engine.step import RowStart
from inferflux.engine.structured.compiling import error_words
from inferflux.engine.structured.grammars import Grammars
from inferflux.engine.structured.library import shielded
from inferflux.errors import RequestError

Bits = npt.NDArray[np.int32]
T = TypeVar("T")


class RowGrammar:
    """request_id: whose it is. error: why the grammar can tell no more; the request must end."""

    def __init__(self, start: RowStart, grammars: Grammars) -> None:
        assert start.sampling.grammar is not None
        self.request_id = start.request_id
        self.error: str | None = None
        self._length = start.num_prompt_tokens
        try:
            self._matcher = shielded(grammars.matcher, start.sampling.grammar)
        except RequestError as error:
            self.error = f"the grammar cannot be used: {error}"
        else:
            self.observe(self._length, start.history[self._length :])

    @classmethod
    def of(cls, start: RowStart, grammars: Grammars | None) -> "RowGrammar | None":
        """Returns the state of a row that has a grammar, else None."""
        return None if start.sampling.grammar is None or grammars is None else cls(start, grammars)

    def observe(self, start: int, token_ids: Sequence[int]) -> None:
        """Takes on those tokens at positions start, start + 1, ... that are output and new."""
        new = list(token_ids[max(0, self._length - start) :])
        self._length = max(self._length, start + len(token_ids))
        if new and self.error is None:
            self._ask(self._matcher.consume_tokens, new)

    def allowed(self, num_words: int) -> Bits:
        """Returns which tokens may come next: a bit for each, int32 [num_words]; none at all after an error."""
        words = np.zeros(num_words, np.int32)
        bits = self._ask(self._matcher.compute_bitmask) if self.error is None else None
        if bits is not None:
            found = np.frombuffer(bits, np.int32)[:num_words]
            words[: len(found)] = found
        return words

    def _ask(self, question: Callable[..., T], *args: Any) -> T | None:
        """Returns the matcher's answer; None, and `error` is set, when it has none."""
        try:
            answer = shielded(question, *args)
        except RequestError as error:
            self.error = f"the grammar failed: {error}"
            return None
        if self._matcher.is_error():
            self.error = f"the grammar failed: {error_words(self._matcher)}"
            return None
        return answer
