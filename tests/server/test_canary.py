"""Canaries: marked keys, passphrases, prompts and terms go through a whole server in every way there is, and turn up in
nothing that it writes, answers to others, or shows in a process listing."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import psutil
import pytest
import yaml

from tests.support.served import Served, served
from tests.support.waiting import PATIENCE_S, patience

# A word that nothing here is called by, this test's own files and variables included.
MARK = "kanarie"
KEY, WRONG_KEY = f"sk-{MARK}-key-0123456789abcdef", f"sk-{MARK}-wrong-0123456789abcdef"
PASSPHRASE, PROMPT, TERM = f"{MARK} passphrase", f"{MARK} prompt", f"{MARK} term"
CHAT, COMPLETIONS, KEYS = "/v1/chat/completions", "/v1/completions", "/v1/admin/api_keys"
ALL = ["admin", "generate", "read"]


class Collector(BaseHTTPRequestHandler):
    """Keeps what the server tells an OpenTelemetry collector, as it came."""

    spans: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.spans.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_words: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[str]:
    """Returns the collector's URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def server(tmp_path: Path, collector: str) -> Iterator[Served]:
    config = {
        "server": {"enable_tracing": True},
        "guardrails": {"blocklist": [TERM], "check_output": True},
        "policy": {"store": str(tmp_path / "policy.enc")},
        "logging": {"level": "debug", "format": "json", "audit_log": str(tmp_path / "audit.log")},
    }
    # What an operator writes down with the term in it is not among the files that are searched.
    (tmp_path / "config").mkdir()
    path = tmp_path / "config" / "server.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {"INFERFLUX_POLICY_PASSPHRASE": PASSPHRASE, "INFERFLUX_API_KEYS": f"{KEY}:admin+generate+read"}
    environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector
    with served(path, tmp_path / "server.log", environment) as running:
        yield running


