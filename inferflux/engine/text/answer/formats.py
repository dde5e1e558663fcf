"""How a model writes tool calls and thoughts: found out from its chat template, one row per format."""

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from inferflux.engine.text.answer import hermes, llama3, mistral, reasoning
from inferflux.engine.text.answer.pieces import CallReader

_MISTRAL_ID_LENGTH: Final = 9
_ALPHANUMERIC: Final = string.ascii_letters + string.digits

# (the tools' names, the most calls) -> a reader for one answer
MakeReader = Callable[[Sequence[str], int | None], CallReader]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """signs: one of them in a template gives the format away. shown: special tokens that readers must see as text.
    make_id: a new call's id, as the format's templates accept it back."""

    name: str
    signs: tuple[str, ...]
    shown: tuple[str, ...]
    reader: MakeReader
    make_id: Callable[[], str]


@dataclass(frozen=True, slots=True)
class AnswerStyle:
    """tools: how calls are written; None: the template knows no tools. thinks: thoughts stand between `<think>` and
    `</think>`."""

    tools: ToolFormat | None = None
    thinks: bool = False

    @property
    def shown(self) -> tuple[str, ...]:
        """Texts that matter in an answer even where the vocabulary has them as special tokens."""
        thoughts = (reasoning.OPEN, reasoning.CLOSE) if self.thinks else ()
        return thoughts + (self.tools.shown if self.tools is not None else ())


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_MISTRAL_ID_LENGTH))


_HERMES: Final = ToolFormat(
    name="hermes",
    signs=(hermes.OPEN,),
    shown=(hermes.OPEN, hermes.CLOSE),
    reader=lambda _names, max_calls: hermes.HermesReader(max_calls),
    make_id=_call_id,
)
_MISTRAL: Final = ToolFormat(
    name="mistral",
    signs=(mistral.MARKER,),
    shown=(mistral.MARKER, mistral.ARGUMENTS, mistral.CALL_ID),
    reader=lambda _names, max_calls: mistral.MistralReader(max_calls),
    make_id=_short_id,
)
_MISTRAL_NAMED: Final = replace(_MISTRAL, name="mistral_named", signs=(mistral.ARGUMENTS,))
_LLAMA3: Final = ToolFormat(
    name="llama3",
    signs=(llama3.PYTHON_TAG, '"parameters"'),
    shown=(),
    reader=llama3.Llama3Reader,
    make_id=_call_id,
)
TOOL_FORMATS: Final[Mapping[str, ToolFormat]] = MappingProxyType(
    {row.name: row for row in (_MISTRAL_NAMED, _MISTRAL, _HERMES, _LLAMA3)}
)


def answer_style(template: str | None) -> AnswerStyle:
    """Returns how a model with this chat template answers. A template that takes tools and gives no format away is
    taken for Hermes', the most common."""
    if template is None:
        return AnswerStyle()
    signed = (row for row in TOOL_FORMATS.values() if any(sign in template for sign in row.signs))
    tools = next(signed, _HERMES) if "tools" in template else None
    return AnswerStyle(tools, thinks=reasoning.CLOSE in template)
