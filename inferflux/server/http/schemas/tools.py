"""Tools of a chat request: what may be called, whether it must be, and calls in messages and answers."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec

from inferflux.engine.structured.tool_calls import Function
from inferflux.errors import RequestError, did_you_mean
from inferflux.server.http.schemas.field_schema import field_schema

MAX_TOOLS: Final = 128
MAX_CALLS: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
# OpenAI: a function without parameters takes none.
_NO_PARAMETERS: Final = '{"type": "object", "properties": {}, "additionalProperties": false}'


class FunctionDefinition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """strict is accepted and changes nothing: arguments follow `parameters` whenever a call is forced."""

    name: Annotated[str, field_schema(pattern=f"^{_NAME.pattern}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: FunctionName


class AllowedTools(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], field_schema(minItems=1)]


class AllowedChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    """As if these were all the tools: the model is not told of the others, so that it cannot call them."""

    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice


class CalledFunction(msgspec.Struct, frozen=True):
    """arguments: JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"

    def for_template(self, path: str) -> dict[str, Any]:
        """Returns the call as templates read it, its arguments an object. Raises RequestError naming `path`."""
        where = f"{path}.function.arguments"
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError(f"{where}: must be the JSON text of an object", param=where) from None
        if not isinstance(arguments, dict):
            raise RequestError(f"{where}: must be the JSON text of an object", param=where)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class CalledFunctionDelta(msgspec.Struct, frozen=True):
    arguments: str
    name: str | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of call number `index`; id, type and name come with the first."""

    index: int
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET
    function: CalledFunctionDelta


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request's tool fields come to. definitions: for the template. callable: what may be called, by its place
    in `tools`. forced: one of them must be. max_calls: at most so many."""

    definitions: Sequence[dict[str, Any]] = ()
    callable: Sequence[tuple[int, Function]] = ()
    forced: bool = False
    max_calls: int | None = None


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """Returns what the three fields come to. Raises RequestError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice: requires tools", param="tool_choice")
        return ToolUse()
    _check(tools)
    numbered = list(enumerate(tools))
    if isinstance(choice, AllowedChoice):
        numbered = _chosen(numbered, choice.allowed_tools.tools, "tool_choice.allowed_tools.tools")
        choice = choice.allowed_tools.mode
    definitions: list[dict[str, Any]] = [msgspec.to_builtins(tool) for _, tool in numbered]
    if choice == "none":
        return ToolUse(definitions)
    if isinstance(choice, NamedTool):
        named = _chosen(numbered, [choice], "tool_choice.function.name")
        return ToolUse(definitions, _functions(named), forced=True, max_calls=1)
    max_calls = 1 if parallel is False else None
    return ToolUse(definitions, _functions(numbered), forced=choice == "required", max_calls=max_calls)


def _chosen(numbered: Sequence[tuple[int, Tool]], chosen: Sequence[NamedTool], path: str) -> list[tuple[int, Tool]]:
    """Raises RequestError naming `path` when none is chosen, or one that is not there."""
    if not chosen:
        raise RequestError(f"{path}: must name at least one of the tools", param=path)
    wanted, known = {one.function.name for one in chosen}, [tool.function.name for _, tool in numbered]
    for name in sorted(wanted.difference(known)):
        raise RequestError(f"{path}: is not one of the tools{did_you_mean(name, known)}", param=path)
    return [(index, tool) for index, tool in numbered if tool.function.name in wanted]


def _functions(numbered: Sequence[tuple[int, Tool]]) -> list[tuple[int, Function]]:
    return [(index, Function(tool.function.name, _parameters(tool))) for index, tool in numbered]


def _check(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: at most {MAX_TOOLS} (got {len(tools)})", param="tools")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}].function.name"
        if not _NAME.fullmatch(tool.function.name):
            raise RequestError(f"{where}: must have 1 to 64 of the characters A-Z a-z 0-9 _ -", param=where)
        if tool.function.name in seen:
            raise RequestError(f"{where}: another tool has this name", param=where)
        seen.add(tool.function.name)


def _parameters(tool: Tool) -> dict[str, Any]:
    given = tool.function.parameters
    parameters: dict[str, Any] = json.loads(_NO_PARAMETERS) if given is None else given
    return parameters
