"""DeltaGuard: the output guard for an answer made of tokens. Tokens and log-probabilities tell as much as text does, so
they leave no earlier than the text they stand for. What else a token could have been may be a blocked term, too."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextDelta
from inferflux.server.policy.output_guard import OutputGuard

BLOCKED_FINISH_REASON: Final = "content_filter"


class _Waiting(NamedTuple):
    """Tokens that may leave when `end` characters of the text have left; None: when the next text after them has."""

    end: int | None
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]


class DeltaGuard:
    """One sequence's guard. Feed it the deltas of its TextStream in order; what it returns may be sent.

    After the delta whose finish_reason is `content_filter` the caller stops the sequence and sends nothing more of it.
    blocked: that has happened. is_in: whether a text by itself contains a term.
    """

    def __init__(self, guard: OutputGuard, is_in: Callable[[str], bool]) -> None:
        self._guard = guard
        self._is_in = is_in
        self._waiting: deque[_Waiting] = deque()
        self._num_fed = 0
        self.blocked = False

    def feed(self, delta: TextDelta) -> TextDelta:
        """Returns what may be sent now that this delta has come."""
        self._note(delta)
        text, self.blocked = self._guard.feed(delta.text)
        if delta.finish_reason is not None and not self.blocked:
            rest, self.blocked = self._guard.finish()
            text += rest
        finish_reason = BLOCKED_FINISH_REASON if self.blocked else delta.finish_reason
        released = self._release(everything=finish_reason is not None and not self.blocked)
        token_ids = [token_id for waiting in released for token_id in waiting.token_ids]
        logprobs = [entry for waiting in released for entry in waiting.logprobs]
        stop_reason = None if self.blocked else delta.stop_reason
        return TextDelta(text, token_ids, None if delta.logprobs is None else logprobs, finish_reason, stop_reason)

    def vet(self, entries: Sequence[TokenLogprobs], text_of: Callable[[int], str]) -> list[TokenLogprobs]:
        """Returns the entries without the alternatives that by themselves contain a term. The token that was chosen may
        stay: it is part of the text.

        A term of several tokens is not looked for: no alternative says it, and what would have followed is unknown.
        """
        texts = {token_id: text_of(token_id) for entry in entries for token_id, _ in entry.top}
        # All at once, which is quick; a term that reaches over a border costs no more than a closer look.
        if not self._is_in("\n".join(texts.values())):
            return list(entries)
        hidden = {token_id for token_id, text in texts.items() if self._is_in(text)}
        return [msgspec.structs.replace(entry, top=_shown(entry, hidden)) for entry in entries]

    def _note(self, delta: TextDelta) -> None:
        self._num_fed += len(delta.text)
        if delta.text:
            self._waiting = deque(
                entry if entry.end is not None else entry._replace(end=self._num_fed) for entry in self._waiting
            )
        if delta.token_ids:
            end = self._num_fed if delta.text else None
            self._waiting.append(_Waiting(end, delta.token_ids, delta.logprobs or ()))

    def _release(self, *, everything: bool) -> list[_Waiting]:
        num_sent = self._num_fed - self._guard.num_held
        released = []
        while self._waiting and (everything or _may_leave(self._waiting[0], num_sent)):
            released.append(self._waiting.popleft())
        return released


def _may_leave(waiting: _Waiting, num_sent: int) -> bool:
    return waiting.end is not None and waiting.end <= num_sent


def _shown(entry: TokenLogprobs, hidden: set[int]) -> list[tuple[int, float]]:
    return [
        (token_id, logprob) for token_id, logprob in entry.top if token_id == entry.token_id or token_id not in hidden
    ]
