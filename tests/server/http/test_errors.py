"""What goes wrong around a request: the shape of every error, request ids, and that no traceback gets out."""

import asyncio
import re
from typing import Any

import aiohttp
import pytest

from inferflux.errors import EngineDeadError, EngineError, RequestError
from inferflux.server.http import answer, middleware
from tests.support.http_server import MODEL, Site, running_server
from tests.support.waiting import PATIENCE_S, patience, until

PROMPT = {"model": MODEL, "prompt": "Hi"}
SHAPE = {"message", "type", "param", "code"}


@pytest.fixture
async def site():
    async with running_server() as site:
        yield site


async def test_unknown_url_and_wrong_method(site: Site):
    for path in ("/", "/v1", "/v1/chat", "/v1/completions/", "/../etc/passwd", "/v1/%2e%2e", "/ui/"):
        status, body = await site.get(path)
        assert (status, set(body["error"])) == (404, SHAPE), path
    async with site.session.delete(site.url + "/v1/completions") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert set((await response.json())["error"]) == SHAPE


async def test_unknown_model(site: Site):
    for status, body in (
        await site.post("/v1/completions", {"model": "fakes", "prompt": "Hi"}),
        await site.get("/v1/models/fakes"),
        await site.post("/tokenize", {"model": "fakes", "prompt": "Hi"}),
    ):
        assert status == 404
        assert (body["error"]["code"], body["error"]["param"]) == ("model_not_found", "model")
        assert 'did you mean "fake"?' in body["error"]["message"]


async def test_no_model_named_means_the_default(site: Site):
    status, body = await site.post("/v1/completions", {"prompt": "Hi"})
    assert (status, body["model"]) == (200, MODEL)


NOT_HTTP = [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\nX\r\n\r\n"]
NOT_HTTP += [b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n"]
NOT_HTTP += [b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 10_000 + b"\r\n\r\n"]
NOT_HTTP += [
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
]


@pytest.mark.parametrize("data", NOT_HTTP, ids=lambda data: str(data[:20]))
async def test_what_is_not_http_gets_the_same_shape(site: Site, data: bytes):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
    writer.write(data)
    head, _, body = (await asyncio.wait_for(reader.read(), PATIENCE_S)).partition(b"\r\n\r\n")
    writer.close()
    assert re.match(rb"HTTP/1\.. 400 ", head)
    assert b"x-request-id" in head.lower()
    assert b"aiohttp" not in head, "what it runs on is nobody's business"
    assert re.match(rb'\{"error":\{"message":"[^"]*","type":"invalid_request_error"', body), body


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD + b'Content-Length: 10\r\n\r\n{"prompt":"canary"}'],  # counted in characters, not in bytes
        [HEAD + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"pro\r\ncanary\r\n'],
        [HEAD + b"x-api-key: ", b"canary\x01\r\n\r\n"],
        [HEAD + b"x-api-key: " + b"canary" * 2000 + b"\r\n\r\n"],
        [HEAD + b"Authorization: Basic canary\x01\r\n\r\n"],
    ],
    ids=["length", "chunk", "in two pieces", "too long", "basic"],
)
async def test_what_is_not_http_is_logged_without_what_stands_in_it(
    site: Site, caplog: pytest.LogCaptureFixture, pieces: list[bytes]
):
    """Who looks for the reason at level debug must not find prompts and keys there."""
    caplog.set_level("DEBUG", "inferflux")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await site.get("/livez")  # meanwhile the parser sees the first piece alone
    async with patience():
        await reader.read()
    writer.close()
    assert "unreadable request: " in caplog.text
    assert "canary" not in caplog.text


async def test_a_header_that_is_too_long_is_told_apart(site: Site):
    """As an identity provider's token of somebody with many groups may be: that is valid HTTP, and only too long."""
    async with site.session.get(site.url + "/v1/models", headers={"Authorization": "Bearer " + "a" * 9000}) as response:
        assert response.status == 400
        assert "longer than 8190 bytes" in (await response.json())["error"]["message"]
    path = "/v1/models/" + "a" * 9000
    async with site.session.get(site.url + path) as response:
        assert "longer than 8190 bytes" in (await response.json())["error"]["message"]


