"""POST /v1/chat/completions: request, answer and stream chunk."""

from typing import Any, Literal

import msgspec
from msgspec import Raw, field

from inferflux.errors import RequestError
from inferflux.sampling_params import MAX_LOGPROBS
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.generate import IGNORED_FIELDS, FinishReason, GenerateRequest, Usage

CHUNK_OBJECT = "chat.completion.chunk"
MAX_MESSAGES = 4096

# Chat templates know three roles; "developer" is OpenAI's newer word for the system's.
_TEMPLATE_ROLES = {"developer": "system"}
# Parts of an assistant's message that a server puts into its answers and clients send back.
_UNSUPPORTED_PARTS = ("tool_calls", "function_call", "audio")


def _null() -> Raw:
    """A default made anew, since a JSON schema cannot show a raw one."""
    return Raw(b"null")


class ContentPart(msgspec.Struct, frozen=True):
    """Only `type: text` is understood; other kinds keep their content to themselves."""

    type: str
    text: str | None = None

    def for_template(self, path: str) -> dict[str, str]:
        if self.type != "text" or self.text is None:
            raise RequestError(f'{path}: must be of type "text" with a text (got type "{self.type:.40}")', param=path)
        return {"type": self.type, "text": self.text}


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message. refusal, annotations and reasoning are what an answer may have carried; they are not read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Raw = field(default_factory=_null)
    function_call: Raw = field(default_factory=_null)
    audio: Raw = field(default_factory=_null)
    refusal: Raw = field(default_factory=_null)
    annotations: Raw = field(default_factory=_null)
    reasoning_content: Raw = field(default_factory=_null)

    def for_template(self, path: str) -> dict[str, Any]:
        """Returns the message as chat templates read it. Raises RequestError naming `path` and the part at fault."""
        for name in _UNSUPPORTED_PARTS:
            if bytes(getattr(self, name)) not in (b"null", b"[]"):
                raise RequestError(f"{path}.{name}: not supported yet", param=f"{path}.{name}")
        message: dict[str, Any] = {"role": _TEMPLATE_ROLES.get(self.role, self.role), "content": self._content(path)}
        optional = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {name: value for name, value in optional.items() if value is not None}

    def _content(self, path: str) -> str | list[dict[str, str]]:
        """Returns a text, or text parts: whether the template takes them as they are is its own affair."""
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            if self.role == "assistant":
                return ""
            raise RequestError(f"{path}.content: is required", param=f"{path}.content")
        return [part.for_template(f"{path}.content[{index}]") for index, part in enumerate(self.content)]


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Returns the messages as chat templates read them. Raises RequestError."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages: must have 1 to {MAX_MESSAGES} messages (got {len(messages)})", param="messages")
    return [message.for_template(f"messages[{index}]") for index, message in enumerate(messages)]


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise RequestError("top_logprobs: needs logprobs: true", param="top_logprobs")
            if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
                raise RequestError(
                    f"top_logprobs: must be >= 0 and <= {MAX_LOGPROBS} (got {self.top_logprobs})", param="top_logprobs"
                )
        for name in ("max_tokens", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name}: must be >= 1 (got {value})", param=name)
        if self.token_limit not in (self.max_tokens, None) and self.max_tokens is not None:
            raise RequestError(
                f"max_tokens: must equal max_completion_tokens ({self.max_completion_tokens}) when both are given",
                param="max_tokens",
            )

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
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


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
    """What a chunk adds: the role in the first, text in those that follow, nothing in the last."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


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
        "prediction": (),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "web_search_options": (),
    },
    ignored=(*IGNORED_FIELDS, "parallel_tool_calls", "reasoning_effort", "verbosity"),
)
