"""A server of our own under test: started with the demo model on a free port, asked, watched, ended.

Shared by the benchmarks of behaviour under load (streams, fair_share, kills, soak). Knows how to ask and how to read
metrics; what is asked, and what counts as good, each benchmark says itself.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.children import child_process
from benchmarks.ports import free_port

ADMIN = "sk-benchmark-admin-0123456789"
TENANTS = ("alice", "bob", "carol")
MODEL = "demo"


def key_of(tenant: str) -> str:
    return f"sk-benchmark-{tenant}-0123456789"


def configuration(**sections: Any) -> dict[str, Any]:
    """Returns a configuration with the demo model, an administrator and three tenants. sections: replace whole ones."""
    keys: list[dict[str, Any]] = [
        {"key": key_of(name), "name": name, "tenant": name, "max_priority": 100} for name in TENANTS
    ]
    keys.append({"key": ADMIN, "name": "admin", "scopes": ["admin", "generate", "read"], "max_priority": 100})
    return {
        "models": [{"id": MODEL, "path": "stub"}],
        "auth": {"api_keys": keys},
        "logging": {"level": "error"},
        **sections,
    }


@dataclass
class Server:
    """A running server. log: what it wrote to standard error."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def engine(self) -> psutil.Process | None:
        """Returns the engine's process, if it lives."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if any("engine.service.host" in word for word in child.cmdline()):
                    return child
        return None

    def resident_mb(self) -> float:
        """Memory of the server's own process."""
        return round(psutil.Process(self.process.pid).memory_info().rss / 2**20, 1)


@asynccontextmanager
async def serving(config: Mapping[str, Any]) -> AsyncIterator[Server]:
    """Starts a server and waits until it is ready; ends it with SIGTERM."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        path, log = Path(scratch) / "server.yaml", Path(scratch) / "server.log"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "inferflux", "serve", "--config", str(path), "--port", str(port)]
        with log.open("wb") as output, child_process(command, stdout=subprocess.DEVNULL, stderr=output) as process:
            server = Server(f"http://127.0.0.1:{port}", process, log)
            await until_ready(server)
            yield server


async def until_ready(server: Server, limit_s: float = 120.0) -> None:
    deadline = time.perf_counter() + limit_s
    async with aiohttp.ClientSession() as session:
        while time.perf_counter() < deadline:
            if server.process.poll() is not None:
                raise RuntimeError(f"the server left with status {server.process.returncode}: {server.log.read_text()}")
            try:
                async with session.get(f"{server.url}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.05)
    raise TimeoutError(f"the server was not ready within {limit_s:.0f} s")


@asynccontextmanager
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client session without a limit on connections or time."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as client:
        yield client


@dataclass
class Reply:
    """What came of one request. outcome: ok, error (said cleanly: a status, or one event at the end) or broken (a
    connection or a stream that ended without a word). first_s, total_s: seconds to the first event and to the end."""

    outcome: str
    detail: str = ""
    num_tokens: int = 0
    first_s: float = 0.0
    total_s: float = 0.0


async def ask(client: aiohttp.ClientSession, url: str, body: Mapping[str, Any], key: str = ADMIN) -> Reply:
    """Posts a completion, streamed if the body says so, and judges how it ended."""
    start = time.perf_counter()
    try:
        async with client.post(
            f"{url}/v1/completions", json={"model": MODEL, **body}, headers={"Authorization": f"Bearer {key}"}
        ) as response:
            if response.status != 200:
                code = (await response.json())["error"]["code"]
                return Reply("error", f"{response.status} {code}")
            reply = await (_read_stream(response, start) if body.get("stream") else _read_whole(response))
    except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        return Reply("broken", repr(error))
    reply.total_s = time.perf_counter() - start
    return reply


async def _read_whole(response: aiohttp.ClientResponse) -> Reply:
    return Reply("ok", num_tokens=(await response.json())["usage"]["completion_tokens"])


async def _read_stream(response: aiohttp.ClientResponse, start: float) -> Reply:
    reply = Reply("broken", "the stream ended without a word")
    async for line in response.content:
        if line.startswith(b"data: {"):
            reply.first_s = reply.first_s or time.perf_counter() - start
            if line.startswith(b'data: {"error"'):
                reply.outcome, reply.detail = "error", json.loads(line[6:])["error"]["code"]
            elif b'"usage":{' in line:
                reply.num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        elif line.startswith(b"data: [DONE]"):
            reply.outcome, reply.detail = "ok", ""
    return reply


async def metrics(client: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Returns every sample of /metrics by its name with labels."""
    async with client.get(f"{url}/metrics") as response:
        text = await response.text()
    return {name: float(value) for name, value in re.findall(r"^([a-z]\S*(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


def total(samples: Mapping[str, float], name: str, *labels: str) -> float:
    """Returns the sum of a metric's samples that have all these `label="value"` words."""
    return sum(
        value
        for sample, value in samples.items()
        if sample.partition("{")[0] == name and all(label in sample for label in labels)
    )


async def settled(
    client: aiohttp.ClientSession,
    url: str,
    counted: Callable[[Mapping[str, float]], bool] = lambda _samples: True,
    limit_s: float = 60.0,
) -> dict[str, float]:
    """Waits until nothing runs, waits or holds a page any more and what is to be counted is; returns the last metrics
    either way."""
    deadline = time.monotonic() + limit_s
    while True:
        samples = await metrics(client, url)
        busy = sum(total(samples, f"inferflux_{name}") for name in ("running_requests", "queue_depth"))
        calm = not busy and not total(samples, "inferflux_kv_pages_in_use") and counted(samples)
        if calm or time.monotonic() > deadline:
            return samples
        await asyncio.sleep(0.2)


def be_nice() -> None:
    """The load comes from this machine only because there is no other: it should not take the server's time."""
    os.nice(5)