class Caller:
    """Sends requests and keeps what came back besides what was asked for."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.errors: list[str] = []
        self._url = url
        self._session = session

    async def send(
        self, method: str, path: str, body: Any = None, *, key: str = KEY, **options: Any
    ) -> tuple[int, str]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"x-api-key": key, **options.pop("headers", {})}
        async with self._session.request(method, self._url + path, data=data, headers=headers, **options) as response:
            text = await response.text()
            if response.status >= 400:
                self.errors.append(f"{response.status} {text} {dict(response.headers)}")
            return response.status, text

    async def lose(self, strike: Callable[[], object]) -> bool:
        """Strikes once a long stream has begun; returns whether that ended it with an error."""
        body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with self._session.post(self._url + COMPLETIONS, json=body, headers={"x-api-key": KEY}) as response:
            await response.content.readline()
            strike()
            self.errors.append((await response.text()).strip().rpartition("\n\n")[2])
        return "engine_lost" in self.errors[-1]


async def generate(call: Caller) -> None:
    """Every way for a text to come in, well formed."""
    messages = [
        {"role": "system", "content": f"{PROMPT} one"},
        {"role": "user", "content": [{"type": "text", "text": f"{PROMPT} two"}], "name": MARK},
        {"role": "assistant", "content": f"{PROMPT} three"},
        {"role": "tool", "tool_call_id": MARK, "content": f"{PROMPT} four"},
    ]
    common = {"max_tokens": 4, "user": MARK, "metadata": {MARK: MARK}, "cache_salt": MARK, "stop": [f"{MARK} stop"]}
    for stream in (False, True):
        assert (await call.send("POST", CHAT, {"messages": messages, "stream": stream, **common}))[0] == 200
        prompts = {"prompt": [f"{PROMPT} five", f"{PROMPT} six"], "stream": stream, "logprobs": 1, "echo": True}
        assert (await call.send("POST", COMPLETIONS, {**prompts, **common}))[0] == 200
    assert (await call.send("POST", "/tokenize", {"prompt": PROMPT}))[0] == 200


async def fail(call: Caller) -> None:
    """Refusals: malformed, forbidden, too long, and not HTTP-like."""
    for path in (CHAT, COMPLETIONS, "/tokenize", KEYS):
        for body in (PROMPT, [PROMPT], {"prompt": {"text": PROMPT}}, {"messages": [PROMPT]}, {"messages": PROMPT}):
            assert (await call.send("POST", path, body))[0] == 400
        for raw in (f'{{"prompt": "{PROMPT}'.encode(), f'{{"messages": [{{"{PROMPT}", 1'.encode(), PROMPT.encode()):
            assert (await call.send("POST", path, raw))[0] == 400
    assert (await call.send("POST", COMPLETIONS, {"prompt": f"{PROMPT} {TERM}"}))[0] == 403
    assert (await call.send("POST", COMPLETIONS, {"prompt": f"{PROMPT} " * 5000}))[0] == 400
    assert (await call.send("POST", COMPLETIONS, {"prompt": PROMPT, "temperature": 9}))[0] == 400
    assert (await call.send("GET", f"/v1/models?api_key={KEY}&prompt={PROMPT}", key=WRONG_KEY))[0] == 401
    assert (await call.send("GET", f"/v1/models/{KEY}", key=WRONG_KEY))[0] == 401
    assert (await call.send("GET", "/v1/models", headers={"Authorization": f"Basic {KEY}"}))[0] == 401
    assert (await call.send("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"}))[0] == 401, "two keys"
    assert (await call.send("GET", "/v1/models", headers={"x-request-id": f"{KEY} {PROMPT}"}))[0] == 200


async def administer(call: Caller) -> str:
    """Returns a key that was made; the blocklist names the term to administrators only."""
    _, made = await call.send("POST", KEYS, {"name": "app", "scopes": ALL})
    key: str = json.loads(made)["key"]
    change = {"blocklist": [TERM, f"{TERM} two"]}
    assert (await call.send("PUT", "/v1/admin/guardrails", change, key=key))[0] == 200
    assert (await call.send("PUT", "/v1/admin/guardrails", {"blocklist": [TERM, "\u200b"]}, key=key))[0] == 400
    assert (await call.send("PUT", "/v1/admin/guardrails", {"opa_endpoint": f"http://{MARK}@x"}, key=key))[0] == 400
    _, listed = await call.send("GET", KEYS)
    assert key not in listed
    assert (await call.send("DELETE", KEYS, {"id": json.loads(made)["id"]}))[0] == 200
    assert (await call.send("GET", "/v1/models", key=key))[0] == 401
    return key


async def lose_the_engine(call: Caller, server: Served) -> None:
    """Kills the engine under a running request, so that failures and restarts are logged too."""
    async with patience():
        while not await call.lose(lambda: [child.kill() for child in psutil.Process(server.process.pid).children()]):
            while (await call.send("GET", "/readyz"))[0] != 200:
                await asyncio.sleep(0.05)


async def shown(call: Caller) -> Iterator[str]:
    pages = [await call.send("GET", path) for path in ("/metrics", "/healthz", "/readyz", "/v1/models", "/nowhere")]
    return iter(text for _, text in pages)


def listing(pid: int) -> str:
    """What any user of the machine sees of the processes, and what the engine's own could give away."""
    server = psutil.Process(pid)
    lines = [" ".join(process.cmdline()) for process in (server, *server.children(recursive=True))]
    assert len(lines) == 2, "server and engine"
    lines += [Path(f"/proc/{child.pid}/environ").read_text(errors="replace") for child in server.children()]
    return "\n".join(lines)


async def test_no_canary_gets_out(server: Served, tmp_path: Path) -> None:
    seen = {"process listing": listing(server.process.pid)}
    async with aiohttp.ClientSession() as session:
        call = Caller(server.url, session)
        await generate(call)
        await fail(call)
        made = await administer(call)
        await lose_the_engine(call, server)
        seen["pages"] = "\n".join(await shown(call))
        seen["errors"] = "\n".join(call.errors)
    server.process.terminate()
    await asyncio.to_thread(server.process.wait, PATIENCE_S)
    for path in sorted(tmp_path.iterdir()):
        if path.is_file():
            seen[path.name] = path.read_bytes().decode("latin-1")
    seen["traces"] = b"".join(Collector.spans).decode("latin-1")
    assert "/v1/chat/completions" in seen["traces"]
    assert {"audit.log", "audit.log.key", "policy.enc", "policy.enc.bak", "server.log"} <= seen.keys()
    for place, text in seen.items():
        for secret in (MARK, made.split("_", 2)[2]):
            assert secret not in text, f"{place}: {text[max(0, text.find(secret) - 300) : text.find(secret) + 100]}"
