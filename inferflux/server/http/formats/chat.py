"""Choices in the words of POST /v1/chat/completions."""

from collections.abc import Iterable, Sequence
from typing import cast

import msgspec
from msgspec import UNSET

from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextDelta, Tokenizer
from inferflux.server.backends import Backend
from inferflux.server.generation import Choice
from inferflux.server.http.chat_plan import ChatPlan, Thoughts
from inferflux.server.http.formats.envelope import Envelope
from inferflux.server.http.formats.logprobs import finite
from inferflux.server.http.formats.reading import Blocks, Reading
from inferflux.server.http.schemas.chat import (
    CHUNK_OBJECT,
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    TokenLogprob,
    TopLogprob,
)
from inferflux.server.http.schemas.generate import FinishReason


class ChatFormat:
    """See `envelope.Format`. Answers that may hold thoughts or calls are taken apart, each by a Reading of its own."""

    def __init__(
        self,
        body: ChatRequest,
        backend: Backend,
        model: str,
        plan: ChatPlan,
        thoughts: Thoughts,
        blocks: Blocks | None,
    ) -> None:
        n, include_usage = body.n or 1, body.include_usage
        self._envelope = Envelope("chatcmpl", CHUNK_OBJECT, backend, model, n=n, include_usage=include_usage)
        self._tokenizer = backend.text.tokenizer
        self._with_token_ids = bool(body.return_token_ids)
        self._plan = plan
        self._thoughts = thoughts
        self._vet = blocks
        self._opened: set[int] = set()
        self._readings: dict[int, Reading] = {}
        self._kept: dict[int, tuple[list[int], list[TokenLogprobs]]] = {}

    def blocks(self, choice: Choice) -> bool:
        return choice.index in self._readings and self._readings[choice.index].blocked

    def answer(self, choices: Sequence[Choice]) -> bytes:
        whole = [self._whole(choice) for choice in choices]
        return msgspec.json.encode(ChatCompletion(choices=whole, **self._envelope.fields(choices)))

    def events(self, choice: Choice, delta: TextDelta) -> bytes:
        said, finish_reason = self._said(choice, delta)
        token_ids, logprobs = self._tokens(choice, delta)
        tokens_shown = token_ids and (self._with_token_ids or logprobs is not None)
        if not (said or finish_reason or tokens_shown):
            return b""
        chunk = ChunkChoice(
            index=choice.index,
            delta=said or (Delta() if finish_reason or self._plan.reads else Delta(content="")),
            logprobs=self._logprobs(logprobs),
            finish_reason=cast("FinishReason | None", finish_reason),
            token_ids=token_ids if self._with_token_ids else UNSET,
        )
        return self._opening(choice.index) + self._envelope.chunk(chunk)

    def ending(self, choices: Sequence[Choice]) -> bytes:
        return self._envelope.ending(choices)

    def _said(self, choice: Choice, delta: TextDelta) -> tuple[Delta | None, str | None]:
        """Returns what the delta adds to the message, and how the choice ended if it has."""
        if not self._plan.reads:
            return Delta(content=delta.text) if delta.text else None, delta.finish_reason
        reading = self._reading(choice)
        said = reading.delta(delta.text, last=delta.finish_reason is not None)
        return said, reading.finish_reason(delta.finish_reason)

    def _tokens(self, choice: Choice, delta: TextDelta) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Returns the tokens that may leave: no earlier than the call they spell, when that is kept back."""
        if self._vet is None or self._plan.tools is None:
            return delta.token_ids, delta.logprobs
        token_ids, logprobs = self._kept.setdefault(choice.index, ([], []))
        token_ids += delta.token_ids
        logprobs += delta.logprobs or ()
        if self._reading(choice).holds:
            return [], None if delta.logprobs is None else []
        del self._kept[choice.index]
        return token_ids, None if delta.logprobs is None else logprobs

    def _reading(self, choice: Choice) -> Reading:
        if choice.index not in self._readings:
            tools = self._plan.tools
            make_id = None if tools is None else tools.make_id
            self._readings[choice.index] = Reading(self._plan.reader(self._thoughts), make_id, self._vet)
        return self._readings[choice.index]

    def _opening(self, index: int) -> bytes:
        """Each choice's first chunk names the role and says nothing yet."""
        if index in self._opened:
            return b""
        self._opened.add(index)
        content = UNSET if self._plan.reads else ""
        return self._envelope.chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content=content)))

    def _whole(self, choice: Choice) -> ChatChoice:
        message, reason = AnswerMessage(choice.stream.text), choice.finish_reason
        if self._plan.reads:
            reading = self._reading(choice)
            message = reading.message(choice.stream.text)
            reason = reading.finish_reason(reason)
        return ChatChoice(
            index=choice.index,
            message=message,
            logprobs=self._logprobs(choice.stream.logprobs),
            finish_reason=cast("FinishReason | None", reason),
            token_ids=choice.stream.token_ids if self._with_token_ids else UNSET,
        )

    def _logprobs(self, entries: Iterable[TokenLogprobs] | None) -> ChoiceLogprobs | None:
        return None if entries is None else ChoiceLogprobs([_entry(self._tokenizer, entry) for entry in entries])


def _entry(tokenizer: Tokenizer, entry: TokenLogprobs) -> TokenLogprob:
    data = tokenizer.token_bytes(entry.token_id)
    top = [_top(tokenizer, token_id, logprob) for token_id, logprob in entry.top]
    return TokenLogprob(data.decode("utf-8", "replace"), finite(entry.logprob), list(data), top)


def _top(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(data.decode("utf-8", "replace"), finite(logprob), list(data))
