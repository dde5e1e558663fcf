"""Both generate routes: OpenAI's shapes, streamed and whole, and that the two agree."""

import math
from typing import Any

import pytest

from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar, SamplingParams
from inferflux.server.http.schemas.completions import CompletionRequest
from tests.support.fake_engine import LOGPROB, REPLY, WINDOW
from tests.support.http_server import MODEL, Site, running_server, text_bundle

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
ROUTES = {COMPLETIONS: {"prompt": "Hi", "max_tokens": 100}, CHAT: {"messages": MESSAGES}}


@pytest.fixture
async def site():
    async with running_server() as site:
        yield site


def put_together(events: list[Any], path: str) -> dict[int, dict[str, Any]]:
    """From a stream's events, each choice as the whole answer would have it."""
    choices: dict[int, dict[str, Any]] = {}
    for item in events[:-1]:
        for delta in item["choices"]:
            choice = choices.setdefault(delta["index"], {"text": "", "token_ids": [], "logprobs": [], "finish": None})
            choice["text"] += delta["text"] if path == COMPLETIONS else delta["delta"].get("content", "")
            choice["token_ids"] += delta.get("token_ids", [])
            if delta["logprobs"]:
                choice["logprobs"].append(delta["logprobs"])
            assert choice["finish"] is None, "a delta after the end"
            choice["finish"] = delta["finish_reason"]
    return choices


def join_logprobs(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]] | None:
    names = [name for name in parts[0] if parts[0][name] is not None] if parts else []
    return {name: [entry for part in parts for entry in part[name]] for name in names} or None


async def test_chat_answer_has_openai_shape(site: Site):
    status, body = await site.post(CHAT, {"model": MODEL, "messages": MESSAGES})
    assert status == 200
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", MODEL)
    assert body["system_fingerprint"].startswith("fp_")
    (choice,) = body["choices"]
    assert choice["index"] == 0
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert "token_ids" not in choice
    submitted = site.engine.submitted[0]
    num_output = len(text_bundle().tokenizer.encode(REPLY, add_special_tokens=False)) + 1
    num_prompt = len(submitted.prompt_token_ids)
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert submitted.sampling.max_tokens == WINDOW - num_prompt, "chat may fill the window"
    rendered = text_bundle().tokenizer.decode(submitted.prompt_token_ids, skip_special_tokens=False)
    assert rendered == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"


async def test_completion_answer_has_openai_shape(site: Site):
    status, body = await site.post(COMPLETIONS, {"model": MODEL, "prompt": "Hi"})
    assert status == 200
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    (choice,) = body["choices"]
    assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("length", 0, None)
    assert REPLY.startswith(choice["text"])
    assert body["usage"]["completion_tokens"] == 16, "OpenAI's default"


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"stop": ["count"]}, {"max_tokens": 3}, {"ignore_eos": True}])
@pytest.mark.parametrize("path", ROUTES)
async def test_stream_equals_whole(site: Site, path: str, extra: dict[str, Any]):
    body = {**ROUTES[path], "model": MODEL, "return_token_ids": True, "seed": 1, **extra}
    body |= {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    _, whole = await site.post(path, body)
    events = await site.events(path, body)
    assert events[-1] == "[DONE]"
    assert {event["object"] for event in events[:-1]} == (
        {"chat.completion.chunk"} if path == CHAT else {"text_completion"}
    )
    assert len({event["id"] for event in events[:-1]}) == 1
    choices = put_together(events, path)
    assert len(choices) == len(whole["choices"])
    for expected in whole["choices"]:
        got = choices[expected["index"]]
        assert got["text"] == (expected["text"] if path == COMPLETIONS else expected["message"]["content"])
        assert got["token_ids"] == expected["token_ids"]
        assert got["finish"] == expected["finish_reason"]
        expected_logprobs = {name: value for name, value in expected["logprobs"].items() if value is not None}
        assert join_logprobs(got["logprobs"]) == expected_logprobs


async def test_chat_stream_begins_with_the_role_and_ends_with_a_reason(site: Site):
    events = await site.events(CHAT, {"model": MODEL, "messages": MESSAGES})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in event["choices"][0]["delta"] for event in events[1:-1])
    assert (events[-2]["choices"][0]["delta"], events[-2]["choices"][0]["finish_reason"]) == ({}, "stop")


