"""Which forms of a message a chat template reads, seen from its source: parts or a string, null, arguments as text.

Templates were written against different servers' habits; each gets its messages as it expects them. Knows jinja's
syntax tree; renders nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes


@dataclass(frozen=True, slots=True)
class MessageForms:
    """parts: it loops over a message's content. strings: it asks whether the content is one. none: it asks whether the
    content is none, so that "" would mean something else. argument_text: it joins a call's arguments to strings."""

    parts: bool = False
    strings: bool = False
    none: bool = False
    argument_text: bool = False

    def calls(self, calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Returns a message's tool calls with their arguments as the template reads them."""
        return [self._call(call) for call in calls] if self.argument_text else list(calls)

    def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function")
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(arguments, Mapping):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def message_forms(template: nodes.Template) -> MessageForms:
    assigned = {
        assign.target.name
        for assign in template.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, frozenset())
    }
    names = frozenset(assigned | {"content"})
    tests = list(template.find_all(nodes.Test))
    asked = {test.name for test in tests if _is_content(test.node, names)}
    asked_of_arguments = {test.name for test in tests if _is_field(test.node, "arguments")}
    return MessageForms(
        parts=any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For)),
        strings="string" in asked,
        none="none" in asked,
        argument_text=not asked_of_arguments & {"string", "mapping"} and _joins_arguments(template),
    )


def _joins_arguments(template: nodes.Template) -> bool:
    operands = [side for add in template.find_all(nodes.Add) for side in (add.left, add.right)]
    operands += [part for concat in template.find_all(nodes.Concat) for part in concat.nodes]
    return any(_is_field(operand, "arguments") for operand in operands)


def _is_content(node: nodes.Node, names: frozenset[str]) -> bool:
    match node:
        case nodes.Filter(node=nodes.Expr() as inner) | nodes.Getitem(node=inner, arg=nodes.Slice()):
            return _is_content(inner, names)
        case nodes.Name(name=name):
            return name in names
    return _is_field(node, "content")


def _is_field(node: nodes.Node, field: str) -> bool:
    match node:
        case nodes.Getattr(attr=name) | nodes.Getitem(arg=nodes.Const(value=name)):
            return bool(name == field)
    return False
