"""Choices in the words of POST /v1/completions, echoed prompts included."""

from collections.abc import Sequence
from typing import cast

import msgspec
from msgspec import UNSET

from inferflux.engine.text import TextDelta
from inferflux.server.backends import Backend
from inferflux.server.generation import Choice
from inferflux.server.http.formats.envelope import Envelope
from inferflux.server.http.formats.logprobs import LogprobLists, join
from inferflux.server.http.schemas.completions import (
    OBJECT,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from inferflux.server.http.schemas.generate import FinishReason


class CompletionFormat:
    """See `envelope.Format`. prompts: as the request gave them; an echo says a text as it was, token ids decoded."""

    def __init__(
        self, body: CompletionRequest, prompts: Sequence[str | list[int]], backend: Backend, model: str
    ) -> None:
        self._n = body.n or 1
        self._candidates = body.num_candidates
        self._envelope = Envelope("cmpl", OBJECT, backend, model, n=self._candidates, include_usage=body.include_usage)
        self._tokenizer = backend.text.tokenizer
        self._prompts = prompts
        self._echo = bool(body.echo)
        self._with_logprobs = body.logprobs is not None
        self._with_token_ids = bool(body.return_token_ids)
        self._lists: dict[int, LogprobLists] = {}

    def blocks(self, choice: Choice) -> bool:
        return False  # its text is all there is, and the choice's own guard has seen that

    def answer(self, choices: Sequence[Choice]) -> bytes:
        whole = [self._whole(choice, index) for index, choice in enumerate(self._best(choices))]
        return msgspec.json.encode(Completion(choices=whole, **self._envelope.fields(choices)))

    def events(self, choice: Choice, delta: TextDelta) -> bytes:
        tokens_shown = delta.token_ids and (self._with_token_ids or self._with_logprobs)
        if not (delta.text or delta.finish_reason or tokens_shown):
            return b""
        opening = self._opening(choice)
        return opening + self._envelope.chunk(
            CompletionChoice(
                text=delta.text,
                index=choice.index,
                logprobs=self._output_logprobs(choice, delta),
                finish_reason=cast("FinishReason | None", delta.finish_reason),
                token_ids=delta.token_ids if self._with_token_ids else UNSET,
            )
        )

    def ending(self, choices: Sequence[Choice]) -> bytes:
        return self._envelope.ending(choices)

    def _opening(self, choice: Choice) -> bytes:
        """With echo, the chunk that repeats the prompt comes before a choice's first delta."""
        if not self._echo or choice.index in self._lists:
            return b""
        text, logprobs = self._echoed(choice)
        token_ids: list[int] | msgspec.UnsetType = [] if self._with_token_ids else UNSET
        return self._envelope.chunk(
            CompletionChoice(text=text, index=choice.index, logprobs=logprobs, token_ids=token_ids)
        )

    def _best(self, choices: Sequence[Choice]) -> list[Choice]:
        """Returns of each prompt's choices the `n` whose tokens are likeliest on average."""
        if self._candidates == self._n:
            return list(choices)
        prompts = (choices[start : start + self._candidates] for start in range(0, len(choices), self._candidates))
        return [one for made in prompts for one in sorted(made, key=_mean_logprob, reverse=True)[: self._n]]

    def _whole(self, choice: Choice, index: int) -> CompletionChoice:
        stream = choice.stream
        text, logprobs = self._echoed(choice) if self._echo else ("", None)
        output = self._output_logprobs(choice, TextDelta(stream.text, stream.token_ids, stream.logprobs))
        return CompletionChoice(
            text=text + stream.text,
            index=index,
            logprobs=join(logprobs, output) if logprobs and output else output or logprobs,
            finish_reason=cast("FinishReason | None", choice.finish_reason),
            token_ids=stream.token_ids if self._with_token_ids else UNSET,
        )

    def _echoed(self, choice: Choice) -> tuple[str, CompletionLogprobs | None]:
        prompt = self._prompts[choice.index // self._candidates]
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, skip_special_tokens=True)
        lists = self._lists_of(choice)
        if not self._with_logprobs:
            return text, None
        return text, lists.prompt(choice.prompt_logprobs, text)

    def _output_logprobs(self, choice: Choice, delta: TextDelta) -> CompletionLogprobs | None:
        if delta.logprobs is None or not self._with_logprobs:
            return None
        return self._lists_of(choice).output(delta.logprobs)

    def _lists_of(self, choice: Choice) -> LogprobLists:
        if choice.index not in self._lists:
            self._lists[choice.index] = LogprobLists(self._tokenizer, choice.job.prompt_token_ids)
        return self._lists[choice.index]


def _mean_logprob(choice: Choice) -> float:
    entries = choice.stream.logprobs or ()
    return sum(entry.logprob for entry in entries) / max(1, len(entries))
