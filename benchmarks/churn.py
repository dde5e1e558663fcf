"""Churn: edits of the registry while clients stream, with real engines. How many requests failed, what memory was held.

    python -m benchmarks.churn                                     # 30 edits, 16 clients
    python -m benchmarks.churn --edits 6 --clients 4 --max-tokens 20

Starts a server that follows a registry of its own, and edits that file: a model is added, another swapped, the default
moved, the file broken, the first model removed. Each client streams one answer after the other from the model that
stays, from the one that is swapped, from the default, or from the one that comes and goes (where 404, or 503 while it
is loaded, is the right answer before the first byte). Memory is the resident memory of the server and all its engines.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
from rich.console import Console

from benchmarks import record
from benchmarks.children import child_process
from benchmarks.ports import free_port
from benchmarks.serving import percentiles, until_ready

STEADY, SWAPPED, GUEST = "steady", "swapped", "guest"
TARGETS = (STEADY, SWAPPED, None, SWAPPED, STEADY, None, SWAPPED, GUEST)
BROKEN = (
    "models: [{id: steady, pa",
    "models: [{id: a, path: stub}, {id: a, path: stub}]",
    "models: [{id: a, pth: stub}]",
)
EDIT_LIMIT_S = 300.0
KEY = "churn-0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {KEY}"}


class Edit(NamedTuple):
    kind: str
    text: str
    fit: bool = True


@dataclass
class Tally:
    """What the clients saw."""

    num_answers: Counter[str] = field(default_factory=Counter)
    num_away: int = 0
    failures: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)


@dataclass
class Memory:
    """Samples while the edits run. engines: the most processes of one model, and of all."""

    peak_bytes: int = 0
    most_engines: Counter[str] = field(default_factory=Counter)


def registry_text(*, version: int, guest: bool = False, default: str = STEADY) -> str:
    models: list[dict[str, Any]] = [
        {"id": STEADY, "path": "stub"},
        {"id": SWAPPED, "path": "stub", "max_model_len": 1024 + version},
    ]
    models += [{"id": GUEST, "path": "stub"}] if guest else []
    return json.dumps({"models": [{**model, "default": model["id"] == default} for model in models]})


def edits() -> Iterator[Edit]:
    for version in itertools.count(1):
        yield Edit("add", registry_text(version=version - 1, guest=True))
        yield Edit("swap", registry_text(version=version, guest=True))
        yield Edit("default", registry_text(version=version, guest=True, default=SWAPPED))
        yield Edit("broken", BROKEN[version % len(BROKEN)], fit=False)
        yield Edit("remove", registry_text(version=version, default=SWAPPED))


async def stream(session: aiohttp.ClientSession, url: str, target: str | None, max_tokens: int, tally: Tally) -> None:
    """Streams one answer and notes how it went."""
    body = {"prompt": "InferFlux is", "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "temperature": 0}
    start = last = time.perf_counter()
    ended, num_events = False, 0
    async with session.post(f"{url}/v1/completions", json=body | ({"model": target} if target else {})) as response:
        if response.status in (404, 503) and target == GUEST:
            tally.num_away += 1
            await asyncio.sleep(0.2)
            return
        if response.status != 200:
            tally.failures.append(f"{target}: {response.status}: {(await response.text())[:200]}")
            return
        async for line in response.content:
            if b'"error"' in line:
                tally.failures.append(f"{target}: {line.decode()[:200]}")
                return
            ended = ended or line.startswith(b"data: [DONE]")
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                (tally.gaps if num_events else tally.ttft).append(now - (last if num_events else start))
                last, num_events = now, num_events + 1
    if not ended:
        tally.failures.append(f"{target}: the stream ended without its end mark after {num_events} events")
    tally.num_answers[target or "default"] += 1


async def client(url: str, target: str | None, max_tokens: int, tally: Tally, stop: asyncio.Event) -> None:
    async with aiohttp.ClientSession(headers=HEADERS, timeout=aiohttp.ClientTimeout(total=None)) as session:
        while not stop.is_set():
            try:
                await stream(session, url, target, max_tokens, tally)
            except (aiohttp.ClientError, OSError) as error:
                tally.failures.append(f"{target}: {error!r}")


async def apply(session: aiohttp.ClientSession, url: str, path: Path, edit: Edit) -> float:
    """Writes the file and waits for what the registry says of it; returns the seconds that took."""
    written, start = time.time(), time.perf_counter()
    path.write_text(edit.text, encoding="utf-8")
    wanted = "registry_applied" if edit.fit else "registry_refused"
    while time.perf_counter() - start < EDIT_LIMIT_S:
        async with session.get(f"{url}/v1/admin/models") as response:
            events = (await response.json())["events"]
        if any(event["event"] == wanted and event["time"] >= written for event in events):
            return time.perf_counter() - start
        await asyncio.sleep(0.05)
    raise TimeoutError(f"the edit {edit.kind} was not {wanted} within {EDIT_LIMIT_S:.0f} s: {events[-5:]}")


def resident(server: psutil.Process) -> int:
    total = 0
    for process in (server, *server.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


async def sample(session: aiohttp.ClientSession, url: str, server: psutil.Process, memory: Memory) -> None:
    while True:
        async with session.get(f"{url}/v1/admin/models") as response:
            models = (await response.json())["data"]
        running = {one["id"]: sum(engine["pid"] is not None for engine in one["engines"]) for one in models}
        for model_id, count in (*running.items(), ("all", sum(running.values()))):
            memory.most_engines[model_id] = max(memory.most_engines[model_id], count)
        memory.peak_bytes = max(memory.peak_bytes, resident(server))
        await asyncio.sleep(0.1)


@asynccontextmanager
async def server(registry: Path, poll_interval_ms: int) -> AsyncIterator[tuple[str, psutil.Process]]:
    config = {
        "auth": {"api_keys": [{"key": KEY, "scopes": ["admin", "generate"]}]},
        "logging": {"level": "warning"},
        "registry": {"path": str(registry), "poll_interval_ms": poll_interval_ms},
        "runtime": {"paged_kv": {"device_pages": 2048}},
    }
    path, port = registry.with_name("server.yaml"), free_port()
    path.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "inferflux", "serve", "--config", str(path), "--port", str(port)]
    with child_process(command) as process:
        url = f"http://127.0.0.1:{port}"
        await until_ready(url, process)
        yield url, psutil.Process(process.pid)


async def churn(url: str, path: Path, process: psutil.Process, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs clients and edits side by side."""
    tally, memory, stop = Tally(), Memory(), asyncio.Event()
    seconds: dict[str, list[float]] = {}
    async with aiohttp.ClientSession(headers=HEADERS) as session, asyncio.TaskGroup() as group:
        sampler = group.create_task(sample(session, url, process, memory))
        targets = itertools.islice(itertools.cycle(TARGETS), arguments.clients)
        clients = [group.create_task(client(url, one, arguments.max_tokens, tally, stop)) for one in targets]
        for edit in itertools.islice(edits(), arguments.edits):
            seconds.setdefault(edit.kind, []).append(round(await apply(session, url, path, edit), 2))
            await asyncio.sleep(arguments.pause_s)
        stop.set()
        await asyncio.gather(*clients)
        sampler.cancel()
    return {
        "edits": arguments.edits,
        "clients": arguments.clients,
        "answers": dict(tally.num_answers),
        "away": tally.num_away,
        "num_failures": len(tally.failures),
        "failures": tally.failures[:5],
        "edit_s": seconds,
        "ttft_s": percentiles(tally.ttft),
        "inter_event_s": percentiles(tally.gaps),
        "most_engines": dict(memory.most_engines),
        "peak_bytes": memory.peak_bytes,
    }


