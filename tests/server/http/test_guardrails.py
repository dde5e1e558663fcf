"""Guardrails over HTTP: every text a caller sends, answers whole and streamed, and changes at run time."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from inferflux.engine.interface import Output
from inferflux.sampling_params import SamplingParams
from inferflux.server.access.jwks import FetchError
from inferflux.server.generation import INLINE_ALTERNATIVES
from inferflux.server.http.input_guard import texts_of_tools
from inferflux.server.http.outbound import OutboundClient
from inferflux.server.policy.opa import PolicyServiceError
from tests.support.fake_engine import REPLY
from tests.support.http_server import KEY, MODEL, Site, running_server

TERM = "forbidden fruit"
ADMIN = {"x-api-key": KEY}
PATH = "/v1/admin/guardrails"


def config(**guardrails: Any) -> dict[str, Any]:
    auth = {"api_keys": [{"key": KEY, "scopes": ["admin", "generate", "read"]}]}
    return {"models": [{"id": MODEL, "path": "stub"}], "auth": auth, "guardrails": guardrails}


async def complete(site: Site, prompt: Any = "Hi", **fields: Any) -> tuple[int, Any]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 100, **fields}
    return await site.post("/v1/completions", body, headers=ADMIN)


async def chat(site: Site, *messages: dict[str, Any]) -> tuple[int, Any]:
    return await site.post("/v1/chat/completions", {"model": MODEL, "messages": messages}, headers=ADMIN)


def blocked(site: Site, reason: str) -> float | None:
    return site.metrics.registry.get_sample_value("inferflux_guardrail_blocks_total", {"reason": reason})


def assert_refused(answer: tuple[int, Any]) -> None:
    status, body = answer
    assert (status, body["error"]["code"]) == (403, "guardrail_blocked")
    assert "fruit" not in str(body)


USER = {"role": "user", "content": "Hi"}
PARTS = [{"type": "text", "text": "for"}, {"type": "text", "text": "bidden fruit"}]


async def test_every_text_of_a_request_is_checked() -> None:
    async with running_server(config(blocklist=[TERM])) as site:
        prompts: list[Any] = [f"a {TERM.upper()}", ["Hi", f"x {TERM} y"]]
        prompts.append(site.engine.text.tokenizer.encode(f"x {TERM}", add_special_tokens=False))
        for prompt in prompts:
            assert_refused(await complete(site, prompt))
        messages = [
            {"role": "system", "content": TERM},
            {"role": "user", "content": PARTS},
            {"role": "assistant", "content": TERM},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": TERM}]},
            {"role": "tool", "content": TERM, "tool_call_id": "x"},
            {"role": "user", "content": "Hi", "name": TERM},
        ]
        for message in messages:
            assert_refused(await chat(site, message, USER))
        assert blocked(site, "blocklist") == len(prompts) + len(messages)
        assert site.engine.submitted == []
        assert (await complete(site))[0] == 200
        assert (await chat(site, USER))[0] == 200


@pytest.mark.parametrize(
    "shape",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [TERM]}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "description": TERM, "schema": {}}}},
        {"structured_outputs": {"choice": ["yes", f"the {TERM}"]}},
        {"structured_outputs": {"regex": TERM}},
        {"structured_outputs": {"json": {"const": TERM}}},
        {"structured_outputs": {"json": '{"const": "forbidden\\u0020fruit"}'}},
    ],
)
async def test_what_an_answer_is_made_to_say_is_checked(shape: dict[str, Any]) -> None:
    async with running_server(config(blocklist=[TERM])) as site:
        assert_refused(await complete(site, **shape))
        answer = await site.post("/v1/chat/completions", {"model": MODEL, "messages": [USER], **shape}, headers=ADMIN)
        assert_refused(answer)
        assert site.engine.submitted == []


@pytest.mark.parametrize(
    "shape",
    [
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a"]}}}},
        {"structured_outputs": {"choice": ["a"]}},
    ],
)
async def test_names_of_the_apis_fields_are_no_texts(shape: dict[str, Any]) -> None:
    """A term like "json" or "text" would refuse every request that has such a field, whatever it says."""
    words = ["text", "type", "schema", "strict", "description", "json", "json_object", "regex", "grammar", "choice"]
    async with running_server(config(blocklist=words)) as site:
        assert (await complete(site, **shape))[0] == 200


def test_texts_come_in_order() -> None:
    definition = {"name": "f", "steps": ["a", {"b": ["c", 1]}, "d"]}
    assert texts_of_tools([definition]) == ["name", "f", "steps", "a", "b", "c", "1", "d"]


def test_numbers_and_keys_are_texts_too() -> None:
    """A chat template writes them out for the model as it does strings."""
    definition = {"type": "function", "function": {"name": "f", "parameters": {"enum": [4111111111111111, 0.5, True]}}}
    assert {"4111111111111111", "0.5", "parameters", "f"} <= set(texts_of_tools([definition]))


async def test_a_number_that_an_answer_is_made_to_say_is_checked() -> None:
    async with running_server(config(blocklist=["4111111111111111"])) as site:
        assert_refused(await complete(site, structured_outputs={"json": {"const": 4111111111111111}}))
        assert site.engine.submitted == []


@pytest.mark.parametrize("beside", ["1", "NaN", "-Infinity", "1e999", str(10**400), "[" * 600 + "]" * 600])
async def test_a_calls_arguments_are_checked_as_the_template_reads_them(beside: str) -> None:
    """Beside a term behind escapes, what a stricter reader of JSON gives up at and a chat template does not."""
    arguments = f'{{"beside": {beside}, "said": "forbidden\\u0020fruit"}}'
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    async with running_server(config(blocklist=[TERM])) as site:
        assert_refused(await chat(site, USER, {"role": "assistant", "content": None, "tool_calls": [call]}))
        assert site.engine.submitted == []


async def test_answers_are_checked_whole() -> None:
    async with running_server(config(blocklist=["count: 1"], check_output=True)) as site:
        assert_refused(await complete(site))
        assert_refused(await complete(site, n=2))
        assert blocked(site, "output_blocklist") == 2
        assert site.engine.num_running == 0


@pytest.mark.parametrize(("before", "hidden"), [('{"a": "', '\\u0063ount: 1"}'), ('["', 'count\\u003A\\n1"]')])
async def test_a_term_behind_escapes_of_json_is_found(before: str, hidden: str) -> None:
    async with running_server(config(blocklist=["count: 1"], check_output=True)) as site:
        site.engine.reply = before + hidden
        assert_refused(await complete(site))
        body = {"model": MODEL, "messages": [USER]}
        assert_refused(await site.post("/v1/chat/completions", body, headers=ADMIN))
        events = await site.events("/v1/chat/completions", body, headers=ADMIN)
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1])
        assert text == before
        assert events[-2]["choices"][0]["finish_reason"] == "content_filter"


async def test_streamed_answers_end_before_the_term() -> None:
    async with running_server(config(blocklist=["count: 1"], check_output=True)) as site:
        body = {"model": MODEL, "prompt": "Hi", "max_tokens": 100}
        events = await site.events("/v1/completions", body, headers=ADMIN)
        text = "".join(event["choices"][0]["text"] for event in events[:-1])
        assert REPLY.startswith(text)
        assert "count" not in text
        assert events[-2]["choices"][0]["finish_reason"] == "content_filter"
        assert events[-1] == "[DONE]"
        assert blocked(site, "output_blocklist") == 1
        site.engine.reply = "count: 1"
        assert_refused(await complete(site, stream=True))


async def test_a_refusal_beside_another_choices_first_words_is_on_record(tmp_path: Path) -> None:
    """Two choices have deltas in the same turn of the loop: one is refused, the other opens the stream all the same."""
    log = tmp_path / "audit.log"
    settings = config(blocklist=["count: 1"], check_output=True) | {"logging": {"audit_log": str(log)}}
    async with running_server(settings) as site:
        tokenizer = site.engine.text.tokenizer
        words = {"refused": "count: 1", "passed": "Hello"}

        def at_once(prompt: list[int], _sampling: SamplingParams) -> list[Output]:
            asked = tokenizer.decode(prompt, skip_special_tokens=True)
            said = tokenizer.encode(words[asked], add_special_tokens=False)
            return [Output(1, token_ids=said, finish_reason="length", queue_s=0.001)]

        site.engine.outputs = at_once  # type: ignore[method-assign]
        body = {"model": MODEL, "prompt": list(words), "max_tokens": 100}
        events = await site.events("/v1/completions", body, headers=ADMIN)
        assert "count" not in str(events)
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert [(one["decision"], one["status"]) for one in lines if one["kind"] == "request"] == [
        ("denied:output_blocklist", 403)
    ]


async def test_a_stream_that_passes_is_whole() -> None:
    async with running_server(config(blocklist=["absent"], check_output=True)) as site:
        _, answer = await complete(site, logprobs=1)
        body = {"model": MODEL, "prompt": "Hi", "max_tokens": 100}
        events = await site.events("/v1/completions", body, headers=ADMIN)
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == answer["choices"][0]["text"] == REPLY


async def test_alternatives_to_a_token_are_checked() -> None:
    """The engine of these tests offers the ids that follow a token's own as the next likeliest."""

    def tokens_of(answer: Any) -> Any:
        chat, completion, echo = answer
        yield from ((one["token"] for one in entry["top_logprobs"]) for entry in chat["logprobs"]["content"])
        yield from (one for lists in (completion, echo) for one in lists["logprobs"]["top_logprobs"] if one is not None)

    async def ask(site: Site) -> list[Any]:
        body = {"model": MODEL, "messages": [USER], "max_tokens": 100, "logprobs": True, "top_logprobs": 20}
        answers = [
            await site.post("/v1/chat/completions", body, headers=ADMIN),
            await complete(site, logprobs=20),
            await complete(site, 2 * REPLY, logprobs=20, echo=True),
        ]
        assert [status for status, _ in answers] == [200] * 3
        assert 20 * len(answers[2][1]["choices"][0]["logprobs"]["tokens"]) > INLINE_ALTERNATIVES
        return [answer["choices"][0] for _, answer in answers]

    async with running_server(config(blocklist=[], check_output=True)) as site:
        before = await ask(site)
        offered = sorted({token for tokens in tokens_of(before) for token in tokens if token.isalpha()}, key=len)
        term = next(token for token in reversed(offered) if token.lower() not in REPLY.lower())
        assert (await put(site, {"blocklist": [f"contains:{term}"]}))[0] == 200
        after = await ask(site)
        for old, new in zip(tokens_of(before), tokens_of(after), strict=True):
            assert list(new) == [token for token in old if term.lower() not in token.lower()]
        events = await site.events(
            "/v1/completions", {"model": MODEL, "prompt": "Hi", "max_tokens": 100, "logprobs": 20}, headers=ADMIN
        )
        lists = [event["choices"][0]["logprobs"] for event in events[:-1]]
        streamed = [top for part in lists if part for top in part["top_logprobs"]]
        assert streamed == after[1]["logprobs"]["top_logprobs"]


