"""Tools over HTTP: what the model is told, what its calls become, whole and streamed, and that the two agree."""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux.engine.text import load_text
from inferflux.engine.text.answer.formats import TOOL_FORMATS
from inferflux.engine.text.answer.reader import AnswerReader
from inferflux.engine.text.answer.reasoning import ReasoningReader
from inferflux.server.http.formats.reading import Reading
from tests.support.http_server import MODEL, OPEN, Site, read_events, running_server
from tests.support.templates import bundle, template
from tests.support.tokenizers import write_byte_level

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Weather?"}]


def called(arguments: str, role: str = "assistant") -> list[dict[str, Any]]:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    return [{"role": role, "content": "x", "tool_calls": [call]}]


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
CITY = '{"city": "Köln"}'
REQUIRED = {"tool_choice": "required"}
REPLIES = {
    "hermes": f'So.\n<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3": f'{{"name": "weather", "parameters": {CITY}}}; {{"name": "now", "parameters": {{}}}}',
    "mistral": f'So.[TOOL_CALLS][{{"name": "weather", "arguments": {CITY}}}, {{"name": "now", "arguments": {{}}}}]',
    "mistral_named": f"So.[TOOL_CALLS]weather[ARGS]{CITY}[TOOL_CALLS]now[ARGS]{{}}",
}


def put_together(events: list[Any]) -> dict[str, Any]:
    """From a stream's events, the choice as the whole answer would have it, without the calls' ids."""
    message: dict[str, Any] = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
    finish = None
    for event in events[:-1]:
        for choice in event["choices"]:
            assert finish is None, "a delta after the end"
            finish = choice["finish_reason"]
            delta = choice["delta"]
            message["role"] = delta.get("role", message["role"])
            for name in ("content", "reasoning_content"):
                if name in delta:
                    message[name] = (message[name] or "") + delta[name]
            for piece in delta.get("tool_calls", []):
                calls = message["tool_calls"] = message["tool_calls"] or []
                if piece["index"] == len(calls):
                    assert piece.get("id")
                    assert piece["type"] == "function"
                    calls.append({"name": piece["function"]["name"], "arguments": ""})
                assert piece["index"] == len(calls) - 1
                calls[-1]["arguments"] += piece["function"]["arguments"]
    return {**message, "finish_reason": finish}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = message.get("tool_calls")
    return {
        "role": message["role"],
        "content": message["content"],
        "reasoning_content": message.get("reasoning_content"),
        "tool_calls": None if calls is None else [call["function"] for call in calls],
        "finish_reason": choice["finish_reason"],
    }


