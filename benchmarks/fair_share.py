"""Fair share: what one tenant's single request takes while another has hundreds waiting, under `fair` and `fcfs`.

    python -m benchmarks.fair_share

A request of bob's is timed alone first. Then alice sends 200 of half to one and a half times its length; when all have
come, bob sends another. The policy is switched at run time. No two prompts begin alike, so nothing is cached. Writes
benchmarks/results/fair_share.json unless --out says otherwise.
"""

import argparse
import asyncio
import itertools
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import Progress

from benchmarks import live, record

# About 90 tokens of the demo model.
TEXT = " Tell me about pages and what they are for." * 8


def body_of(number: int, num_tokens: int) -> dict[str, Any]:
    return {"prompt": f"{number}. request:{TEXT}", "max_tokens": num_tokens, "ignore_eos": True}


@dataclass
class Crowding:
    """What is sent: num_others requests of alice's, answers of about num_tokens, each with a number of its own."""

    url: str
    num_others: int
    num_tokens: int
    numbers: Iterator[int] = field(default_factory=itertools.count)
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    async def solo(self, client: aiohttp.ClientSession) -> float:
        """Returns the latency of one request of bob's."""
        body = body_of(next(self.numbers), self.num_tokens)
        reply = await live.ask(client, self.url, body, live.key_of("bob"))
        assert reply.outcome == "ok", reply.detail
        return reply.total_s

    def others(self, client: aiohttp.ClientSession) -> "list[asyncio.Task[live.Reply]]":
        key, low, high = live.key_of("alice"), self.num_tokens // 2, self.num_tokens * 3 // 2
        bodies = [body_of(next(self.numbers), self.chance.randint(low, high)) for _ in range(self.num_others)]
        return [asyncio.create_task(live.ask(client, self.url, body, key)) for body in bodies]

    async def num_here(self, client: aiohttp.ClientSession) -> float:
        samples = await live.metrics(client, self.url)
        return live.total(samples, "inferflux_running_requests") + live.total(samples, "inferflux_queue_depth")

    async def crowded(self, client: aiohttp.ClientSession, policy: str) -> float:
        """Returns bob's latency while alice's requests run and wait."""
        headers = {"Authorization": f"Bearer {live.ADMIN}"}
        async with client.put(f"{self.url}/v1/admin/fairness", json={"policy": policy}, headers=headers) as response:
            assert response.status == 200, await response.text()
        others = self.others(client)
        while await self.num_here(client) < self.num_others - sum(task.done() for task in others):
            await asyncio.sleep(0.02)
        seconds = await self.solo(client)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        while await self.num_here(client):
            await asyncio.sleep(0.02)
        return seconds


async def run(arguments: argparse.Namespace, batch_size: int) -> dict[str, float]:
    """Returns the medians of a server with that batch size, the default configuration otherwise."""
    config = live.configuration(runtime={"scheduler": {"max_batch_size": batch_size}})
    times: dict[str, list[float]] = {"solo": [], "fair": [], "fcfs": []}
    async with live.serving(config) as server, live.session() as client:
        crowding = Crowding(server.url, arguments.others, arguments.tokens)
        await crowding.solo(client)  # warm-up
        with Progress(console=Console(stderr=True)) as bar:
            for _ in bar.track(range(arguments.rounds), description=f"batch size {batch_size}"):
                times["solo"].append(await crowding.solo(client))
                for policy in ("fair", "fcfs"):
                    times[policy].append(await crowding.crowded(client, policy))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        **{f"{name}_s": round(seconds, 4) for name, seconds in medians.items()},
        **{f"{policy}_over_solo": round(medians[policy] / medians["solo"], 2) for policy in ("fair", "fcfs")},
        "worst_fair_over_solo": round(max(times["fair"]) / medians["solo"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, default=200, help="alice's requests")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[8, 32, 128],
        help="runtime.scheduler.max_batch_size, 128 by default",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    live.be_nice()
    sizes = {str(size): asyncio.run(run(arguments, size)) for size in arguments.batch_sizes}
    results = {"others": arguments.others, "tokens": arguments.tokens, "batch_sizes": sizes}
    Console().print_json(data=results)
    print(record.write("fair_share", results, arguments.out))


if __name__ == "__main__":
    main()