async def put(site: Site, body: Any) -> tuple[int, Any]:
    async with site.session.put(site.url + PATH, json=body, headers=ADMIN) as response:
        return response.status, await response.json()


async def test_changes_hold_from_the_next_request_and_keep_what_they_do_not_name() -> None:
    async with running_server(config(on_error="allow")) as site:
        assert (await complete(site, TERM))[0] == 200
        status, changed = await put(site, {"blocklist": [TERM]})
        expected = {"blocklist": [TERM], "opa_endpoint": None, "on_error": "allow", "check_output": False}
        assert (status, changed) == (200, expected)
        assert_refused(await complete(site, TERM))
        assert await put(site, {"check_output": True}) == (200, expected | {"check_output": True})
        assert await site.get(PATH, headers=ADMIN) == (200, expected | {"check_output": True})
        assert (await put(site, {"blocklist": []}))[0] == 200
        assert (await complete(site, TERM))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        {"blocklist": ["\u200b"]},
        {"blocklist": "x"},
        {"opa_endpoint": "opa"},
        {"opa_endpoint": "http://opa..svc/allow"},
        {"on_error": "maybe"},
        {"terms": []},
    ],
)
async def test_bad_changes_change_nothing(body: Any) -> None:
    async with running_server(config(blocklist=[TERM])) as site:
        assert (await put(site, body))[0] == 400
        assert_refused(await complete(site, TERM))