@pytest.mark.parametrize("form", TOOL_FORMATS)
async def test_calls_come_whole_and_streamed(form: str):
    async with running_server(text=bundle(form)) as site:
        site.engine.reply = REPLIES[form]
        body = {"messages": ASK, "tools": TOOLS}
        status, answer = await site.post(CHAT, body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        calls = choice["message"]["tool_calls"]
        assert [call["function"] for call in calls] == [
            {"name": "weather", "arguments": CITY},
            {"name": "now", "arguments": "{}"},
        ]
        assert len({call["id"] for call in calls}) == 2
        assert all(call["type"] == "function" for call in calls)
        assert choice["message"]["content"] == (None if form == "llama3" else "So.")
        assert put_together(await site.events(CHAT, body)) == without_ids(choice)
        prompt = site.engine.text.tokenizer.decode(site.engine.submitted[0].prompt_token_ids, skip_special_tokens=False)
        assert '"description": "Tells it"' in prompt
        for limit in range(1, 40, 6):
            cut = {**body, "max_tokens": limit}
            _, answer = await site.post(CHAT, cut)
            assert answer["choices"][0]["finish_reason"] == "length"
            assert put_together(await site.events(CHAT, cut)) == without_ids(answer["choices"][0])


@pytest.mark.parametrize("form", TOOL_FORMATS)
async def test_a_call_that_a_stop_cuts_short_is_none_to_act_on(form: str):
    async with running_server(text=bundle(form)) as site:
        site.engine.reply = REPLIES[form]
        body = {"messages": ASK, "tools": TOOLS, "stop": 'n"}'}
        _, answer = await site.post(CHAT, body)
        (choice,) = answer["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": CITY.removesuffix('n"}')}
        assert choice["finish_reason"] == "stop"
        assert put_together(await site.events(CHAT, body)) == without_ids(choice)


@pytest.mark.parametrize("form", TOOL_FORMATS)
async def test_calls_and_results_go_back_to_the_model(form: str):
    call = {"id": "abc123def", "type": "function", "function": {"name": "weather", "arguments": CITY}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc123def", "content": "rain"},
    ]
    async with running_server(text=bundle(form)) as site:
        status, answer = await site.post(CHAT, {"messages": messages, "tools": TOOLS})
        assert status == 200, answer
        token_ids = site.engine.submitted[0].prompt_token_ids
        prompt = site.engine.text.tokenizer.decode(token_ids, skip_special_tokens=False)
    assert CITY in prompt, "as an object, not as a text with quotes"
    assert "tool\nrain" in prompt


async def test_forced_calls_are_constrained(site_with_tools: Site):
    site = site_with_tools
    named = {"type": "function", "function": {"name": "now"}}
    for choice, part in (("required", "function_1"), (named, "now")):
        status, _ = await site.post(CHAT, {"messages": ASK, "tools": TOOLS, "tool_choice": choice})
        assert status == 200
        grammar = site.engine.submitted[-1].sampling.grammar
        assert grammar is not None
        assert part in grammar.text
    assert "weather" not in grammar.text
    for choice in ("auto", "none", None):
        await site.post(CHAT, {"messages": ASK, "tools": TOOLS, "tool_choice": choice})
        assert site.engine.submitted[-1].sampling.grammar is None


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}}


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_some_of_the_tools_may_be_allowed(site_with_tools: Site, mode: str):
    """The model is not even told of the others."""
    site, whole = site_with_tools, site_with_tools.engine.text.tokenizer
    for names in (["now"], ["now", "weather"]):
        status, answer = await site.post(CHAT, {"messages": ASK, "tools": TOOLS, **allowed(mode, *names)})
        assert status == 200, answer
        job = site.engine.submitted[-1]
        assert ("weather" in whole.decode(job.prompt_token_ids, skip_special_tokens=False)) == ("weather" in names)
        assert (job.sampling.grammar is not None) == (mode == "required")
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "?"}}}
    body = {"messages": ASK, "tools": [TOOLS[1], bad], **allowed("required", "f")}
    _, answer = await site.post(CHAT, body)
    assert answer["error"]["param"] == "tools[1].function.parameters", "its place in the request"


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}, {"tools": TOOLS, **allowed("auto", "now")}])
async def test_tokenize_counts_the_tools_too(site_with_tools: Site, fields: dict[str, Any]):
    """As the chat would have them: long ones are most of a prompt."""
    _, counted = await site_with_tools.post("/tokenize", {"messages": ASK, **fields})
    await site_with_tools.post(CHAT, {"messages": ASK, **fields})
    assert counted["tokens"] == site_with_tools.engine.submitted[0].prompt_token_ids


async def test_none_means_that_no_call_is_looked_for(site_with_tools: Site):
    site_with_tools.engine.reply = REPLIES["hermes"]
    _, answer = await site_with_tools.post(CHAT, {"messages": ASK, "tools": TOOLS, "tool_choice": "none"})
    assert answer["choices"][0]["message"]["content"] == REPLIES["hermes"]
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_one_call_at_a_time(site_with_tools: Site):
    site_with_tools.engine.reply = REPLIES["hermes"]
    body = {"messages": ASK, "tools": TOOLS, "parallel_tool_calls": False}
    _, answer = await site_with_tools.post(CHAT, body)
    assert [call["function"]["name"] for call in answer["choices"][0]["message"]["tool_calls"]] == ["weather"]
    assert put_together(await site_with_tools.events(CHAT, body)) == without_ids(answer["choices"][0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOLS[1]] * 129}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "wether"}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "custom", "function": {"name": "now"}}}, "tool_choice.type"),
        (allowed("auto", "now", "wether"), "tool_choice.allowed_tools.tools"),
        (allowed("auto"), "tool_choice.allowed_tools.tools"),
        (allowed("none", "now"), "tool_choice.allowed_tools.mode"),
        ({**allowed("auto", "now"), "tools": None}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "?"}}}], **REQUIRED},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
        ({"messages": called("{}", "user")}, "messages[0].tool_calls"),
        ({"messages": called("[")}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": called("[]")}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": called(r'{"city": "\ud83d"}')}, "messages"),
    ],
)  # fmt: skip
async def test_nonsense_is_refused_by_name(site_with_tools: Site, fields: dict[str, Any], param: str):
    status, answer = await site_with_tools.post(CHAT, {"messages": ASK, "tools": TOOLS, **fields})
    assert (status, answer["error"].get("param")) == (400, param), answer


