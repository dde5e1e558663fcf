"""What both generate routes have in common: sampling fields, extensions, usage, and the fields not built yet.

Types are checked by msgspec, ranges by SamplingParams and, of what it has not, here; a field that is null has its
default.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec

from inferflux.errors import RequestError
from inferflux.sampling_params import (
    LOGIT_BIAS_RANGE,
    MAX_LOGIT_BIAS,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    RANGES,
    TOKEN_ID_RANGE,
    Grammar,
    Range,
    SamplingParams,
    check_number,
)
from inferflux.server.http.schemas.field_schema import field_schema
from inferflux.server.http.schemas.structured import Asked, ResponseFormat, StructuredOutputs, asked_grammar

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

MAX_PRIORITY = 2**31 - 1
MAX_CACHE_SALT_LENGTH = 256

# Fields of OpenAI's that change how an answer is billed, stored or routed, never what it says.
IGNORED_FIELDS = (
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
)

_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "min_tokens",
    "ignore_eos",
    "n",
)

CALLER_RANGES: Final[Mapping[str, Range]] = MappingProxyType(
    {"priority": Range(-MAX_PRIORITY, MAX_PRIORITY, integer=True)}
)
GENERATE_RANGES: Final[Mapping[str, Range]] = MappingProxyType(
    {
        **CALLER_RANGES,
        **{name: RANGES[name] for name in ("max_tokens", *_SAMPLING_FIELDS) if name in RANGES},
        "logit_bias": LOGIT_BIAS_RANGE,
        "stop_token_ids": TOKEN_ID_RANGE,
    }
)
# Fields that mean nothing unless another one is true.
GENERATE_NEEDS: Final[Mapping[str, str]] = MappingProxyType({"stream_options": "stream"})

_StopString = Annotated[str, field_schema(minLength=1, maxLength=MAX_STOP_STRING_LENGTH)]


def check_ranges(body: msgspec.Struct, ranges: Mapping[str, Range]) -> None:
    """Raises RequestError for a field among these that is a number out of its range."""
    for name, bounds in ranges.items():
        value = getattr(body, name)
        if value is not None:
            check_number(name, value, bounds)


def check_needs(body: msgspec.Struct, needs: Mapping[str, str]) -> None:
    """Raises RequestError for a field among these that is given while the one it needs is not true."""
    for name, other in needs.items():
        if getattr(body, name) is not None and not getattr(body, other):
            raise RequestError(f"{name}: requires {other}: true", param=name)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CallerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which model, and on whose terms. `priority` and `cache_salt` are the server's own extensions."""

    model: str | None = None
    priority: int | None = None
    cache_salt: Annotated[str | None, field_schema(minLength=1, maxLength=MAX_CACHE_SALT_LENGTH)] = None

    def check(self) -> None:
        """Raises RequestError for what the types do not refuse."""
        check_ranges(self, CALLER_RANGES)
        if self.cache_salt is not None and not 1 <= len(self.cache_salt) <= MAX_CACHE_SALT_LENGTH:
            raise RequestError(f"cache_salt: must have 1 to {MAX_CACHE_SALT_LENGTH} characters", param="cache_salt")


class GenerateRequest(CallerRequest, frozen=True, kw_only=True):
    """The fields of both generate routes. `return_token_ids` is the server's own extension."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[
        dict[int, float] | None,
        field_schema(maxProperties=MAX_LOGIT_BIAS, propertyNames={"pattern": "^(0|[1-9][0-9]*)$"}),
    ] = None
    seed: int | None = None
    stop: Annotated[_StopString | list[_StopString] | None, field_schema(maxItems=MAX_STOP_STRINGS)] = None
    stop_token_ids: Annotated[list[int] | None, field_schema(maxItems=MAX_STOP_TOKEN_IDS)] = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage figures."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def asked_grammar(self) -> Asked | None:
        """Returns what the answer must look like, as far as the request says. Raises RequestError."""
        return asked_grammar(self.response_format, self.structured_outputs)

    def check(self) -> None:
        """Raises RequestError for what neither the types nor SamplingParams refuse."""
        super().check()
        check_needs(self, GENERATE_NEEDS)

    def sampling(
        self,
        max_tokens: int | None,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """Returns the request's sampling parameters. Raises RequestError naming a field that is out of range."""
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        return SamplingParams(
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            **{name: value for name, value in given.items() if value is not None},
        )


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """prompt_tokens counts each prompt once, however many choices were made from it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