@pytest.mark.parametrize("host", ["opa..svc", "a" * 64, "none.invalid", "127.0.0.1:1"])
async def test_a_host_that_cannot_be_asked_is_a_service_that_failed(host: str) -> None:
    """A store of an earlier version may hold a name that is none."""
    async with OutboundClient() as outbound:
        with pytest.raises((PolicyServiceError, TimeoutError)):
            await outbound.post(f"http://{host}/allow", b"{}", 100)
        with pytest.raises((FetchError, TimeoutError)):
            await outbound.fetch(f"http://{host}/keys", 100)


async def test_an_answer_that_is_not_http_is_told_without_what_stands_in_it() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: canary\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as service, OutboundClient() as outbound:
        port = service.sockets[0].getsockname()[1]
        with pytest.raises(PolicyServiceError, match="not valid HTTP") as caught:
            await outbound.post(f"http://127.0.0.1:{port}/allow", b"{}", 100)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("field", [{"temperature": 9}, {"stop": [""]}, {"logit_bias": {"5": 500}}, {"min_tokens": 200}])
async def test_a_field_out_of_range_is_told_before_the_policy_service_is_asked(field: dict[str, Any]) -> None:
    """Which fails here, and would have the caller look for what is forbidden in the request."""
    async with running_server(config(opa_endpoint="http://127.0.0.1:1/allow")) as site:
        body = {"messages": [USER], "max_tokens": 100, **field}
        for status, answer in (
            await complete(site, **field),
            await site.post("/v1/chat/completions", body, headers=ADMIN),
        ):
            assert (status, answer["error"]["param"]) == (400, next(iter(field)))
        assert blocked(site, "opa_error") in (None, 0)