async def unload(url: str, path: Path, process: psutil.Process) -> dict[str, Any]:
    """Measures a load and an unload alone: the processes and the memory before, with the model, and after."""
    stages: dict[str, Any] = {}
    async with aiohttp.ClientSession(headers=HEADERS) as session:
        for stage, guest in (("before", False), ("loaded", True), ("after", False)):
            await apply(session, url, path, Edit(stage, registry_text(version=0, guest=guest) + " " * len(stages)))
            await _until_calm(session, url)
            stages[stage] = {"bytes": resident(process), "processes": len(process.children(recursive=True))}
    return stages


async def _until_calm(session: aiohttp.ClientSession, url: str) -> None:
    """Waits until nothing loads or drains."""
    while True:
        async with session.get(f"{url}/v1/admin/models") as response:
            models = (await response.json())["data"]
        if all([engine["state"] for engine in one["engines"]] == ["ready"] for one in models):
            return
        await asyncio.sleep(0.1)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "registry.yaml"
        path.write_text(registry_text(version=0), encoding="utf-8")
        async with server(path, arguments.poll_interval_ms) as (url, process):
            async with aiohttp.ClientSession(headers=HEADERS) as session:
                await _until_calm(session, url)
            results = await churn(url, path, process, arguments)
            return {**results, "unload": await unload(url, path, process)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--pause-s", type=float, default=1.0, help="between an edit that is in force and the next")
    parser.add_argument("--poll-interval-ms", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(run(arguments))
    Console().print_json(data=results)
    print(record.write("churn", results, arguments.out))
    if results["num_failures"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
