"""An engine that says what it is told to, one token a step: for tests of everything above the process border."""

import asyncio
import math
from array import array
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from inferflux.config import FairnessConfig
from inferflux.engine.interface import ModelInfo, Output
from inferflux.engine.service.client import ClientState
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextBundle
from inferflux.errors import EngineDeadError
from inferflux.sampling_params import SamplingParams

REPLY = "Hello there, I am InferFlux 😀 and I count: 1, 2, 3."
WINDOW = 256
LOGPROB = -0.5
EMBEDDING_SIZE = 6


@dataclass
class Submitted:
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int
    tenant: str
    salt: bytes
    adapter: str | None = None


@dataclass
class FakeEngine:
    """Stands in for EngineClient.

    reply: what every prompt is answered with, and then EOS. pause_s: before each token; gate: tokens wait for it.
    fail_at: `error` is raised instead of this token (0: the first). load_error: raised by `start`, which waits for
    `may_load`. num_running, num_aborted: sequences, as the engine would see them. num_said: tokens of all of them.
    """

    text: TextBundle
    reply: str = REPLY
    window: int = WINDOW
    generates: bool = True
    pause_s: float = 0.0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fail_at: int | None = None
    error: Exception = field(default_factory=RuntimeError)
    load_error: Exception | None = None
    may_load: asyncio.Event = field(default_factory=asyncio.Event)
    state: ClientState = ClientState.STARTING
    info: ModelInfo | None = None
    stats: EngineStats = field(default_factory=lambda: EngineStats(device_pages_total=64))
    phases: list[tuple[str, float]] = field(default_factory=lambda: [("weights", 0.1)])
    num_engines: int = 1
    num_restarts: int = 0
    num_retries: int = 0
    pid: int | None = None
    stuck: bool = False
    fairness: list[tuple[str, FairnessConfig]] = field(default_factory=list)
    submitted: list[Submitted] = field(default_factory=list)
    num_running: int = 0
    num_aborted: int = 0
    num_said: int = 0
    num_drops: int = 0

    def __post_init__(self) -> None:
        self.may_load.set()
        self.gate.set()

    async def start(self) -> ModelInfo:
        await self.may_load.wait()
        if self.load_error is not None:
            self.state = ClientState.FAILED
            raise self.load_error
        (eos,) = self.text.tokenizer.eos_token_ids
        self.info = ModelInfo(
            "Fake",
            1000,
            self.text.tokenizer.vocab_size,
            self.window,
            "float32",
            "cpu",
            16,
            64,
            [eos],
            embedding_size=EMBEDDING_SIZE,
            generates=self.generates,
        )
        self.state = ClientState.READY
        return self.info

    async def close(self) -> None:
        self.state = ClientState.CLOSED
        self.gate.set()

    def set_fairness(self, policy: str, fairness: FairnessConfig) -> None:
        self.fairness.append((policy, fairness))

    async def drop_cache(self) -> None:
        self.num_drops += 1

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        salt: bytes = b"",
        adapter: str | None = None,
    ) -> AsyncGenerator[Output, None]:
        self.submitted.append(Submitted(prompt_token_ids, sampling, priority, tenant, salt, adapter))
        self.num_running += 1
        finished = False
        try:
            for index, output in enumerate(self.outputs(prompt_token_ids, sampling)):
                await asyncio.sleep(self.pause_s)
                await self.gate.wait()
                if self.state is ClientState.CLOSED:
                    raise EngineDeadError("the engine was shut down")
                if index == self.fail_at:
                    raise self.error
                finished = output.finish_reason is not None
                self.num_said += len(output.token_ids)
                yield output
        finally:
            self.num_running -= 1
            self.num_aborted += not finished

    def outputs(self, prompt: list[int], sampling: SamplingParams) -> list[Output]:
        """Returns the outputs of one sequence."""
        if sampling.pooling is not None:
            return [Output(len(self.submitted), finish_reason="stop", queue_s=0.001, vector=vector_of(prompt))]
        tokens, reason = self._tokens(len(prompt), sampling)
        scored = None
        if sampling.prompt_logprobs is not None:
            scored = [logprobs_of(token_id, sampling.prompt_logprobs) for token_id in prompt[1:]]
        if sampling.max_tokens == 0:
            return [
                Output(
                    request_id=len(self.submitted),
                    prompt_logprobs=scored,
                    finish_reason="length",
                    num_cached_tokens=min(3, len(prompt) - 1),
                    queue_s=0.001,
                )
            ]
        outputs = []
        for index, token_id in enumerate(tokens):
            last, first = index == len(tokens) - 1, index == 0
            entries = None if sampling.logprobs is None else [logprobs_of(token_id, sampling.logprobs)]
            outputs.append(
                Output(
                    request_id=len(self.submitted),
                    token_ids=[token_id],
                    logprobs=entries,
                    prompt_logprobs=scored if first else None,
                    finish_reason=reason if last else None,
                    stop_token_id=token_id if last and reason == "stop" else None,
                    num_cached_tokens=min(3, len(prompt) - 1) if first else 0,
                    queue_s=0.001 if first else None,
                )
            )
        return outputs

    def _tokens(self, num_prompt: int, sampling: SamplingParams) -> tuple[list[int], str]:
        (eos,) = self.text.tokenizer.eos_token_ids
        reply = self.text.tokenizer.encode(self.reply, add_special_tokens=False)
        tokens = reply * self.window if sampling.ignore_eos else [*reply, eos]
        limit = self.window - num_prompt if sampling.max_tokens is None else sampling.max_tokens
        for index, token_id in enumerate(tokens[:limit]):
            if token_id in (eos, *sampling.stop_token_ids) and not sampling.ignore_eos:
                return tokens[: index + 1], "stop"
        return tokens[:limit], "length"


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """The token itself is the likeliest; the ids after it follow."""
    top = [(token_id + place, LOGPROB - place) for place in range(num_top)]
    return TokenLogprobs(token_id, LOGPROB, 1, top)


def vector_of(prompt: list[int]) -> bytes:
    """EMBEDDING_SIZE numbers, of length 1, that depend on the prompt."""
    numbers = [1.0 + (token_id % 7) for token_id in (prompt * EMBEDDING_SIZE)[:EMBEDDING_SIZE]]
    return array("f", [number / math.hypot(*numbers) for number in numbers]).tobytes()
