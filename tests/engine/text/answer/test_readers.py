"""What answers say, and that it does not depend on how their text is cut: the property streams rest on."""

import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux.engine.text.answer.formats import TOOL_FORMATS, answer_style
from inferflux.engine.text.answer.reader import AnswerReader
from inferflux.engine.text.answer.reasoning import ReasoningReader

NAMES = ("get_weather", "add")


@dataclass
class Read:
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)


def read(texts: list[str], form: str | None, *, opened: bool | None = None, max_calls: int | None = None) -> Read:
    """Reads the pieces; opened None: nobody looks for thoughts."""
    calls = None if form is None else TOOL_FORMATS[form].reader(NAMES, max_calls)
    reader = AnswerReader(calls, None if opened is None else ReasoningReader(opened=opened))
    found = Read()
    for index, text in enumerate(texts):
        pieces = reader.feed(text, last=index == len(texts) - 1)
        found.content += pieces.content
        found.reasoning += pieces.reasoning
        for piece in pieces.calls:
            if piece.name is not None:
                assert piece.number == len(found.calls)
                found.calls.append((piece.name, ""))
            assert piece.number == len(found.calls) - 1, "a piece of a call that is over"
            name, arguments = found.calls[-1]
            found.calls[-1] = name, arguments + piece.arguments
    assert reader.num_calls == len(found.calls)
    return found


WEATHER = ("get_weather", '{"city": "Köln", "x": [1, {"}": "\\"]"}]}')
ADD = ("add", '{"a": 1, "b": 2}')
W, A = WEATHER[1], ADD[1]
# format, text, content, calls
CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Just words.", "Just words.", []),
    ("hermes", "words with space \n", "words with space \n", []),
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {W}}}\n</tool_call>', "", [WEATHER]),
    ("hermes", f'Let me see.\n\n<tool_call>{{"name":"add","arguments":{A}}}</tool_call>', "Let me see.", [ADD]),
    (
        "hermes",
        f'<tool_call>\n{{"arguments": {W}, "name": "get_weather"}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "add", "arguments": {A}}}\n</tool_call> done',
        "done",
        [WEATHER, ADD],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", "a <tool_call>nonsense</tool_call> b", "a <tool_call>nonsense</tool_call> b", []),
    ("hermes", '<tool_call>{"no": "name"}</tool_call>', '<tool_call>{"no": "name"}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": <x</tool_call> b', "b", [("f", '{"a": ')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut o', "", [("f", '{"a": "cut o')]),
    ("hermes", 'x <tool_call>{"name": "f"', 'x <tool_call>{"name": "f"', []),
    ("hermes", "almost <tool_cal", "almost <tool_cal", []),
    ("llama3", f'{{"name": "get_weather", "parameters": {W}}}', "", [WEATHER]),
    ("llama3", f'<|python_tag|>{{"name": "add", "parameters": {A}}}', "", [ADD]),
    (
        "llama3",
        f'{{"name": "add", "parameters": {A}}}; {{"name": "get_weather", "parameters": {W}}}',
        "",
        [ADD, WEATHER],
    ),
    ("llama3", '{"type": "function", "name": "add", "parameters": {}}', "", [("add", "{}")]),
    ("llama3", '{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}', []),
    ("llama3", ' {"answer": 42}', ' {"answer": 42}', []),
    ("llama3", 'See {"name": "add"}', 'See {"name": "add"}', []),
    ("llama3", f'{{"name": "add", "parameters": {A}}} and words', "and words", [ADD]),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {W}}}]', "", [WEATHER]),
    (
        "mistral",
        f'Look: [TOOL_CALLS][{{"name": "add", "arguments": {A}}}, {{"name": "get_weather", "arguments": {W}}}] so',
        "Look:so",
        [ADD, WEATHER],
    ),
    ("mistral", f"[TOOL_CALLS]add[ARGS]{A}[TOOL_CALLS]get_weather[ARGS]{W}", "", [ADD, WEATHER]),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{A}", "", [ADD]),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]{'x' * 230}[ARGS]{A}", "", [ADD]),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]{'x' * 300}[ARGS]{A}", f"[TOOL_CALLS]add[CALL_ID]{'x' * 300}[ARGS]{A}", []),
    ("mistral", "[TOOL_CALLS] is a marker", "[TOOL_CALLS] is a marker", []),
    ("mistral", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS][1, 2]", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_told_from_content(form: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    found = read([text], form)
    assert (found.content, found.calls) == (content, calls)


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_one_character_at_a_time_says_the_same(form: str, text: str, content: str, calls: Any) -> None:
    assert read(list(text), form) == read([text], form)