@pytest.mark.parametrize("path", ROUTES)
async def test_include_usage(site: Site, path: str):
    _, whole = await site.post(path, {"model": MODEL, **ROUTES[path]})
    *chunks, last, done = await site.events(path, {**ROUTES[path], "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert (last["usage"], last["choices"]) == (whole["usage"], [])
    for event in (await site.events(path, ROUTES[path]))[:-1]:
        assert "usage" not in event


async def test_prompts_of_every_kind(site: Site):
    ids = text_bundle().tokenizer.encode("Hi", add_special_tokens=True)
    for prompt, count in (("Hi", 1), (["Hi", "Ho"], 2), (ids, 1), ([ids, ids[:1]], 2)):
        site.engine.submitted.clear()
        status, body = await site.post(COMPLETIONS, {"model": MODEL, "prompt": prompt, "n": 2})
        assert status == 200, body
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * count))
        assert len(site.engine.submitted) == 2 * count
        assert site.engine.submitted[0].prompt_token_ids == site.engine.submitted[1].prompt_token_ids == ids
        assert body["usage"]["prompt_tokens"] == sum(len(one.prompt_token_ids) for one in site.engine.submitted) / 2


async def test_choices_of_a_seeded_request_differ_in_their_noise(site: Site):
    await site.post(CHAT, {"model": MODEL, "messages": MESSAGES, "n": 3, "seed": 7})
    assert sorted(one.sampling.seed for one in site.engine.submitted) == [7, 8, 9]


async def test_echo_scores_the_prompt(site: Site):
    """What lm-evaluation-harness needs: a probability for each prompt token but the first, and no output."""
    tokenizer = text_bundle().tokenizer
    prompt = "naïve café 😀"
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    body = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
    _, whole = await site.post(COMPLETIONS, body)
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
    assert whole["usage"]["completion_tokens"] == 0
    lists = choice["logprobs"]
    assert lists["token_logprobs"] == [None] + [LOGPROB] * (len(ids) - 1)
    assert lists["top_logprobs"][0] is None
    for token, top in zip(lists["tokens"][1:], lists["top_logprobs"][1:], strict=True):
        assert max(top, key=top.__getitem__) == token
    assert lists["text_offset"][0] == 0
    for token, offset in list(zip(lists["tokens"], lists["text_offset"], strict=True))[1:]:
        if not token.startswith("bytes:"):
            assert prompt[offset:].startswith(token)
    (event, _done) = [
        item for item in await site.events(COMPLETIONS, body) if item == "[DONE]" or item["choices"][0]["text"]
    ]
    assert event["choices"][0]["logprobs"] == lists


async def test_echo_repeats_the_prompt_before_the_answer(site: Site):
    tokenizer = text_bundle().tokenizer
    ids = tokenizer.encode("Hi there", add_special_tokens=True)
    for prompt in ("Hi there", ids):
        body = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 2}
        _, whole = await site.post(COMPLETIONS, body)
        (choice,) = whole["choices"]
        answer = choice["text"].removeprefix("Hi there")
        assert answer
        assert REPLY.startswith(answer)
        offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
        assert len(tokens) == len(ids) + 2
        assert offsets[len(ids)] == len("Hi there")
        assert choice["text"][offsets[-1] :] == tokens[-1]
        streamed = put_together(await site.events(COMPLETIONS, body), COMPLETIONS)[0]
        assert streamed["text"] == choice["text"]
        assert join_logprobs(streamed["logprobs"]) == choice["logprobs"]


async def test_chat_logprobs_carry_bytes(site: Site):
    _, body = await site.post(CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2})
    entries = body["choices"][0]["logprobs"]["content"]
    tokens = text_bundle().tokenizer
    data = b"".join(bytes(entry["bytes"]) for entry in entries[:-1])
    assert data.decode() == REPLY
    assert all(entry["logprob"] == LOGPROB and len(entry["top_logprobs"]) == 2 for entry in entries)
    assert entries[-1]["token"] == tokens.token_text(min(tokens.eos_token_ids))


