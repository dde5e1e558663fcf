"""Clients that are slow on purpose or by misfortune: none holds memory, a connection or its pages for long."""

import asyncio
import itertools
import json
import logging
import resource
import socket
from typing import Any

import pytest

from inferflux.engine.interface import Output
from inferflux.engine.service.mailbox import MAX_UNREAD, Mailbox
from inferflux.server.http import requests, runner, sse
from inferflux.server.http.sockets import MAX_OPEN_FILES, USER_TIMEOUT_S, allow_many_connections, prepare_connection
from tests.support.http_server import Site, running_server
from tests.support.waiting import PATIENCE_S, patience, until

LARGE = {"prompt": "Hi", "stream": True, "n": 16, "logprobs": 20, "max_tokens": 240, "ignore_eos": True}


@pytest.fixture
async def site():
    async with running_server() as site:
        yield site


async def connect(site: Site, receive_buffer: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", int(site.url.rpartition(":")[2])))
    return await asyncio.open_connection(sock=sock, limit=1024)


def head(length: int) -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


async def test_a_stream_nobody_reads_pauses_and_is_dropped(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sse, "STALL_S", 0.5)
    body = json.dumps(LARGE).encode()
    _, writer = await connect(site, receive_buffer=4096)
    writer.write(head(len(body)) + body)
    await until(lambda: site.engine.num_running == 16)
    with caplog.at_level(logging.WARNING):
        await until(lambda: site.engine.num_running == 0)
        await until(lambda: "a stream was dropped" in caplog.text)
    assert site.engine.num_aborted > 0, "what had not come to its end by itself"
    await until(lambda: site.admission.running == 0)
    assert caplog.text.count("a stream was dropped") == 1
    writer.close()


async def test_a_stream_read_slowly_is_whole(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sse, "STALL_S", PATIENCE_S)  # what this machine itself stands still is no client's
    body = json.dumps({**LARGE, "n": 4}).encode()
    reader, writer = await connect(site, receive_buffer=4096)
    writer.write(head(len(body)) + body)
    received = b""
    async with patience():
        while not received.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            received += await reader.read(1 << 16)
            await asyncio.sleep(0.001)
    assert received.count(b'"finish_reason":"length"') == 4
    writer.close()


async def test_headers_must_come_to_an_end(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "HEADERS_S", 0.3)
    reader, writer = await connect(site)
    for _ in range(2):  # the second time on a connection that has served
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"}")
    writer.write(b"GET /livez HTTP/1.1\r\n")
    async with patience():
        for number in itertools.count():
            if reader.at_eof() or writer.is_closing():  # closed, or reset since it has not read all of this
                break
            writer.write(f"x-{number}: 1\r\n".encode())
            await asyncio.sleep(0.05)
    writer.close()


@pytest.mark.parametrize(("pause_s", "rate"), [(0.3, 1), (0.2, 10**6)])
async def test_a_body_must_keep_coming(site: Site, monkeypatch: pytest.MonkeyPatch, pause_s: float, rate: int):
    """Once by a pause that is too long, once by pieces that are too small."""
    monkeypatch.setattr(requests, "BODY_PAUSE_S", pause_s)
    monkeypatch.setattr(requests, "BODY_BYTES_PER_S", rate)
    reader, writer = await connect(site)
    writer.write(head(5000) + b"{")
    answer = asyncio.create_task(reader.readuntil(b"}}"))
    async with patience():
        while rate > 1 and not answer.done():
            writer.write(b" ")
            await asyncio.sleep(0.05)
        text = await answer
    assert b" 408 " in text
    assert b'"body_timeout"' in text
    writer.close()


def test_the_kernel_is_asked_to_notice_peers_that_vanish():
    class Transport(asyncio.BaseTransport):
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return sock

    with socket.socket() as sock:
        prepare_connection(Transport())
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT_S * 1000
        assert sse.STALL_S < USER_TIMEOUT_S, "the log is to say why"
    prepare_connection(Transport())  # closed by now


def test_the_limit_of_open_files_is_raised_not_lowered():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_many_connections()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert 256 < soft <= MAX_OPEN_FILES
        assert hard == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_unread_outputs_are_bounded():
    mailbox = Mailbox()
    mailbox.put(Output(1, list(range(MAX_UNREAD))))
    assert not mailbox.is_full
    mailbox.put(Output(1, [1]))
    assert mailbox.is_full
