"""Chat messages of a request, and how chat templates read them."""

from typing import Any, Literal

import msgspec
from msgspec import Raw, field

from inferflux.errors import RequestError
from inferflux.server.http.schemas.tools import MAX_CALLS, ToolCall

MAX_MESSAGES = 4096

# Chat templates know three roles; "developer" is OpenAI's newer word for the system's.
_TEMPLATE_ROLES = {"developer": "system"}
# Parts of an assistant's message that other servers put into their answers and clients send back.
_UNSUPPORTED_PARTS = ("function_call", "audio")


def _null() -> Raw:
    """A default made anew, since a JSON schema cannot show a raw one."""
    return Raw(b"null")


def _required(path: str) -> RequestError:
    return RequestError(f"{path}: is required", param=path, code="missing_required_parameter")


class ContentPart(msgspec.Struct, frozen=True):
    """Only `type: text` is understood, and `refusal` in an assistant's message, which reads like a text; other kinds
    keep their content to themselves."""

    type: str
    text: str | None = None
    refusal: str | None = None

    def for_template(self, path: str, role: str) -> dict[str, str]:
        if self.type == "refusal" and role == "assistant":
            name, text = "refusal", self.refusal
        elif self.type == "text":
            name, text = "text", self.text
        else:
            raise RequestError(f'{path}: must be of type "text" (got type "{self.type:.40}")', param=path)
        if text is None:
            raise _required(f"{path}.{name}")
        return {"type": "text", "text": text}


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message. refusal, annotations and reasoning are what an answer may have carried; they are not read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
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
        if self.role == "tool" and not self.tool_call_id:
            raise _required(f"{path}.tool_call_id")
        message: dict[str, Any] = {"role": _TEMPLATE_ROLES.get(self.role, self.role), "content": self._content(path)}
        optional = {"name": self.name, "tool_call_id": self.tool_call_id, "tool_calls": self._calls(path)}
        return message | {name: value for name, value in optional.items() if value is not None}

    def _content(self, path: str) -> str | list[dict[str, str]] | None:
        """Returns a text, text parts or nothing: whether the template takes them as they are is its own affair."""
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            if self.role == "assistant":
                return None
            raise _required(f"{path}.content")
        if not self.content:
            raise RequestError(f"{path}.content: must have at least one part", param=f"{path}.content")
        return [part.for_template(f"{path}.content[{index}]", self.role) for index, part in enumerate(self.content)]

    def _calls(self, path: str) -> list[dict[str, Any]] | None:
        if not self.tool_calls:
            return None
        where = f"{path}.tool_calls"
        if self.role != "assistant":
            raise RequestError(f'{where}: only messages of role "assistant" may have tool calls', param=where)
        if len(self.tool_calls) > MAX_CALLS:
            raise RequestError(f"{where}: at most {MAX_CALLS} (got {len(self.tool_calls)})", param=where)
        return [call.for_template(f"{where}[{index}]") for index, call in enumerate(self.tool_calls)]


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Returns the messages as chat templates read them. Raises RequestError."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages: must have 1 to {MAX_MESSAGES} messages (got {len(messages)})", param="messages")
    return [message.for_template(f"messages[{index}]") for index, message in enumerate(messages)]
