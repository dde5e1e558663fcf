"""Grammars of tool calls: an answer that follows one is read back as calls, and their arguments fit their schemas.

Written in llguidance's Lark dialect, one row per format of `text.answer`; compiling them is `compiling`'s work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from inferflux.engine.structured.grammar import json_rule, quoted
from inferflux.engine.text.answer import hermes, mistral
from inferflux.engine.text.answer.formats import ToolFormat
from inferflux.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Function:
    """What may be called: its name, and the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Layout:
    """before, after: what stands around each call. between: two of them. opening, closing: around a call's arguments,
    NAME for the name as JSON has it, and for the bare name BARE. whole: around all calls.

    Markers that are special tokens of the model stand for those.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    between: str = ""
    opening: tuple[str, ...] = ('{"name": NAME, "arguments": ',)
    closing: str = "}"
    whole: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


_LAYOUTS: Final[Mapping[str, _Layout]] = MappingProxyType(
    {
        "hermes": _Layout(before=(hermes.OPEN, "\n"), after=("\n", hermes.CLOSE), between="\n"),
        "llama3": _Layout(between="; ", opening=('{"name": NAME, "parameters": ',)),
        "mistral": _Layout(between=", ", whole=((mistral.MARKER, "["), ("]",))),
        "mistral_named": _Layout(before=(mistral.MARKER,), opening=("BARE", mistral.ARGUMENTS), closing=""),
    }
)


def calls_rules(form: ToolFormat, functions: Sequence[Function], tokenizer: Tokenizer, *, many: bool) -> str:
    """Returns rules for `calls`: one call to one of the functions or, with `many`, one or more.

    Raises RequestError for parameters that are no JSON schema.
    """
    layout = _LAYOUTS[form.name]

    def terms(texts: Sequence[str]) -> str:
        return " ".join(_term(text, tokenizer) for text in texts if text)

    first, last = layout.whole
    more = f"({terms([layout.between])} call)*" if many else ""
    rules = [
        f"calls: {terms(first)} call {more} {terms(last)}",
        f"call: {terms(layout.before)} function {terms(layout.after)}",
        "function: " + " | ".join(f"function_{index}" for index in range(len(functions))),
    ]
    for index, function in enumerate(functions):
        opening = [_named(part, function.name) for part in layout.opening]
        rules.append(f"function_{index}: {terms(opening)} arguments_{index} {terms([layout.closing])}")
        rules.append(f"arguments_{index}: {json_rule(dict(function.parameters))}")
    return "\n".join(rules)


def _named(part: str, name: str) -> str:
    return part.replace("NAME", quoted(name), 1) if "NAME" in part else part.replace("BARE", name, 1)


def _term(text: str, tokenizer: Tokenizer) -> str:
    token_id = tokenizer.token_id(text)
    return f"<[{token_id}]>" if token_id in tokenizer.special_ids else quoted(text)
