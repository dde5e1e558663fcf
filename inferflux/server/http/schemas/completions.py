"""POST /v1/completions: request, answer and stream chunk."""

from typing import Literal, cast

import msgspec

from inferflux.errors import RequestError
from inferflux.sampling_params import MAX_LOGPROBS, MAX_N
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.generate import IGNORED_FIELDS, FinishReason, GenerateRequest, Usage

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024
OBJECT = "text_completion"


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """echo: the answer begins with the prompt; with logprobs, scored. `max_tokens` may be 0 then.
    best_of: how many choices are made of each prompt, of which the `n` likeliest are the answer."""

    prompt: str | list[str | int | list[int]]
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
        if isinstance(self.prompt, str):
            return [self.prompt]
        match set(map(type, self.prompt)):
            case kinds if kinds == {int}:
                return [cast(list[int], self.prompt)]
            case kinds if kinds in ({str}, {list}):
                if len(self.prompt) > MAX_PROMPTS:
                    raise RequestError(f"prompt: at most {MAX_PROMPTS} prompts in one request", param="prompt")
                return cast(list[str] | list[list[int]], self.prompt)
        raise RequestError(
            "prompt: must be a string, a list of strings, a list of token ids or a list of such lists, "
            "with something in it",
            param="prompt",
        )

    def check(self) -> None:
        super().check()
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(f"logprobs: must be >= 0 and <= {MAX_LOGPROBS} (got {self.logprobs})", param="logprobs")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens: must be >= 1 without echo (got 0)", param="max_tokens")
        if self.max_tokens == 0 and self.min_tokens:
            raise RequestError("min_tokens: must be 0 when max_tokens is 0", param="min_tokens")
        if self.best_of is not None:
            self._check_best_of(self.best_of)

    def _check_best_of(self, best_of: int) -> None:
        if not 1 <= best_of <= MAX_N:
            raise RequestError(f"best_of: must be >= 1 and <= {MAX_N} (got {best_of})", param="best_of")
        if best_of < (self.n or 1):
            raise RequestError(f"best_of: must be >= n ({self.n}, got {best_of})", param="best_of")
        if self.selects and self.stream:
            raise RequestError("best_of: must be n in a stream, which shows choices before they end", param="best_of")


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
)
