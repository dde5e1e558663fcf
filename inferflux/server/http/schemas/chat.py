"""POST /v1/chat/completions: request, answer and stream chunk."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec

from inferflux.errors import RequestError
from inferflux.sampling_params import MAX_TOKEN_ID, RANGES, Range
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.field_schema import field_schema
from inferflux.server.http.schemas.generate import (
    GENERATE_NEEDS,
    GENERATE_RANGES,
    IGNORED_FIELDS,
    FinishReason,
    GenerateRequest,
    Usage,
    check_needs,
    check_ranges,
)
from inferflux.server.http.schemas.messages import MAX_MESSAGES, Message
from inferflux.server.http.schemas.tools import MAX_TOOLS, Tool, ToolCall, ToolCallDelta, ToolChoice

CHUNK_OBJECT = "chat.completion.chunk"
_TOKENS: Final = Range(1, MAX_TOKEN_ID, integer=True)
_OWN_RANGES: Final[Mapping[str, Range]] = MappingProxyType(
    {"max_tokens": _TOKENS, "max_completion_tokens": _TOKENS, "top_logprobs": RANGES["logprobs"]}
)
_OWN_NEEDS: Final[Mapping[str, str]] = MappingProxyType({"top_logprobs": "logprobs"})


class TemplatedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a chat's prompt is made of, where a request wants the prompt alone. All but the messages: as the chat to
    come will give them."""

    messages: list[Message] | None = None
    tools: Annotated[list[Tool] | None, field_schema(maxItems=MAX_TOOLS)] = None
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises RequestError for what only messages can have."""
        for name in ("tools", "tool_choice", "chat_template_kwargs"):
            if self.messages is None and getattr(self, name) is not None:
                raise RequestError(f"{name}: needs messages", param=name)


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    """chat_template_kwargs: further names for the chat template, such as enable_thinking."""

    messages: Annotated[list[Message], field_schema(minItems=1, maxItems=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[Tool] | None, field_schema(maxItems=MAX_TOOLS)] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        check_needs(self, _OWN_NEEDS)
        check_ranges(self, _OWN_RANGES)
        if self.token_limit not in (self.max_tokens, None) and self.max_tokens is not None:
            raise RequestError(
                f"max_tokens: must equal max_completion_tokens ({self.max_completion_tokens}) when both are given",
                param="max_tokens",
            )
        # Refuses what is out of range before a policy service is asked, or a model waited for.
        self.sampling(self.token_limit, logprobs=self.num_logprobs)

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, under either of its two names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct, frozen=True):
    """content: None beside tool calls when nothing else was said. reasoning_content: a thinking model's thoughts."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds: the role in the first, text or calls in those that follow, nothing in the last."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


CHAT = BodyReader(
    ChatRequest,
    unsupported={
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "store": (False,),
        "web_search_options": (),
    },
    ignored=(*IGNORED_FIELDS, "reasoning_effort", "verbosity"),
    ranges={**GENERATE_RANGES, **_OWN_RANGES},
    needs={**GENERATE_NEEDS, **_OWN_NEEDS},
)
