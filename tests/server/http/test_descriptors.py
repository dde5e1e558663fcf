"""File descriptors that run out: what comes then is turned away, the log says so once, and it ends by itself."""

import contextlib
import socket
import subprocess
import sys
from urllib.request import urlopen

from tests.support.programs import ROOT
from tests.support.waiting import PATIENCE_S, wait_until

LIMIT = 96
# Of its own the server has a few, and a quarter is reserved.
MOST_CONNECTIONS = LIMIT * 3 // 4
SERVER = f"""
import asyncio, logging, resource, sys
import uvloop
from tests.support.http_server import running_server

async def serve():
    async with running_server(load=False) as site:
        resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
        print(site.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        open(sys.executable).close()

logging.basicConfig(level=logging.INFO, format="LOG %(levelname)s %(message)s", stream=sys.stdout)
uvloop.run(serve())
"""


def test_running_out_is_said_once_and_ends_by_itself() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, contextlib.ExitStack() as clients:
        url = process.stdout.readline().strip()
        place = ("127.0.0.1", int(url.rpartition(":")[2]))
        held = [clients.enter_context(socket.create_connection(place, PATIENCE_S)) for _ in range(2 * LIMIT)]
        num_ended = 0
        for connection in reversed(held):  # the last ones are ended, the first ones are kept
            if num_ended == 2 * LIMIT - MOST_CONNECTIONS:
                break
            num_ended += not _read(connection)
        assert _asks(held[0])
        clients.close()
        wait_until(lambda: _is_alive(url))
        process.stdin.close()
        said = [line for line in process.stdout if line.startswith("LOG ERROR")]
    assert process.returncode == 0, "the server has some descriptors of its own left all the time"
    assert len(said) == 1, said
    assert f"out of file descriptors (limit {LIMIT}" in said[0]


def _read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1)
    except ConnectionError:
        return b""


def _asks(connection: socket.socket) -> bool:
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    return b"200 OK" in connection.recv(4096)


def _is_alive(url: str) -> bool:
    try:
        with urlopen(f"{url}/livez", timeout=PATIENCE_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
