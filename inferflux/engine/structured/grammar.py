"""What a caller's grammar is in llguidance's language. Pure functions of texts; compiling is `compiling`'s work."""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from llguidance import regex_to_lark

from inferflux.engine.text.answer.reasoning import CLOSE, OPEN
from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar

# Between JSON's tokens a model may lay out its answer, but not for ever: whitespace without end never finishes.
_JSON_OPTIONS: Final = MappingProxyType({"whitespace_pattern": r"\n? {0,16}"})


def library_text(grammar: Grammar, special: Mapping[str, int]) -> str:
    """Returns the grammar as llguidance takes it. special: the ids of the markers of thoughts that are special
    tokens, which no text matches. Raises RequestError for a JSON schema that is not JSON."""
    answer = {"name": "answer", **_WRITERS[grammar.kind](grammar.text)}
    if grammar.thoughts == "none":
        return json.dumps({"grammars": [answer]})
    rules = f"{_CLOSED_BY} <[{special[CLOSE]}]>\n" if CLOSE in special else _CLOSED
    opening = f"<[{special[OPEN]}]>" if OPEN in special else quoted(OPEN)
    start = _STARTS[grammar.thoughts].replace("OPEN", opening)
    thoughtful = {"name": "start", "lark_grammar": rules + _GAP + start}
    return json.dumps({"grammars": [thoughtful, answer]})


def json_rule(schema: Any) -> str:
    """Returns a JSON schema as a term of a Lark grammar: `%json {...}`. Raises RequestError when it is none."""
    return "%json " + json.dumps(_with_options(schema), ensure_ascii=False)


def quoted(text: str) -> str:
    """Returns a text as a terminal of a Lark grammar, which unlike JSON takes no DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def choice_rule(choices: tuple[str, ...]) -> str:
    """Returns a rule that is one of the texts."""
    return " | ".join(map(quoted, choices))


def _json(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError("is not a JSON schema: not valid JSON") from None
    return {"json_schema": _with_options(schema)}


def _regex(text: str) -> dict[str, Any]:
    return {"lark_grammar": f"start: /{regex_to_lark(text, use_ascii='')}/"}


def _lark(text: str) -> dict[str, Any]:
    return {"lark_grammar": text}


def _with_options(schema: Any) -> dict[str, Any]:
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise RequestError("must be a JSON schema: an object")
    return {**schema, "x-guidance": dict(_JSON_OPTIONS)}


_WRITERS: Final[Mapping[str, Callable[[str], dict[str, Any]]]] = MappingProxyType(
    {"json": _json, "regex": _regex, "lark": _lark}
)
_CLOSED: Final = "thoughts[lazy]: /(.|\\n)*<\\/think>/\n"
_CLOSED_BY: Final = "words: /(.|\\n)*/\nthoughts: words"
_GAP: Final = "gap: /[ \\n]{0,4}/\n"
_STARTS: Final = MappingProxyType(
    {"open": "start: thoughts gap @answer", "may": "start: @answer | OPEN thoughts gap @answer"}
)