@pytest.mark.parametrize("end", ["", "<think>\n"])
async def test_thoughts_are_told_apart(end: str):
    reply = "hm, rain\n</think>\n\nIt rains."
    async with running_server(text=bundle(end=end or " ")) as site:
        site.engine.reply = reply if end else "<think>\n" + reply
        _, answer = await site.post(CHAT, {"messages": ASK})
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm, rain", "It rains.")
        assert put_together(await site.events(CHAT, {"messages": ASK})) == without_ids(answer["choices"][0])
        await site.post(CHAT, {"messages": ASK, "response_format": {"type": "json_object"}})
        grammar = site.engine.submitted[-1].sampling.grammar
        assert grammar is not None
        assert grammar.thoughts == ("open" if end else "may")
        site.engine.reply = "No thoughts."
        if not end:
            _, answer = await site.post(CHAT, {"messages": ASK})
            assert answer["choices"][0]["message"] == {"role": "assistant", "content": "No thoughts.", "refusal": None}


@pytest.mark.parametrize("hidden", ["forbidden", "\\u0066orbidden", "forb\\u0069dden"])
async def test_guards_see_what_a_tool_is_called_with(hidden: str):
    guarded = {**OPEN, "guardrails": {"blocklist": ["forbidden"], "check_output": True}}
    async with running_server(guarded, text=bundle()) as site:
        site.engine.reply = f'<tool_call>{{"name": "weather", "arguments": {{"city": "{hidden}"}}}}</tool_call> more'
        body = {"messages": ASK, "tools": TOOLS}
        status, answer = await site.post(CHAT, body)
        assert (status, answer["error"]["code"]) == (403, "guardrail_blocked")
        stream = {**body, "stream": True, "return_token_ids": True, "logprobs": True}
        async with site.session.post(site.url + CHAT, json=stream) as response:
            text = await response.text()
        assert hidden not in text
        events = list(read_events(text)) if response.status == 200 else []
        choices = [choice for event in events[:-1] for choice in event["choices"]]
        sent = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
        assert "dden" not in site.engine.text.tokenizer.decode(sent, skip_special_tokens=False)
        assert response.status == 403 or "content_filter" in text
        site.engine.reply = REPLIES["hermes"]
        _, answer = await site.post(CHAT, body)
        assert put_together(await site.events(CHAT, body)) == without_ids(answer["choices"][0])


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": "forbidden"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"forbidden": {}}}}}]},
        {"messages": [*ASK, {"role": "tool", "tool_call_id": "1", "content": "forbidden"}]},
        {"messages": called('{"a": "\\u0066orbidden"}')},
    ],
)  # fmt: skip
async def test_guards_see_tools_and_their_results(fields: dict[str, Any]):
    async with running_server({**OPEN, "guardrails": {"blocklist": ["forbidden"]}}, text=bundle()) as site:
        status, answer = await site.post(CHAT, {"messages": ASK, "tools": TOOLS, **fields})
        assert (status, answer["error"]["code"]) == (403, "guardrail_blocked"), answer
        assert site.engine.submitted == []


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "now", "arguments": ', '{"a": "x"}', "}", "{", "words", "\n", "</think>"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS, max_size=10).map("".join), st.lists(st.integers(0, 90), max_size=9), st.booleans())
def test_a_stream_put_back_together_is_the_answer(text: str, cuts: list[int], guarded: bool) -> None:
    def reading() -> Reading:
        calls = TOOL_FORMATS["hermes"].reader(["now"], None)
        reader = AnswerReader(calls, ReasoningReader(opened=False))
        return Reading(reader, lambda: "id", (lambda _: False) if guarded else None)

    whole = reading()
    message = json.loads(json.dumps(_plain(whole.message(text))))
    places = sorted({cut for cut in cuts if cut < len(text)} | {0, len(text)})
    streamed = reading()
    pieces = [text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)]
    deltas = [streamed.delta(piece, last=index == len(pieces) - 1) for index, piece in enumerate(pieces)]
    events = [{"choices": [{"delta": _plain(delta), "finish_reason": None}]} for delta in deltas if delta is not None]
    put = put_together([*events, "[DONE]"])
    assert put["content"] == message["content"]
    assert put["reasoning_content"] == message.get("reasoning_content")
    assert put["tool_calls"] == (
        [call["function"] for call in message["tool_calls"]] if "tool_calls" in message else None
    )
    assert streamed.finish_reason("stop") == whole.finish_reason("stop")