async def test_the_policy_service_is_asked_over_http() -> None:
    asked: list[Any] = []
    results: list[Any] = [True, False, "true", True]

    async def decide(request: web.Request) -> web.Response:
        asked.append((await request.json())["input"])
        return web.json_response({"result": results[len(asked) - 1]})

    app = web.Application()
    app.router.add_post("/v1/data/inferflux/allow", decide)
    async with TestServer(app) as service:
        endpoint = str(service.make_url("/v1/data/inferflux/allow"))
        async with running_server(config(opa_endpoint=endpoint, opa_timeout_ms=60_000)) as site:
            assert (await complete(site, temperature=0.5, logit_bias={"5": 1.0}))[0] == 200
            assert_refused(await complete(site))
            assert_refused(await complete(site))
            assert (blocked(site, "opa"), blocked(site, "opa_error")) == (1, 1)
            assert asked[0]["texts"] == ["Hi"]
            assert asked[0]["model"] == MODEL
            parameters = {"max_tokens": 100, "temperature": 0.5, "logit_bias": {"5": 1.0}}
            assert asked[0]["parameters"] == parameters
            await service.close()
            assert_refused(await complete(site))
            assert (await put(site, {"on_error": "allow"}))[0] == 200
            assert (await complete(site))[0] == 200
            failures = site.metrics.registry.get_sample_value("inferflux_opa_failures_total")
            assert (blocked(site, "opa_error"), failures) == (2, 3), "one was let pass, and counts as a failure, too"