async def test_an_impossible_token_has_a_logprob_that_json_can_carry(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.support.fake_engine.LOGPROB", -math.inf)
    _, body = await site.post(CHAT, {"messages": MESSAGES, "logprobs": True})
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_extension_fields_reach_the_engine(site: Site):
    fields = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "seed": -3, "top_p": 0.9}
    body = {"messages": MESSAGES, **fields, "stop_token_ids": [3, 4], "logit_bias": {"5": -100}, "stop": "x"}
    status, _ = await site.post(CHAT, body)
    assert status == 200
    sampling = site.engine.submitted[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (sampling.stop, sampling.stop_token_ids, sampling.logit_bias) == (("x",), (3, 4), {5: -100})


async def test_null_means_default_and_harmless_fields_are_taken(site: Site):
    names = ["temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "max_tokens", "logit_bias"]
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "tools": []}
    body = {"messages": MESSAGES, **dict.fromkeys(names), **harmless, "response_format": {"type": "text"}}
    status, answer = await site.post(CHAT, body)
    assert status == 200, answer


async def test_content_parts_and_roles(site: Site):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "d", "name": "Ann"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    status, answer = await site.post(CHAT, {"messages": messages})
    assert status == 200, answer
    rendered = text_bundle().tokenizer.decode(site.engine.submitted[0].prompt_token_ids, skip_special_tokens=False)
    turns = [("system", "Be brief."), ("user", "ab"), ("assistant", "c"), ("user", "d"), ("assistant", "No.")]
    assert rendered == "".join(f"<|start|>{role}\n{text}<|end|>\n" for role, text in turns) + "<|start|>assistant\n"


async def test_default_tokens_shrink_to_what_the_window_holds(site: Site):
    status, _ = await site.post(COMPLETIONS, {"prompt": [5] * (WINDOW - 3)})
    assert status == 200
    assert site.engine.submitted[0].sampling.max_tokens == 3


async def test_a_prompt_that_nothing_follows_may_fill_the_window(site: Site):
    status, answer = await site.post(COMPLETIONS, {"prompt": [5] * WINDOW, "max_tokens": 0, "echo": True})
    assert (status, answer["usage"]["prompt_tokens"]) == (200, WINDOW)
    status, answer = await site.post(COMPLETIONS, {"prompt": [5] * (WINDOW + 1), "max_tokens": 0, "echo": True})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


async def test_half_a_character_is_no_delta(site: Site):
    site.engine.reply = "😀" * 3  # four tokens each
    events = await site.events(CHAT, {"messages": MESSAGES})
    texts = [choice["delta"].get("content") for event in events[:-1] for choice in event["choices"]]
    assert texts == ["", "😀", "😀", "😀", None]


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json", '{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}},
            Grammar("json", '{"type": "null"}'),
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, Grammar("json", '{"type": "null"}')),
        ({"structured_outputs": {"regex": "[ab]+"}}, Grammar("regex", "[ab]+")),
        ({"structured_outputs": {"choice": ["yes", 'a "b"']}}, Grammar("lark", 'start: "yes" | "a \\"b\\""')),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, Grammar("lark", 'start: "x"')),
    ],
)
@pytest.mark.parametrize("path", ROUTES)
async def test_grammars_reach_the_engine(site: Site, path: str, fields: dict[str, Any], grammar: Grammar | None):
    status, answer = await site.post(path, {**ROUTES[path], **fields})
    assert status == 200, answer
    assert site.engine.submitted[0].sampling.grammar == grammar


async def test_many_prompts_share_what_their_fields_come_to(site: Site, monkeypatch: pytest.MonkeyPatch):
    """Checking a thousand biases for each of a thousand prompts held the event loop for seconds."""
    made = []
    sampling = CompletionRequest.sampling

    def counted(*args: Any, **options: Any) -> Any:
        made.append(args)
        return sampling(*args, **options)

    monkeypatch.setattr(CompletionRequest, "sampling", counted)
    body = {"prompt": [[5]] * 64, "max_tokens": 1, "logit_bias": {"7": 1}, "n": 2}
    assert (await site.post(COMPLETIONS, body))[0] == 200
    status, answer = await site.post(COMPLETIONS, {**body, "prompt": [[5]] * 1024})
    assert (status, answer["error"]["param"]) == (400, "n")
    assert len(made) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, True, "1", 101, -100.5, 10**400, None])
@pytest.mark.parametrize("place", [0, 500, 1023])
def test_one_bad_number_among_many_is_found(bad: Any, place: int):
    biases: dict[int, Any] = dict.fromkeys(range(1024), 1.0)
    assert SamplingParams(logit_bias=biases).logit_bias == biases
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias={**biases, place: bad})
    ids: list[Any] = [5] * 128
    ids[place % 128] = -1 if bad == 101 else bad
    with pytest.raises(RequestError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=tuple(ids))