@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
def test_a_long_call_takes_time_in_proportion(form: str) -> None:
    """A file's text as an argument: 400 KB took half a minute, during which the server answered nobody."""
    arguments = json.dumps({"text": 'if (x) { return "a\\n"; }\n' * 15000, "numbers": list(range(15000))})
    key = "parameters" if form == "llama3" else "arguments"
    call = f'{{"name": "add", "{key}": {arguments}}}'
    text = {"hermes": f"<tool_call>{call}</tool_call>", "llama3": call, "mistral": f"[TOOL_CALLS][{call}]"}[form]
    started = time.process_time()
    assert read([text], form).calls == [("add", arguments)]
    assert read([text[start : start + 40] for start in range(0, len(text), 40)], form).calls == [("add", arguments)]
    assert time.process_time() - started < 10.0


def test_no_more_calls_than_asked_for() -> None:
    text = f'<tool_call>{{"name": "add", "arguments": {A}}}</tool_call>' * 3
    assert read([text], "hermes", max_calls=1).calls == [ADD]
    assert read([f"[TOOL_CALLS]add{A}" * 3], "mistral", max_calls=2).calls == [ADD, ADD]
    assert read([f'{{"name": "add", "parameters": {A}}};' * 3], "llama3", max_calls=1).calls == [ADD]


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nhm, yes\n</think>\n\nThe answer.", False, "hm, yes", "The answer."),
        ("hm\n</think>The answer.", True, "hm", "The answer."),
        ("no thoughts", False, "", "no thoughts"),
        ("  leading space", False, "", "  leading space"),
        ("<think>\n\n</think>\n\nempty", False, "", "empty"),
        ("never ending < think", True, "never ending < think", ""),
        ("cut </thi", True, "cut </thi", ""),
        ("  \n", True, "", ""),
        ("<thin", False, "", "<thin"),
        ("<think>a</think> b </think> <think>c", False, "a", "b </think> <think>c"),
    ],
)
def test_thoughts_are_told_from_the_answer(text: str, opened: bool, reasoning: str, content: str) -> None:
    for texts in ([text], list(text)):
        found = read(texts, None, opened=opened)
        assert (found.reasoning, found.content) == (reasoning, content)


def test_calls_after_thoughts() -> None:
    text = f'I need a tool.</think>\n\n<tool_call>\n{{"name": "add", "arguments": {A}}}\n</tool_call>'
    found = read([text], "hermes", opened=True)
    assert (found.reasoning, found.content, found.calls) == ("I need a tool.", "", [ADD])


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "<|python_tag|>", ";", "[", "]",
        '{"name": "add", "arguments": ', '{"name": "add", "parameters": ', '"name"', '"arguments"', ":", ",", "{", "}",
        '"', "\\", "add", "1", "null", " ", "\n", "<", "text", "ü", '{"a": "x"}', '{"a": [{}, "]"]}}',
    ]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(FRAGMENTS, max_size=14).map("".join),
    st.sampled_from([*TOOL_FORMATS, None]),
    st.sampled_from([None, False, True]),
    st.sampled_from([None, 1]),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_however_it_is_cut_it_says_the_same(
    text: str, form: str | None, opened: bool | None, max_calls: int | None, cuts: list[int]
) -> None:
    places = sorted({cut for cut in cuts if cut < len(text)} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(places)] or [text]
    whole = read([text], form, opened=opened, max_calls=max_calls)
    assert read([*pieces, ""], form, opened=opened, max_calls=max_calls) == whole
    assert read(list(text) or [""], form, opened=opened, max_calls=max_calls) == whole


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TOOL_FORMATS)), st.dictionaries(st.text(), st.one_of(st.text(), st.integers())))
def test_any_arguments_come_through(form: str, arguments: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        text = json.dumps(arguments, ensure_ascii=ascii_only)
        written = {
            "hermes": f'<tool_call>\n{{"name": "add", "arguments": {text}}}\n</tool_call>',
            "llama3": f'{{"name": "add", "parameters": {text}}}',
            "mistral": f'[TOOL_CALLS][{{"name": "add", "arguments": {text}}}]',
            "mistral_named": f"[TOOL_CALLS]add[ARGS]{text}",
        }[form]
        assert read([written], form).calls == [("add", text)]


@pytest.mark.parametrize(
    ("template", "tools", "thinks"),
    [
        (None, None, False),
        ("{{ messages }}", None, False),
        ("{% if tools %}<tool_call>{% endif %}", "hermes", False),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral", False),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3", False),
        ("{% if tools %}{{ tools }}{% endif %} </think>", "hermes", True),
    ],
)
def test_a_template_gives_its_style_away(template: str | None, tools: str | None, thinks: bool) -> None:
    style = answer_style(template)
    assert (style.tools.name if style.tools else None, style.thinks) == (tools, thinks)
