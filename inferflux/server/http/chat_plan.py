"""What a chat request asks of its answer's form: tools, grammar and thoughts, settled against what the model can do.

Decides; compiling the grammars and reading the answers is done elsewhere.
"""

import json
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from inferflux.engine.structured.grammar import json_rule
from inferflux.engine.structured.tool_calls import calls_rules
from inferflux.engine.text import TextBundle
from inferflux.engine.text.answer.formats import ToolFormat
from inferflux.engine.text.answer.reader import AnswerReader
from inferflux.engine.text.answer.reasoning import ReasoningReader
from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar
from inferflux.server.http.schemas.chat import ChatRequest
from inferflux.server.http.schemas.structured import Asked
from inferflux.server.http.schemas.tools import ToolUse, tool_use

Thoughts = Literal["none", "may", "open"]


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """tools: the format calls are looked for in; None: they are not. shown: special tokens the readers must see."""

    text: TextBundle
    use: ToolUse = field(default_factory=ToolUse)
    tools: ToolFormat | None = None
    asked: Asked | None = None

    @property
    def reads(self) -> bool:
        """Whether answers are taken apart at all."""
        return self.tools is not None or self.text.style.thinks

    @property
    def shown(self) -> frozenset[int]:
        return self.text.special_ids(self.text.style.shown) if self.reads else frozenset()

    def reader(self, thoughts: Thoughts) -> AnswerReader:
        """Returns a reader for one answer."""
        names = [function.name for _, function in self.use.callable]
        calls = None if self.tools is None else self.tools.reader(names, self.use.max_calls)
        return AnswerReader(calls, None if thoughts == "none" else ReasoningReader(opened=thoughts == "open"))

    def thoughts(self, *, opened: bool) -> Thoughts:
        """opened: the prompt has opened them."""
        return "none" if not self.text.style.thinks else "open" if opened else "may"

    def grammars(self, thoughts: Thoughts) -> list[Asked]:
        """Returns what must compile; the last is the answer's own. Raises RequestError."""
        use, asked = self.use, self.asked
        if self.tools is None or not (use.forced or asked is not None):
            return [] if asked is None else [_after(asked, thoughts)]
        many = use.max_calls != 1
        parts = [
            Asked(f"tools[{index}].function.parameters", Grammar("json", json.dumps(one.parameters)))
            for index, one in use.callable
        ]
        rules = calls_rules(self.tools, [function for _, function in use.callable], self.text.tokenizer, many=many)
        start = "start: calls"
        if not use.forced:
            assert asked is not None
            parts.append(asked)
            try:
                answer = json_rule(json.loads(asked.grammar.text))
            except (ValueError, RecursionError, RequestError):
                return parts  # the last of which will not compile
            start = f"start: answer | calls\nanswer: {answer}"
        return [*parts, _after(Asked("tools", Grammar("lark", f"{start}\n{rules}")), thoughts)]


def plan_chat(body: ChatRequest, text: TextBundle) -> ChatPlan:
    """Raises RequestError for what contradicts itself, and for tools that the model's template does not know."""
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    asked = body.asked_grammar()
    form = tool_format(use, text)
    if form is None or not use.callable:
        return ChatPlan(text, use, asked=asked)
    if asked is not None and (use.forced or asked.grammar.kind != "json"):
        clash = "a tool_choice that forces a call" if use.forced else 'tools unless tool_choice is "none"'
        raise RequestError(f"{asked.param}: cannot be combined with {clash}", param=asked.param)
    return ChatPlan(text, use, form, asked)


def tool_format(use: ToolUse, text: TextBundle) -> ToolFormat | None:
    """Returns what calls look like; None: there are no tools. Raises RequestError where the template takes none."""
    if not use.definitions:
        return None
    if text.style.tools is None:
        raise RequestError("tools: this model's chat template does not support tools", param="tools")
    return text.style.tools


def _after(asked: Asked, thoughts: Thoughts) -> Asked:
    return Asked(asked.param, msgspec.structs.replace(asked.grammar, thoughts=thoughts))
