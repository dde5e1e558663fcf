"""Fair share: what one tenant's single request takes while another has hundreds waiting, under `fair` and `fcfs`.

    python -m benchmarks.fair_share

Bob's request is timed alone first. Then alice sends 200, as many wait as do not fit into the batch, and bob sends his
again; the policy is switched at run time. Writes benchmarks/results/fair_share.json unless --out says otherwise.
"""

import argparse
import asyncio
import statistics
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import Progress

from benchmarks import live, record


def body_of(number: int, num_tokens: int) -> dict[str, Any]:
    return {"prompt": f"Request {number}: tell me about pages.", "max_tokens": num_tokens, "ignore_eos": True}


async def latency_of_bob(client: aiohttp.ClientSession, url: str, num_tokens: int) -> float:
    reply = await live.ask(client, url, body_of(0, num_tokens), live.key_of("bob"))
    assert reply.outcome == "ok", reply.detail
    return reply.total_s


async def crowded(client: aiohttp.ClientSession, url: str, policy: str, num_others: int, num_tokens: int) -> float:
    """Returns bob's latency while alice's requests run and wait."""
    headers = {"Authorization": f"Bearer {live.ADMIN}"}
    async with client.put(f"{url}/v1/admin/fairness", json={"policy": policy}, headers=headers) as response:
        assert response.status == 200, await response.text()
    bodies = (body_of(number + 1, num_tokens) for number in range(num_others))
    others = [asyncio.create_task(live.ask(client, url, body, live.key_of("alice"))) for body in bodies]
    while live.total(await live.metrics(client, url), "inferflux_running_requests") == 0:
        await asyncio.sleep(0.02)
    seconds = await latency_of_bob(client, url, num_tokens)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    while live.total(await live.metrics(client, url), "inferflux_running_requests"):
        await asyncio.sleep(0.02)
    return seconds


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    scheduler = {"max_batch_size": arguments.batch_size}
    config = live.configuration(runtime={"scheduler": scheduler})
    num_tokens, rounds = arguments.tokens, arguments.rounds
    results: dict[str, Any] = {"others": arguments.others, "tokens": num_tokens, "batch_size": arguments.batch_size}
    async with live.serving(config) as server, live.session() as client:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("rounds", total=3 * rounds)
            times: dict[str, list[float]] = {"solo": [], "fair": [], "fcfs": []}
            await latency_of_bob(client, server.url, num_tokens)  # warm-up
            for _ in range(rounds):
                times["solo"].append(await latency_of_bob(client, server.url, num_tokens))
                bar.advance(task)
                for policy in ("fair", "fcfs"):
                    others = arguments.others
                    times[policy].append(await crowded(client, server.url, policy, others, num_tokens))
                    bar.advance(task)
        for name, values in times.items():
            results[f"{name}_s"] = round(statistics.median(values), 4)
        for policy in ("fair", "fcfs"):
            results[f"{policy}_over_solo"] = round(results[f"{policy}_s"] / results["solo_s"], 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, default=200, help="alice's requests")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--batch-size", type=int, default=8, help="runtime.scheduler.max_batch_size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    live.be_nice()
    results = asyncio.run(run(arguments))
    Console().print_json(data=results)
    print(record.write("fair_share", results, arguments.out))


if __name__ == "__main__":
    main()
