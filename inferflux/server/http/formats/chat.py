"""Choices in the words of POST /v1/chat/completions."""

from collections.abc import Iterable, Sequence
from typing import cast

import msgspec
from msgspec import UNSET

from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextDelta, Tokenizer
from inferflux.server.backends import Backend
from inferflux.server.generation import Choice
from inferflux.server.http.formats.envelope import Envelope
from inferflux.server.http.formats.logprobs import finite
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
    """See `envelope.Format`."""

    def __init__(self, body: ChatRequest, backend: Backend) -> None:
        self._envelope = Envelope("chatcmpl", CHUNK_OBJECT, backend, n=body.n or 1, include_usage=body.include_usage)
        self._tokenizer = backend.text.tokenizer
        self._with_token_ids = bool(body.return_token_ids)
        self._opened: set[int] = set()

    def answer(self, choices: Sequence[Choice]) -> bytes:
        whole = [self._whole(choice) for choice in choices]
        return msgspec.json.encode(ChatCompletion(choices=whole, **self._envelope.fields(choices)))

    def events(self, choice: Choice, delta: TextDelta) -> bytes:
        tokens_shown = delta.token_ids and (self._with_token_ids or delta.logprobs is not None)
        if not (delta.text or delta.finish_reason or tokens_shown):
            return b""
        news = ChunkChoice(
            index=choice.index,
            delta=Delta(content=delta.text) if delta.text or not delta.finish_reason else Delta(),
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=cast("FinishReason | None", delta.finish_reason),
            token_ids=delta.token_ids if self._with_token_ids else UNSET,
        )
        return self._opening(choice.index) + self._envelope.chunk(news)

    def ending(self, choices: Sequence[Choice]) -> bytes:
        return self._envelope.ending(choices)

    def _opening(self, index: int) -> bytes:
        """Each choice's first chunk names the role and says nothing yet."""
        if index in self._opened:
            return b""
        self._opened.add(index)
        return self._envelope.chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))

    def _whole(self, choice: Choice) -> ChatChoice:
        return ChatChoice(
            index=choice.index,
            message=AnswerMessage(choice.stream.text),
            logprobs=self._logprobs(choice.stream.logprobs),
            finish_reason=cast("FinishReason | None", choice.finish_reason),
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