async def test_request_ids(site: Site):
    for sane in ("abc", "A.b-c_9", "x" * 128):
        async with site.session.get(site.url + "/v1/models", headers={"X-Request-Id": sane}) as response:
            assert response.headers["x-request-id"] == sane
    seen = set()
    for odd in ("", "a b", "x" * 129, "a\tb", "ä", "<script>", "a;b"):
        async with site.session.get(site.url + "/nowhere", headers={"X-Request-Id": odd}) as response:
            assert response.headers["Server"] == "InferFlux"
            given = response.headers["x-request-id"]
            assert given != odd
            assert re.fullmatch(r"req_[0-9a-f]{32}", given)
            seen.add(given)
    assert len(seen) == 7
    async with site.session.post(
        site.url + "/v1/completions", json={**PROMPT, "stream": True}, headers={"x-request-id": "mine"}
    ) as response:
        assert response.headers["x-request-id"] == "mine"


async def test_a_refusal_may_quote_a_header_that_is_no_unicode(site: Site):
    """Such bytes come as lone surrogates, which no JSON can hold: the refusal itself failed, as a 500 under an id that
    no log had."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n")
    writer.write(b"Connection: close\r\nContent-Encoding: \xff\r\n\r\n{}")
    head, _, body = (await asyncio.wait_for(reader.read(), PATIENCE_S)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 400 ")
    assert rb"compressed (got Content-Encoding \\udcff)" in body


async def test_a_failure_of_the_error_answer_itself_has_the_requests_id(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(middleware, "problem_of", lambda *_: 1 / 0)
    async with site.session.get(site.url + "/nowhere") as response:
        assert response.status == 500
        assert (await response.json())["error"]["message"].endswith(response.headers["x-request-id"])


FAILURES: list[tuple[Exception, int, str]] = [
    (RequestError("prompt: no", param="prompt", code="c"), 400, "c"),
    (EngineDeadError("the engine process died"), 503, "engine_lost"),
    (EngineError("row failed"), 500, "engine_error"),
    (ZeroDivisionError("secret detail"), 500, "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "code"), FAILURES, ids=lambda value: str(value))
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_anything_was_sent_is_a_status(
    site: Site, error: Exception, status: int, code: str, n: int, stream: bool
):
    site.engine.fail_at, site.engine.error = 0, error
    async with site.session.post(site.url + "/v1/completions", json={**PROMPT, "n": n, "stream": stream}) as response:
        body = await response.json()
        assert (response.status, body["error"]["code"]) == (status, code)
        assert ("Retry-After" in response.headers) == (status == 503)
        assert "secret" not in str(body)
        assert "Traceback" not in str(body)
        if code == "internal_error":
            assert response.headers["x-request-id"] in body["error"]["message"]
    assert site.engine.num_running == 0


@pytest.mark.parametrize(("error", "status", "code"), FAILURES[1:], ids=lambda value: str(value))
@pytest.mark.parametrize("n", [1, 3])
async def test_a_failure_midway_is_the_last_event(site: Site, error: Exception, status: int, code: str, n: int):
    site.engine.fail_at, site.engine.error = 3, error
    *chunks, last = await site.events("/v1/completions", {**PROMPT, "n": n})
    assert chunks
    assert all("choices" in chunk for chunk in chunks)
    assert last["error"]["code"] == code
    assert set(last["error"]) == SHAPE
    assert site.engine.num_running == 0
    async with site.session.get(site.url + "/metrics") as response:
        counted = f'inferflux_requests_total{{endpoint="/v1/completions",model="fake",status="{status}"}} 1.0'
        assert counted in await response.text()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_is_408(stream: bool):
    config: dict[str, Any] = {"server": {"request_timeout_s": 0.3}, "auth": {"allow_anonymous": True}}
    async with running_server(config) as site, patience():
        site.engine.gate.clear()
        while not site.engine.submitted:  # on a slow machine the time may be over before the engine hears of it
            status, body = await site.post("/v1/completions", {"prompt": "Hi", "stream": stream})
            assert (status, body["error"]["code"]) == (408, "timeout")
        assert (site.engine.num_running, site.engine.num_aborted) == (0, 1)


async def test_a_stream_that_takes_too_long_ends_with_the_error(site: Site, monkeypatch: pytest.MonkeyPatch):
    limit = asyncio.timeout(None)
    monkeypatch.setattr(answer, "time_left", lambda _request: limit)
    site.engine.pause_s = 0.01
    streaming = asyncio.create_task(site.events("/v1/completions", {"prompt": "Hi"}))
    await until(lambda: site.engine.num_said > 2)
    site.engine.gate.clear()
    limit.reschedule(asyncio.get_running_loop().time())
    *chunks, last = await streaming
    assert chunks
    assert last["error"]["code"] == "timeout"
    assert (site.engine.num_running, site.engine.num_aborted) == (0, 1)


async def test_a_body_that_does_not_come_is_408():
    config: dict[str, Any] = {"server": {"request_timeout_s": 0.2}, "auth": {"allow_anonymous": True}}
    async with running_server(config) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), PATIENCE_S)
        writer.close()


async def test_a_full_queue_is_429_with_retry_after():
    config: dict[str, Any] = {"server": {"max_concurrent": 1, "max_queue": 1}, "auth": {"allow_anonymous": True}}
    async with running_server(config) as site:
        site.engine.gate.clear()
        tasks = [asyncio.create_task(site.post("/v1/completions", {"prompt": "Hi"})) for _ in range(2)]
        await until(lambda: site.engine.num_running + site.admission.waiting["inferflux-demo"] == 2)
        async with site.session.post(site.url + "/v1/completions", json={"prompt": "Hi"}) as response:
            assert response.status == 429
            assert 1 <= int(response.headers["Retry-After"]) <= 120
            assert (await response.json())["error"]["type"] == "rate_limit_error"
        assert (await site.get("/livez"))[0] == 200, "only what generates queues"
        site.engine.gate.set()
        assert [status for status, _ in await asyncio.gather(*tasks)] == [200, 200]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_head_is_answered_like_get(site: Site, method: str):
    async with site.session.request(method, site.url + "/livez") as response:
        assert response.status == 200


async def test_expect_continue(site: Site):
    async with site.session.post(site.url + "/v1/completions", json=PROMPT, expect100=True) as response:
        assert response.status == 200
    headers = {"Expect": "the unexpected", "x-request-id": "mine"}
    async with site.session.post(site.url + "/v1/completions", json=PROMPT, headers=headers) as response:
        assert response.status == 417
        assert response.headers["x-request-id"] == "mine"
        assert "error" in await response.json()


async def test_many_requests_on_one_connection(site: Site):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
        for stream in (True, False, True):
            async with session.post(site.url + "/v1/completions", json={**PROMPT, "stream": stream}) as response:
                assert response.status == 200
                await response.read()


@pytest.mark.parametrize(
    ("version", "length", "answer"),
    [
        ("1.1", "2", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400"),
        ("1.1", str(2**40), b"HTTP/1.1 413"),
        ("1.0", "2", b"HTTP/1.0 400"),
    ],
    ids=["goes on", "too large", "older HTTP"],
)
async def test_who_asks_before_sending_a_body_hears_what_to_do(site: Site, version: str, length: str, answer: bytes):
    """A client that is told to go on with a body that is too large sends all of it first; one of HTTP/1.0 takes the
    word for the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {length}"
    writer.write(head.encode() + b"\r\n\r\n{}")
    assert await asyncio.wait_for(reader.readexactly(len(answer)), PATIENCE_S) == answer
    writer.close()
