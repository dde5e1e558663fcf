"""A client that goes away stops its generation at once, whatever it was waiting for."""

import asyncio
import functools
import json
from typing import Any

import pytest

from tests.support.http_server import Site, running_server
from tests.support.waiting import patience, until


@pytest.fixture
async def site():
    async with running_server() as site:
        yield site


async def send(site: Site, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
    data = json.dumps({"prompt": "Hi", **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return reader, writer


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_while_nothing_has_come_aborts(site: Site, stream: bool, n: int):
    site.engine.gate.clear()
    _, writer = await send(site, {"stream": stream, "n": n})
    await until(lambda: site.engine.num_running == n)
    writer.close()
    await until(lambda: site.engine.num_running == 0)
    assert site.engine.num_aborted == n
    await until(lambda: site.admission.running == 0)


@pytest.mark.parametrize("abrupt", [False, True])
@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_midway_aborts(site: Site, n: int, abrupt: bool):
    site.engine.pause_s = 0.01
    reader, writer = await send(site, {"stream": True, "n": n, "max_tokens": 200, "ignore_eos": True})
    await reader.readuntil(b"data: ")
    if abrupt:
        writer.transport.abort()
    else:
        writer.close()
    await until(lambda: site.engine.num_running == 0)
    assert site.engine.num_aborted == n
    labels = {"endpoint": "/v1/completions", "model": "fake", "status": "499"}
    counted = functools.partial(site.metrics.registry.get_sample_value, "inferflux_requests_total", labels)
    await until(lambda: counted() == 1)


async def test_leaving_the_queue_makes_room():
    config = {"server": {"max_concurrent": 1, "max_queue": 1}, "auth": {"allow_anonymous": True}}
    async with running_server(config) as site:
        site.engine.gate.clear()
        _, first = await send(site, {})
        await until(lambda: site.engine.num_running == 1)
        _, second = await send(site, {})
        await until(lambda: sum(site.admission.waiting.values()) == 1)
        second.close()
        await until(lambda: sum(site.admission.waiting.values()) == 0)
        first.close()
        await until(lambda: site.admission.running == 0)
        assert len(site.engine.submitted) == 1


async def test_a_stop_string_aborts_what_the_engine_would_go_on_with(site: Site):
    body = {"prompt": "Hi", "max_tokens": 200, "ignore_eos": True, "stop": "count"}
    status, answer = await site.post("/v1/completions", body)
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "stop")
    assert "count" not in answer["choices"][0]["text"]
    assert (site.engine.num_running, site.engine.num_aborted) == (0, 1)


async def test_a_slow_reader_does_not_hold_up_others(site: Site):
    _, slow = await send(site, {"stream": True, "n": 16, "logprobs": 20, "max_tokens": 240, "ignore_eos": True})
    await until(lambda: len(site.engine.submitted) == 16)
    async with patience():
        assert (await site.post("/v1/completions", {"prompt": "Hi"}))[0] == 200
    slow.close()
    await until(lambda: site.engine.num_running == 0)
