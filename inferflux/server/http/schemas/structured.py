"""Fields that say what an answer must look like: `response_format` as OpenAI has it, `structured_outputs` as vLLM does.

Turns them into one Grammar; whether that compiles is found out elsewhere (`server.grammar_check`).
"""

import json
import re
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from inferflux.engine.structured.grammar import choice_rule
from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar
from inferflux.server.http.schemas.field_schema import field_schema

MAX_CHOICES: Final = 1024
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY_OBJECT: Final = '{"type": "object"}'


class Asked(NamedTuple):
    """A grammar and the path of the field that asked for it."""

    param: str
    grammar: Grammar


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """strict is accepted and makes no difference: answers always follow the schema."""

    name: Annotated[str, field_schema(pattern=f"^{_NAME.pattern}$")]
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def asked(self) -> Asked | None:
        """Raises RequestError."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            words = "is required with" if self.json_schema is None else "is only for"
            param = "response_format.json_schema"
            raise RequestError(f'{param}: {words} type "json_schema"', param=param)
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Asked("response_format", Grammar("json", _ANY_OBJECT))
        if not _NAME.fullmatch(self.json_schema.name):
            param = "response_format.json_schema.name"
            raise RequestError(f"{param}: must have 1 to 64 of the characters A-Z a-z 0-9 _ -", param=param)
        schema = {} if self.json_schema.schema is None else self.json_schema.schema
        return Asked("response_format.json_schema.schema", Grammar("json", json.dumps(schema)))


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Give one of them. json: a JSON schema, as an object or as text. regex: matches the whole answer. choice: the
    answer is one of these. grammar: a Lark grammar. json_object: any JSON object."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[
        list[Annotated[str, field_schema(minLength=1)]] | None, field_schema(minItems=1, maxItems=MAX_CHOICES)
    ] = None
    grammar: str | None = None
    json_object: bool | None = None

    def asked(self) -> Asked:
        """Raises RequestError."""
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                "structured_outputs: give one of json, regex, choice, grammar and json_object "
                f"(got {', '.join(given) or 'none'})",
                param="structured_outputs",
            )
        return Asked(f"structured_outputs.{given[0]}", self._grammar())

    def _grammar(self) -> Grammar:
        if self.json is not None:
            return Grammar("json", self.json if isinstance(self.json, str) else json.dumps(self.json))
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.grammar is not None:
            return Grammar("lark", self.grammar)
        if self.choice is not None:
            return self._choice(tuple(self.choice))
        return Grammar("json", _ANY_OBJECT)

    def _choice(self, choices: tuple[str, ...]) -> Grammar:
        if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
            param = "structured_outputs.choice"
            raise RequestError(f"{param}: must have 1 to {MAX_CHOICES} texts, none of them empty", param=param)
        return Grammar("lark", f"start: {choice_rule(choices)}")


def asked_grammar(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> Asked | None:
    """Returns the grammar that a request's fields ask for. Raises RequestError, also when both fields do."""
    first = None if response_format is None else response_format.asked()
    second = None if structured is None else structured.asked()
    if first is not None and second is not None:
        raise RequestError("structured_outputs: cannot be combined with response_format", param="structured_outputs")
    return first or second
