"""Kills: the engine's process is killed (SIGKILL) over and over while clients keep asking.

    python -m benchmarks.kills --rounds 20

The server must never die, and every client must get its answer or a clean error: a status, or one error event at the
end of a stream. Writes benchmarks/results/kills.json unless --out says otherwise, and leaves with 1 when one did not.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import Progress

from benchmarks import live, record


async def keep_asking(client: aiohttp.ClientSession, url: str, seed: int, replies: list[live.Reply]) -> None:
    """One client after another, streams and whole answers in turns, until it is cancelled."""
    rng = random.Random(seed)
    while True:
        body = {
            "prompt": f"Client {seed} asks: what is a page?",
            "max_tokens": rng.randint(1, 120),
            "ignore_eos": True,
            "stream": rng.random() < 0.5,
        }
        reply = await live.ask(client, url, body)
        replies.append(reply)
        if reply.outcome != "ok":
            await asyncio.sleep(0.2)  # as a client would that was told to come again


async def kill_engine(server: live.Server, rng: random.Random) -> float:
    """Waits until the server is ready, a moment longer, and kills; returns the seconds until it was ready again."""
    await live.until_ready(server)
    await asyncio.sleep(rng.uniform(0.1, 1.0))
    engine = server.engine()
    assert engine is not None, "a ready server has an engine"
    killed = engine.pid
    engine.kill()
    start = time.perf_counter()
    while (engine := server.engine()) is None or engine.pid == killed:
        await asyncio.sleep(0.02)
    await live.until_ready(server)
    return time.perf_counter() - start


async def run(num_rounds: int, num_clients: int) -> dict[str, Any]:
    replies: list[live.Reply] = []
    rng = random.Random(0)
    async with live.serving(live.configuration()) as server, live.session() as client:
        tasks = [asyncio.create_task(keep_asking(client, server.url, seed, replies)) for seed in range(num_clients)]
        back = []
        with Progress(console=Console(stderr=True)) as bar:
            for _ in bar.track(range(num_rounds), description="kills"):
                back.append(await kill_engine(server, rng))
        last = await live.ask(client, server.url, {"prompt": "Are you there?", "max_tokens": 8})
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        samples = await live.metrics(client, server.url)
        return {
            "rounds": num_rounds,
            "clients": num_clients,
            "server_lives": server.process.poll() is None and last.outcome == "ok",
            "outcomes": Counter(reply.outcome for reply in replies),
            "errors": Counter(reply.detail for reply in replies if reply.outcome == "error"),
            "broken": [reply.detail for reply in replies if reply.outcome == "broken"]
            + [repr(error) for error in ended if not isinstance(error, asyncio.CancelledError)],
            "restarts_counted": live.total(samples, "inferflux_engine_restarts_total"),
            "retries_counted": live.total(samples, "inferflux_engine_retries_total"),
            "ready_again_s": {"median": round(sorted(back)[len(back) // 2], 2), "max": round(max(back), 2)},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    live.be_nice()
    results = asyncio.run(run(arguments.rounds, arguments.clients))
    Console().print_json(data=results)
    print(record.write("kills", results, arguments.out))
    sys.exit(0 if results["server_lives"] and not results["broken"] else 1)


if __name__ == "__main__":
    main()
