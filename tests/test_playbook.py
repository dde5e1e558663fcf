"""The incident playbook, drilled: each row of "When something is wrong" in docs/AdminGuide.md is caused on a small
server and mended with the guide's own commands, to the result that it states."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

PATIENCE_S = 120.0
INFERCTL = "import sys; from inferflux.ctl import main; sys.exit(main())"
ROOT_KEY, A_KEY, B_KEY = "sk-root-drill", "sk-a-drill", "sk-b-drill"
CONFIG: dict[str, Any] = {
    "server": {"http_port": 0},
    "models": [{"id": "main", "path": "stub", "default": True}],
    "auth": {
        "api_keys": [
            {"key": ROOT_KEY, "name": "root", "scopes": ["generate", "read", "admin"]},
            {"key": A_KEY, "name": "a", "tenant": "a"},
            {"key": B_KEY, "name": "b", "tenant": "b"},
        ]
    },
    # Four rows, and pages for little more than one long answer: it meets soon what a large server meets under load.
    "runtime": {"scheduler": {"max_batch_size": 4, "policy": "fcfs"}, "paged_kv": {"device_pages": 40}},
}


@dataclass
class Drill:
    """A real server in a process of its own, an administrator's shell, and clients."""

    url: str
    folder: Path
    clients: ThreadPoolExecutor

    def inferctl(self, *arguments: str, check: bool = True) -> Any:
        """Runs `inferctl ... --json` and returns what it printed."""
        environ = {**os.environ, "INFERCTL_URL": self.url, "INFERCTL_API_KEY": ROOT_KEY}
        done = subprocess.run(
            [sys.executable, "-c", INFERCTL, *arguments, "--json"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr

    def get(self, path: str) -> tuple[int, str]:
        return self.call(urllib.request.Request(self.url + path))

    def ask(self, key: str, max_tokens: int, **fields: Any) -> tuple[int, str]:
        """Sends a completion and waits for the answer; returns its status and body."""
        body = {"prompt": "Tell me of pages.", "max_tokens": max_tokens, "ignore_eos": True, **fields}
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return self.call(urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), headers))

    def asking(self, key: str, max_tokens: int) -> "Future[tuple[int, str]]":
        return self.clients.submit(self.ask, key, max_tokens)

    def call(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a series over its labels."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " ")))

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()


def until(condition: Callable[[], Any]) -> Any:
    """Waits until something holds, and returns what it said."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come about in time")


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder = tmp_path_factory.mktemp("drill")
    config = {**CONFIG, "logging": {"audit_log": str(folder / "audit.log")}}
    (folder / "server.yaml").write_text(yaml.safe_dump(config))
    with (folder / "server.log").open("w") as log, ThreadPoolExecutor(32) as clients:
        server = subprocess.Popen(
            [sys.executable, "-m", "inferflux", "serve", "--config", str(folder / "server.yaml")],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            text = (folder / "server.log").read_text
            line = until(lambda: next((one for one in text().splitlines() if "listens on" in one), None))
            drill = Drill(line.split("listens on ")[1].split(";")[0], folder, clients)
            until(lambda: drill.get("/readyz")[0] == 200)
            yield drill
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0


def test_high_latency(drill: Drill) -> None:
    """One tenant sends most: under `fair` the other's request goes first, and a rate limit turns the rest away."""
    flood = []

    def look_at_flood() -> Any:
        # More each time: the machine may answer them sooner than it starts inferctl.
        flood.extend(drill.asking(A_KEY, 150) for _ in range(48))
        pools = drill.inferctl("admin", "pools")
        return pools["pools"][0]["queue"]["engine"] > 8 and pools

    pools = until(look_at_flood)
    assert pools["pools"][0]["batch"]["running"] <= 4
    assert drill.inferctl("admin", "fairness", "set", "--policy", "fair")["policy"] == "fair"
    for _ in range(5):
        status, _ = drill.ask(B_KEY, 4)
        assert status == 200
        num_waiting = sum(not one.done() for one in flood)
        if num_waiting > 4:
            break
        # The machine was slower to start inferctl than to answer the flood.
        flood += [drill.asking(A_KEY, 150) for _ in range(24)]
        until(lambda: drill.metric("inferflux_queue_depth") > 8)
    assert num_waiting > 4, "the other tenant's request waited for the whole queue"
    assert {one.result()[0] for one in flood} == {200}

    drill.inferctl("admin", "rate-limit", "set", "1")
    statuses = [drill.ask(A_KEY, 1)[0] for _ in range(3)]
    assert statuses[-1] == 429
    drill.inferctl("admin", "rate-limit", "set", "0")
    drill.inferctl("admin", "fairness", "set", "--policy", "fcfs")


def test_memory_pressure(drill: Drill) -> None:
    """Pages run out and requests are preempted, and still each gets its whole answer; unloading frees memory."""
    crowd: list[Future[tuple[int, str]]] = []

    def is_preempted() -> bool:
        if all(one.done() for one in crowd):  # the machine may have computed them one after another
            crowd.extend(drill.asking(A_KEY, 300) for _ in range(4))
        return bool(drill.inferctl("admin", "pools")["pools"][0]["preemptions"] > 0)

    until(is_preempted)
    for answer in crowd:
        status, body = answer.result()
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 300

    drill.inferctl("admin", "models", "load", "spare", "stub")
    spare = until(lambda: ready_model(drill, "spare"))
    process = Path(f"/proc/{spare['engines'][0]['pid']}")
    assert process.exists()
    drill.inferctl("admin", "models", "unload", "spare", "--yes")
    until(lambda: not process.exists())


def test_auth_errors(drill: Drill) -> None:
    """A lost key: the log says who was refused; a new key is made, the old one is refused at once."""
    before = drill.metric("inferflux_auth_failures_total")
    assert drill.ask("sk-nobody", 1)[0] == 401
    assert drill.metric("inferflux_auth_failures_total") == before + 1
    until(lambda: "denied:unauthenticated" in (drill.folder / "audit.log").read_text())
    lost = drill.inferctl("admin", "api-keys", "create", "lost", "--scopes", "generate")
    assert drill.ask(lost["key"], 1)[0] == 200
    fresh = drill.inferctl("admin", "api-keys", "create", "fresh", "--scopes", "generate")
    drill.inferctl("admin", "api-keys", "revoke", lost["id"], "--yes")
    assert drill.ask(lost["key"], 1)[0] == 401
    assert drill.ask(fresh["key"], 1)[0] == 200
    assert lost["key"] not in drill.log + (drill.folder / "audit.log").read_text()


def test_model_churn(drill: Drill) -> None:
    """The engine is killed: not ready, then ready again by itself; a bad model is refused and the good one stays."""
    before = drill.metric("inferflux_engine_restarts_total")

    def restarts() -> float:
        return drill.metric("inferflux_engine_restarts_total") - before

    for num_killed in range(1, 6):
        os.kill(ready_model(drill, "main")["engines"][0]["pid"], signal.SIGKILL)
        status, body = until(
            lambda due=num_killed: ((seen := drill.get("/readyz"))[0] == 503 or restarts() == due) and seen
        )
        until(lambda: drill.get("/readyz")[0] == 200)
        assert restarts() == num_killed
        if status == 503:  # else it was there again before this could look
            break
    assert (status, json.loads(body)["reason"]) == (503, "engine_restarting")
    assert "engine restarted" in drill.log
    assert drill.ask(A_KEY, 1)[0] == 200

    refused = drill.inferctl("admin", "models", "load", "main", str(drill.folder / "nowhere"), check=False)
    assert "is not a folder" in refused
    assert drill.ask(A_KEY, 1)[0] == 200


def ready_model(drill: Drill, model_id: str) -> Any:
    models = drill.inferctl("admin", "models", "list")["data"]
    return next((one for one in models if one["id"] == model_id and one["state"] == "ready"), None)