def test_a_long_call_that_is_kept_back_costs_little_at_each_token() -> None:
    """All its pieces were looked through at each: forty thousand tokens took a minute."""
    reading = Reading(AnswerReader(TOOL_FORMATS["hermes"].reader(["now"], None), None), lambda: "id", lambda _: False)
    started = time.process_time()
    deltas = [reading.delta(text, last=False) for text in ('<tool_call>{"name": "now", "arguments": {"a": "', "x")]
    deltas += [reading.delta("x", last=False) for _ in range(30000)]
    assert set(deltas) == {None}
    last = reading.delta('"}}</tool_call>', last=True)
    assert last is not None
    (call,) = last.tool_calls
    assert json.loads(call.function.arguments) == {"a": "x" * 30001}
    assert time.process_time() - started < 12.0


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value)


@pytest.fixture
async def site_with_tools():
    async with running_server(text=bundle()) as site:
        assert site.engine.text.style.tools is not None
        yield site


async def test_a_template_without_tools_says_so():
    async with running_server() as site:
        status, answer = await site.post(CHAT, {"model": MODEL, "messages": ASK, "tools": TOOLS})
        assert (status, answer["error"]["param"]) == (400, "tools")
        assert "template" in answer["error"]["message"]


async def test_markers_that_are_special_tokens_are_seen(tmp_path: Path):
    """Mistral's markers are control tokens: left out of text, but not when calls are looked for."""
    first = load_text(write_byte_level(tmp_path)).tokenizer.vocab_size
    markers = ("[TOOL_CALLS]", "[ARGS]")
    added = {str(first + place): {"content": text, "special": True} for place, text in enumerate(markers)}
    source = template("mistral_named")
    special = load_text(write_byte_level(tmp_path, chat_template=source, added_tokens_decoder=added))
    assert special.tokenizer.token_id("[TOOL_CALLS]") in special.tokenizer.special_ids
    async with running_server(text=special) as site:
        site.engine.reply = REPLIES["mistral_named"]
        body = {"messages": ASK, "tools": TOOLS}
        _, answer = await site.post(CHAT, {**body, "tool_choice": "required"})
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 2
        grammar = site.engine.submitted[-1].sampling.grammar
        assert grammar is not None
        assert f"<[{first}]>" in grammar.text
        assert put_together(await site.events(CHAT, body)) == without_ids(answer["choices"][0])
        _, answer = await site.post(CHAT, {"messages": ASK})
        assert answer["choices"][0]["message"]["content"] == f"So.weather{CITY}now{{}}"


async def test_the_template_takes_further_names():
    source = "{{ mode }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with TemporaryDirectory() as folder:
        text = load_text(write_byte_level(Path(folder), chat_template=source))
    async with running_server({**OPEN, "guardrails": {"blocklist": ["forbidden"]}}, text=text) as site:
        for mode, status in (("short ", 200), ("forbidden", 403)):
            given, _ = await site.post(CHAT, {"messages": ASK, "chat_template_kwargs": {"mode": mode}})
            assert given == status
        (submitted,) = site.engine.submitted
        prompt = text.tokenizer.decode(submitted.prompt_token_ids, skip_special_tokens=False)
        assert prompt == "short Weather?"
        for name in ("messages", "tools", "add_generation_prompt"):
            status, answer = await site.post(CHAT, {"messages": ASK, "chat_template_kwargs": {name: []}})
            assert (status, answer["error"]["param"]) == (400, "chat_template_kwargs")


async def test_no_depth_of_nesting_is_an_error_of_ours(site_with_tools: Site):
    for depth in range(940, 1000, 3):
        schema = '{"items": ' * depth + "{}" + "}" * depth
        shape = f'{{"type": "json_schema", "json_schema": {{"name": "a", "schema": {schema}}}}}'
        body = f'{{"messages": [{{"role": "user", "content": "x"}}], "response_format": {shape}}}'
        async with site_with_tools.session.post(site_with_tools.url + CHAT, data=body) as response:
            assert response.status == 400
