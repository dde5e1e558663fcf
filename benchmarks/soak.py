"""Soak: half an hour's worth of mixed traffic in five minutes, and a server that must be as it was before.

    python -m benchmarks.soak --seconds 300

Streams, whole answers, chats, several choices, log-probabilities, bursts, clients that close or reset, prompts and
bodies that are too large, nonsense, policies switched meanwhile. At the end nothing may run, wait or hold a page,
memory must be flat, every request must have been answered as it should, and the metrics must have counted each one.
Writes benchmarks/results/soak.json unless --out says otherwise, and leaves with 1 when one of these does not hold.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.progress import Progress

from benchmarks import live, record

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NUM_WORKERS = 12
BURST = 40
# Memory may grow by so much from the first quarter of the time to its end. In less than a minute heaps do not settle.
FLAT_MB = 24.0
LEAST_SAMPLES = 60


@dataclass
class Traffic:
    """One client of many kinds. sent: requests, by endpoint. num_unread: those whose client left before it had read
    anything, and so perhaps before the server had. wrong: what should not be."""

    client: aiohttp.ClientSession
    url: str
    rng: random.Random
    sent: Counter[str] = field(default_factory=Counter)
    num_unread: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {live.key_of(self.rng.choice(live.TENANTS))}"}

    def body(self, **fields: Any) -> dict[str, Any]:
        words = " ".join(
            self.rng.choice(("page", "cache", "key", "policy", "token")) for _ in range(self.rng.randint(1, 60))
        )
        return {"model": live.MODEL, "prompt": words, "max_tokens": self.rng.randint(1, 60), **fields}

    async def ask(self, expected: tuple[int, ...] = (200,), path: str = COMPLETIONS, **fields: Any) -> None:
        """Posts and reads all of the answer."""
        body = self.body(**fields)
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        self.sent[path] += 1
        async with self.client.post(self.url + path, json=body, headers=self.headers) as response:
            text = await response.text()
        if response.status not in expected:
            self.wrong.append(f"{response.status} instead of {expected}: {text[:200]}")
        elif response.status == 200 and fields.get("stream") and not text.endswith("data: [DONE]\n\n"):
            self.wrong.append(f"a stream without an end: {text[-200:]}")


async def stream(traffic: Traffic) -> None:
    await traffic.ask(stream=True, ignore_eos=True, priority=traffic.rng.randint(-5, 12))


async def whole(traffic: Traffic) -> None:
    await traffic.ask(temperature=0.8)


async def chat(traffic: Traffic) -> None:
    await traffic.ask(path=CHAT, stream=traffic.rng.random() < 0.5)


async def choices(traffic: Traffic) -> None:
    await traffic.ask(n=traffic.rng.randint(2, 6), logprobs=3, stream=traffic.rng.random() < 0.5)


async def scored(traffic: Traffic) -> None:
    await traffic.ask(echo=True, logprobs=1)


async def nonsense(traffic: Traffic) -> None:
    bad = {"temperature": -1}, {"prompt": 7}, {"max_tokens": 0.5}, {"nothing": True}, {"n": 99}
    await traffic.ask((400,), **traffic.rng.choice(bad))


async def too_long(traffic: Traffic) -> None:
    await traffic.ask((400,), prompt="page " * 20_000)


async def too_large(traffic: Traffic) -> None:
    traffic.sent[COMPLETIONS] += 1
    data = b'{"prompt": "' + b"x" * (17 * 2**20) + b'"}'
    try:
        async with traffic.client.post(traffic.url + COMPLETIONS, data=data, headers=traffic.headers) as response:
            if response.status != 413:
                traffic.wrong.append(f"{response.status} instead of 413")
    except aiohttp.ClientError:
        pass  # the server need not read all of it before it answers and closes


async def leave(traffic: Traffic, *, abrupt: bool, stream: bool, read: bool) -> None:
    """Sends a request and goes away, before the answer or after its first line."""
    port = int(traffic.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(
        traffic.body(stream=stream, max_tokens=200, ignore_eos=True, n=traffic.rng.randint(1, 3))
    ).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in traffic.headers.items())
    writer.write(head.encode() + b"\r\n" + data)
    await writer.drain()
    traffic.sent[COMPLETIONS] += 1
    if read and stream:
        await reader.readline()
    else:
        traffic.num_unread += 1
        await asyncio.sleep(traffic.rng.uniform(0.02, 0.2))
    if abrupt:
        writer.transport.abort()
    else:
        writer.close()


async def disconnect(traffic: Traffic) -> None:
    rng = traffic.rng
    await leave(traffic, abrupt=rng.random() < 0.5, stream=rng.random() < 0.7, read=rng.random() < 0.7)


async def burst(traffic: Traffic) -> None:
    """Many at once: some may be turned away, none may be lost."""
    kind = {"stream": traffic.rng.random() < 0.5, "max_tokens": 4}
    await asyncio.gather(*(traffic.ask((200, 429), **kind) for _ in range(BURST)))


async def switch(traffic: Traffic) -> None:
    change = {
        "policy": traffic.rng.choice(("fair", "fcfs", "priority_age", "longest_prefix")),
        "max_timeslice_tokens": traffic.rng.choice((0, 0, 16)),
    }
    headers = {"Authorization": f"Bearer {live.ADMIN}"}
    async with traffic.client.put(f"{traffic.url}/v1/admin/fairness", json=change, headers=headers) as response:
        if response.status != 200:
            traffic.wrong.append(f"fairness: {response.status}")


KINDS: tuple[tuple[Callable[[Traffic], Awaitable[None]], int], ...] = (
    (stream, 30),
    (whole, 15),
    (chat, 15),
    (choices, 8),
    (scored, 4),
    (nonsense, 8),
    (too_long, 2),
    (too_large, 1),
    (disconnect, 20),
    (burst, 1),
    (switch, 2),
)


async def work(traffic: Traffic, kind: Callable[[Traffic], Awaitable[None]], deadline: float) -> None:
    """Begins with one kind, and goes on with any."""
    kinds, weights = zip(*KINDS, strict=True)
    while time.monotonic() < deadline:
        traffic.kinds[kind.__name__] += 1
        try:
            await kind(traffic)
        except (aiohttp.ClientError, OSError) as error:
            traffic.wrong.append(f"{kind.__name__}: {error!r}")
        (kind,) = traffic.rng.choices(kinds, weights)


async def watch(server: live.Server, seconds: float, memory: dict[str, list[float]]) -> None:
    """Notes the memory of both processes while the bar runs."""
    with Progress(console=Console(stderr=True)) as bar:
        for _ in bar.track(range(int(seconds)), description="seconds"):
            await asyncio.sleep(1)
            engine = server.engine()
            memory["server"].append(server.resident_mb())
            memory["engine"].append(resident_mb(engine) if engine is not None else 0.0)


def resident_mb(process: psutil.Process) -> float:
    return round(process.memory_info().rss / 2**20, 1)


def count(samples: Mapping[str, float], path: str) -> int:
    """Requests to an endpoint that the server has counted."""
    return int(live.total(samples, "inferflux_requests_total", f'endpoint="{path}"'))


def miscounted(traffic: list[Traffic], samples: Mapping[str, float]) -> list[str]:
    """Endpoints of which the server's count is not the clients' own, in words."""
    sent = sum((one.sent for one in traffic), Counter[str]())
    unsure = {COMPLETIONS: sum(one.num_unread for one in traffic), CHAT: 0}
    counted = {path: count(samples, path) for path in unsure}
    return [
        f"{path}: {sent[path]} sent, {counted[path]} counted"
        for path, num_unread in unsure.items()
        if not sent[path] - num_unread <= counted[path] <= sent[path]
    ]


def judge(traffic: list[Traffic], samples: dict[str, float], memory: dict[str, list[float]]) -> dict[str, Any]:
    """Returns what was seen; `faults` is empty when all is as it should be."""
    sent = sum((one.sent for one in traffic), Counter[str]())
    statuses: Counter[str] = Counter()
    for sample, value in samples.items():
        if sample.startswith("inferflux_requests_total{") and ('"/v1/c' in sample):
            statuses[sample.rpartition('status="')[2].partition('"')[0]] += int(value)
    faults = [word for one in traffic for word in one.wrong]
    faults += miscounted(traffic, samples)
    for name in ("running_requests", "queue_depth", "kv_pages_in_use", "engine_restarts_total"):
        if value := live.total(samples, f"inferflux_{name}"):
            faults.append(f"inferflux_{name} is {value:.0f} at the end")
    growth = {}
    for name, values in memory.items():
        early = max(values[: max(1, len(values) // 4)])
        growth[name] = {"after_a_quarter_mb": early, "end_mb": values[-1]}
        if len(values) >= LEAST_SAMPLES and values[-1] > early + FLAT_MB:
            faults.append(f"the {name} has grown from {early} to {values[-1]} MB")
    return {
        "requests": dict(sent),
        "kinds": dict(sum((one.kinds for one in traffic), Counter[str]())),
        "statuses": dict(statuses),
        "memory": growth,
        "generation_tokens": live.total(samples, "inferflux_generation_tokens_total"),
        "preemptions": live.total(samples, "inferflux_preemptions_total"),
        "faults": faults[:20],
        "num_faults": len(faults),
    }


async def run(seconds: float, seed: int = 0) -> dict[str, Any]:
    memory: dict[str, list[float]] = {"server": [], "engine": []}
    scheduler = {"max_batch_size": 24, "max_batch_tokens": 512, "chunked_prefill_tokens": 128}
    runtime = {"scheduler": scheduler, "paged_kv": {"device_pages": 400}}
    limits = {"max_concurrent": 64, "max_queue": 64}
    async with (
        live.serving(live.configuration(runtime=runtime, server=limits)) as server,
        live.session() as client,
    ):
        traffic = [Traffic(client, server.url, random.Random(seed + number)) for number in range(NUM_WORKERS)]
        deadline = time.monotonic() + seconds
        # Each begins with another kind, so that there is some of each in the shortest time.
        workers = [work(one, kind, deadline) for one, (kind, _) in zip(traffic, itertools.cycle(KINDS), strict=False)]
        await asyncio.gather(watch(server, seconds, memory), *workers)
        samples = await live.settled(client, server.url, lambda samples: not miscounted(traffic, samples))
        return {"seconds": seconds} | judge(traffic, samples, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    live.be_nice()
    results = asyncio.run(run(arguments.seconds, arguments.seed))
    Console().print_json(data=results)
    print(record.write("soak", results, arguments.out))
    sys.exit(1 if results["num_faults"] else 0)


if __name__ == "__main__":
    main()
