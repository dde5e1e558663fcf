"""From token ids to streams of text: one Job per prompt, one Choice per sequence that runs for it.

Turns the engine's outputs into text deltas and counts them. Knows engines, text and metrics; no HTTP and no API shapes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import msgspec

from inferflux.engine import request_checks
from inferflux.engine.interface import ModelInfo, Output
from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextDelta, TextStream
from inferflux.errors import RequestError
from inferflux.sampling_params import SamplingParams
from inferflux.server.access.principal import Principal
from inferflux.server.backends import Backend
from inferflux.server.metrics import ModelMetrics
from inferflux.server.policy.delta_guard import DeltaGuard

# Looking at each of so many takes a few milliseconds at most; more take a thread.
INLINE_ALTERNATIVES = 1024


@dataclass(frozen=True, slots=True)
class Job:
    """What to run for one prompt. counts_prompt: whether it is the one of its prompt's choices that the
    prompt's tokens are counted with. shown: special tokens whose text is wanted. adapter: the model's that computes it;
    None: the model as it is."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int
    tenant: str
    salt: bytes
    counts_prompt: bool = True
    shown: frozenset[int] = frozenset()
    adapter: str | None = None

    @property
    def max_tokens(self) -> int:
        """The most tokens the engine may generate for it."""
        assert self.sampling.max_tokens is not None, "fit_max_tokens has seen to it"
        return self.sampling.max_tokens

    def choices(self) -> list["Job"]:
        """Returns a job per choice of `sampling.n`, each with a noise of its own."""
        return [
            replace(self, sampling=self.sampling.for_choice(index), counts_prompt=index == 0)
            for index in range(self.sampling.n)
        ]


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a job runs: the principal, and what the request asks for within the principal's rights. adapter:
    see `Job`."""

    principal: Principal
    priority: int | None
    cache_salt: str | None
    adapter: str | None = None

    def job(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        shown: frozenset[int] = frozenset(),
    ) -> Job:
        principal = self.principal
        return Job(
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            priority=min(self.priority or 0, principal.max_priority),
            tenant=principal.tenant,
            salt=principal.cache_salt(self.cache_salt),
            shown=shown,
            adapter=self.adapter,
        )


@dataclass(frozen=True, slots=True)
class Watch:
    """What a request's times are measured against. started: its `time.monotonic()`; waited_s: for a place in the
    server."""

    metrics: ModelMetrics
    started: float
    waited_s: float


@dataclass(slots=True)
class Times:
    """When a sequence was where, as `time.monotonic()`; None: it did not come so far. waited_s: for a place in the
    server, before `submitted`."""

    submitted: float
    waited_s: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Choice:
    """One sequence: its deltas as they come, and afterwards all it led to.

    index: its place in the answer. stream: text, token ids and log-probabilities so far. prompt_logprobs: one entry
    per prompt token after the first, when asked for. vector: what a pooled prompt became. guard: what holds text back
    and may end it. times: when it was where.
    """

    def __init__(self, index: int, job: Job, backend: Backend, watch: Watch, guard: DeltaGuard | None = None) -> None:
        self.index = index
        self.job = job
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.vector: bytes | None = None
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stream = TextStream(backend.text.tokenizer, job.sampling, job.prompt_token_ids, shown=job.shown)
        self._guard = guard
        self._tokenizer = backend.text.tokenizer
        self._shown: list[str] = []
        self._client = backend.client
        self._watch = watch
        self.times = Times(time.monotonic(), watch.waited_s)

    @property
    def blocked(self) -> bool:
        """Whether the guard ended it."""
        return self._guard is not None and self._guard.blocked

    @property
    def shown_text(self) -> str:
        """The text of all deltas so far; `stream.text` may be ahead of it while the guard holds some back."""
        return self.stream.text if self._guard is None else "".join(self._shown)

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Yields what is new until the sequence ends. Leaving early stops it.

        Raises RequestError, EngineError or EngineDeadError as `EngineClient.generate` does.
        """
        job = self.job
        sequence = self._client.generate(
            job.prompt_token_ids,
            job.sampling,
            priority=job.priority,
            tenant=job.tenant,
            salt=job.salt,
            adapter=job.adapter,
        )
        async with aclosing(sequence) as outputs:
            async for said in outputs:
                output = await self._vetted(said)
                self._note(output)
                delta = self.stream.feed(output)
                if self._guard is not None:
                    delta = self._guard.feed(delta)
                    self._shown.append(delta.text)
                self.finish_reason = delta.finish_reason
                yield delta
                if delta.finish_reason is not None:
                    return

    def count_streamed(self, delta: TextDelta) -> None:
        """Counts a delta that was sent as part of a stream."""
        self._watch.metrics.stream_tokens.inc(len(delta.token_ids))

    async def _vetted(self, output: Output) -> Output:
        """Returns the output without alternatives that nobody may see."""
        entries = (*(output.logprobs or ()), *(output.prompt_logprobs or ()))
        if self._guard is None or not entries:
            return output
        if sum(len(entry.top) for entry in entries) > INLINE_ALTERNATIVES:
            return await asyncio.to_thread(self._vet, self._guard, output)
        return self._vet(self._guard, output)

    def _vet(self, guard: DeltaGuard, output: Output) -> Output:
        text_of = self._tokenizer.token_text
        return msgspec.structs.replace(
            output,
            logprobs=None if output.logprobs is None else guard.vet(output.logprobs, text_of),
            prompt_logprobs=None if output.prompt_logprobs is None else guard.vet(output.prompt_logprobs, text_of),
        )

    def _note(self, output: Output) -> None:
        if output.prompt_logprobs is not None:
            self.prompt_logprobs += output.prompt_logprobs
        if output.vector is not None:
            self.vector = output.vector
        if output.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        times = self.times
        if output.queue_s is not None:
            self._watch.metrics.queue_wait.observe(times.waited_s + output.queue_s)
            times.scheduled = min(times.submitted + output.queue_s, time.monotonic())
            if self.job.counts_prompt:
                self._watch.metrics.prompt_tokens.inc(len(self.job.prompt_token_ids))
        if output.token_ids:
            now = time.monotonic()
            if times.last_token is not None:
                self._watch.metrics.inter_token_latency.observe((now - times.last_token) / len(output.token_ids))
            else:
                self._watch.metrics.time_to_first_token.observe(now - self._watch.started)
                times.first_token = now
            times.last_token = now


def check_generates(info: ModelInfo) -> None:
    """Raises RequestError for a model that continues no prompt."""
    if not info.generates:
        raise RequestError("model: this model only computes embeddings: see /v1/embeddings", param="model")


def check_prompt(
    prompt_token_ids: Sequence[int], info: ModelInfo, param: str, *, embeds: bool = False, ends: bool = False
) -> None:
    """Raises RequestError when a prompt is empty, too long for the model's window, or not of its vocabulary, or when it
    is to be continued by a model that does not do that. embeds: it is to become a vector; ends: nothing follows it."""
    if not embeds:
        check_generates(info)
    request_checks.check_prompt(prompt_token_ids, info, param=param, ends=ends or embeds)


def fit_max_tokens(num_prompt_tokens: int, asked: int | None, default: int | None, info: ModelInfo) -> int:
    """Returns how many tokens to generate: what was asked for, else the default, else what the window holds.

    Raises RequestError when the window cannot hold what was asked for.
    """
    room = info.max_model_len - num_prompt_tokens
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise RequestError(
            f"max_tokens: {num_prompt_tokens} prompt tokens and {asked} more exceed the model's window of "
            f"{info.max_model_len}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return asked
