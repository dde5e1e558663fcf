"""POST /v1/completions: request, answer and stream chunk."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

import msgspec

from inferflux.errors import RequestError
from inferflux.sampling_params import RANGES, Range
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.generate import (
    GENERATE_NEEDS,
    GENERATE_RANGES,
    IGNORED_FIELDS,
    FinishReason,
    GenerateRequest,
    Usage,
    check_ranges,
)
from inferflux.server.http.schemas.prompts import Prompts, split_prompts

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024
OBJECT = "text_completion"
_OWN_RANGES: Final[Mapping[str, Range]] = MappingProxyType({"logprobs": RANGES["logprobs"], "best_of": RANGES["n"]})


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """echo: the answer begins with the prompt; with logprobs, scored. `max_tokens` may be 0 then.
    best_of: how many choices are made of each prompt, of which the `n` likeliest are the answer."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    @property
    def num_candidates(self) -> int:
        """How many choices are made of each prompt."""
        return self.best_of or self.n or 1

    @property
    def selects(self) -> bool:
        """Whether only some of the choices made are shown."""
        return self.num_candidates > (self.n or 1)

    @property
    def num_logprobs(self) -> int | None:
        """What the engine must tell of each token: what is shown, and what choices are compared by."""
        return 0 if self.logprobs is None and self.selects else self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """Returns the prompts one by one: all texts, or all token ids. Raises RequestError."""
        return split_prompts(self.prompt, "prompt", MAX_PROMPTS)

    def check(self) -> None:
        super().check()
        check_ranges(self, _OWN_RANGES)
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens: must be >= 1 without echo (got 0)", param="max_tokens")
        if self.max_tokens == 0 and self.min_tokens:
            raise RequestError("min_tokens: must be 0 when max_tokens is 0", param="min_tokens")
        if self.best_of is not None:
            self._check_best_of(self.best_of)

    def _check_best_of(self, best_of: int) -> None:
        if best_of < (self.n or 1):
            raise RequestError(f"best_of: must be >= n ({self.n}, got {best_of})", param="best_of")
        if self.selects and self.stream:
            raise RequestError("best_of: must equal n in a stream, which sends choices early", param="best_of")


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """One entry per token, in parallel lists. The first token of a prompt has no logprob."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


COMPLETION = BodyReader(
    CompletionRequest,
    unsupported={"suffix": ("",), "store": (False,)},
    ignored=IGNORED_FIELDS,
    ranges={**GENERATE_RANGES, **_OWN_RANGES},
    needs=GENERATE_NEEDS,
)
