"""The NGINX configuration of docs/distributed.md, run by NGINX before two stand-ins: affinity, failover, streams."""

import http.client
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.ports import free_port
from tests.support.waiting import PATIENCE_S, wait_until

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")


class Replica(BaseHTTPRequestHandler):
    """Says which one it is, in two pieces with a pause between; or that it is not ready."""

    protocol_version = "HTTP/1.1"
    ready = True
    gate: threading.Event

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.ready:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        name = str(self.server.server_port).encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(name), name))
        self.wfile.flush()
        self.gate.wait(PATIENCE_S)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def replicas() -> Iterator[list[type[Replica]]]:
    """Two stand-ins, whose classes hold their state; `port` is theirs."""
    servers, kinds = [], []
    for _ in range(2):
        kind = type("One", (Replica,), {"gate": threading.Event()})
        kind.gate.set()
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        kind.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        kinds.append(kind)
    yield kinds
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def port(replicas: list[type[Replica]], tmp_path: Path) -> Iterator[int]:
    (text,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    port = free_port()
    for index, replica in enumerate(replicas):
        text = text.replace(f"10.0.0.{index + 1}:8080", f"127.0.0.1:{replica.port}")
    text = text.replace("listen 80;", f"listen 127.0.0.1:{port};")
    paths = "".join(
        f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/pid; daemon off; error_log {tmp_path}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; {paths} {text} }}"
    )
    process = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or accepts(port))
        assert process.poll() is None, (tmp_path / "error.log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait()


def accepts(port: int) -> bool:
    try:
        http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S).connect()
    except OSError:
        return False
    return True


def ask(port: int, session: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("POST", "/v1/completions", b"{}", {"X-Session-Id": session})
    response = connection.getresponse()
    assert response.status == 200
    return response.read().decode()


def test_a_session_stays_with_its_replica_until_that_is_not_ready(port: int, replicas: list[type[Replica]]) -> None:
    homes = {session: ask(port, session) for session in map(str, range(20))}
    assert len(set(homes.values())) == 2, "sessions are spread"
    assert all(ask(port, session) == home for session, home in homes.items())
    replicas[0].ready = False
    assert {ask(port, session) for session in homes} == {str(replicas[1].port)}, (
        "the other one answers, without an error"
    )


def test_a_stream_is_passed_on_as_it_comes(port: int, replicas: list[type[Replica]]) -> None:
    for replica in replicas:
        replica.gate.clear()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("POST", "/v1/completions", b"{}", {"X-Session-Id": "a"})
    first = connection.getresponse().read1()
    assert first.decode() in {str(replica.port) for replica in replicas}, "before the replica has ended its answer"
    for replica in replicas:
        replica.gate.set()
