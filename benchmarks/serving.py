"""Serving: throughput and latencies of a running InferFlux server over HTTP, beside the same work offline.

    python -m benchmarks.serving --shape S --mode burst            # 32 requests at once, as benchmarks.offline's batch
    python -m benchmarks.serving --shape S --mode poisson --rate 4 --requests 100
    python -m benchmarks.serving --shape S --mode closed --concurrency 16 --requests 100 --quantization int8

Starts the server itself (or takes --url of one that runs), streams every answer, counts tokens by the server's usage
figures and writes benchmarks/results/serving.json unless --out says otherwise.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import record
from benchmarks.children import child_process
from benchmarks.offline import Run, inferflux, measure
from benchmarks.ports import free_port
from benchmarks.shapes import SHAPES, write_model
from benchmarks.workloads import Job, batch

MODEL_ID = "bench"
OFFLINE = "offline_output_tok_s"  # of the same round's requests


@dataclass
class Answer:
    """One request's times in seconds, from its sending. gaps: between one delivery of tokens and the next."""

    ttft: float = 0.0
    total: float = 0.0
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


async def ask(session: aiohttp.ClientSession, url: str, job: Job) -> Answer:
    body = {
        "model": MODEL_ID,
        "prompt": job.prompt,
        "max_tokens": job.num_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer, start = Answer(), time.perf_counter()
    last = start
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            answer.error = f"{response.status}: {(await response.text())[:200]}"
            return answer
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if b'"usage":{' in line:
                answer.num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                continue
            now = time.perf_counter()
            if answer.ttft == 0.0:
                answer.ttft = now - start
            else:
                answer.gaps.append(now - last)
            last = now
    answer.total = time.perf_counter() - start
    return answer


async def drive(url: str, jobs: list[Job], arguments: argparse.Namespace) -> tuple[list[Answer], float]:
    """Sends the jobs as the mode says; returns the answers and the seconds from first sending to last answer."""
    answers: list[Answer] = []
    slots = asyncio.Semaphore(arguments.concurrency if arguments.mode == "closed" else len(jobs))
    rng = random.Random(0)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=len(jobs))
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:

            async def one(job: Job) -> None:
                try:
                    answers.append(await ask(session, url, job))
                except (aiohttp.ClientError, OSError) as error:
                    answers.append(Answer(error=repr(error)))
                finally:
                    slots.release()
                    bar.advance(task)

            start = time.perf_counter()
            for job in jobs:
                if arguments.mode == "poisson":
                    await asyncio.sleep(rng.expovariate(arguments.rate))
                await slots.acquire()
                group.create_task(one(job))
    return answers, time.perf_counter() - start


def summarise(answers: list[Answer], seconds: float, goodput_ttft_s: float) -> dict[str, Any]:
    good = [answer for answer in answers if answer.error is None]
    return {
        "requests": len(answers),
        "errors": [answer.error for answer in answers if answer.error][:5],
        "num_errors": len(answers) - len(good),
        "seconds": seconds,
        "output_tok_s": sum(answer.num_tokens for answer in good) / seconds,
        "goodput_req_s": sum(answer.ttft <= goodput_ttft_s for answer in good) / seconds,
        "ttft_s": percentiles([answer.ttft for answer in good]),
        "inter_token_s": percentiles([gap for answer in good for gap in answer.gaps]),
        "end_to_end_s": percentiles([answer.total for answer in good]),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": values[0], "p90": values[0], "p99": values[0]} if values else {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 5), "p90": round(cuts[89], 5), "p99": round(cuts[98], 5)}


@asynccontextmanager
async def server(folder: Path, dtype: str, quantization: str | None) -> AsyncIterator[tuple[str, float]]:
    """Starts a server on a free port; yields its URL and the seconds it took to be ready."""
    port = free_port()
    kind = {"dtype": dtype, "quantization": quantization}
    config = {
        "models": [{"id": MODEL_ID, "path": str(folder), "default": True, "max_model_len": 2048, **kind}],
        "auth": {"allow_anonymous": True},
        "logging": {"level": "warning"},
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "server.yaml"
        path.write_text(json.dumps(config))
        start = time.perf_counter()
        command = [sys.executable, "-m", "inferflux", "serve", "--config", str(path), "--port", str(port)]
        with child_process(command) as process:
            url = f"http://127.0.0.1:{port}"
            await until_ready(url, process)
            yield url, time.perf_counter() - start


async def until_ready(url: str, process: "subprocess.Popen[bytes]", limit_s: float = 300.0) -> None:
    deadline = time.perf_counter() + limit_s
    async with aiohttp.ClientSession() as session:
        while time.perf_counter() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server left with status {process.returncode}")
            try:
                async with session.get(f"{url}/readyz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(0.05)
    raise TimeoutError(f"{url} was not ready within {limit_s:.0f} s")


def jobs_for(arguments: argparse.Namespace, seed: int) -> list[Job]:
    if arguments.mode == "burst":
        return batch(seed)
    jobs: list[Job] = []
    while len(jobs) < arguments.requests:
        jobs += batch(seed + len(jobs))
    return jobs[: arguments.requests]


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = arguments.cache / f"{arguments.shape}-{arguments.dtype}"
    if arguments.url:
        answers, seconds = await drive(arguments.url, jobs_for(arguments, 0), arguments)
        return summarise(answers, seconds, arguments.goodput_ttft_s)
    write_model(folder, SHAPES[arguments.shape], getattr(torch, arguments.dtype))
    async with server(folder, arguments.dtype, arguments.quantization) as (url, ready_s):
        await drive(url, batch(999)[:2], arguments)  # warm-up
        offline = offline_twin(folder, arguments)
        rounds = []
        for seed in range(arguments.rounds):
            answers, seconds = await drive(url, jobs_for(arguments, seed), arguments)
            rounds.append(summarise(answers, seconds, arguments.goodput_ttft_s))
            if offline:
                rounds[-1][OFFLINE] = measure(offline, "batch", seed)["output_tok_s"]
    return {"ready_s": round(ready_s, 3), "rounds": rounds}


def offline_twin(folder: Path, arguments: argparse.Namespace) -> Run | None:
    """Returns what runs a round's very jobs without a server, in turns with it; None where that is not asked for."""
    if arguments.mode != "burst" or arguments.no_offline:
        return None
    offline = inferflux(folder, arguments.dtype, arguments.quantization)
    offline(batch(999)[:2])
    return offline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server that serves a model under the id 'bench'")
    parser.add_argument("--shape", choices=list(SHAPES), default="S")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantization", choices=["int8", "int4", "fp8"])
    parser.add_argument("--mode", choices=["burst", "closed", "poisson"], default="burst")
    parser.add_argument("--rate", type=float, default=2.0, help="poisson: requests per second")
    parser.add_argument("--concurrency", type=int, default=16, help="closed: requests in flight")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--goodput-ttft-s", type=float, default=5.0, help="latest first token that counts")
    parser.add_argument("--no-offline", action="store_true", help="skip the offline twin of burst mode")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "inferflux-bench-models")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kind = {"dtype": arguments.dtype, "quantization": arguments.quantization}
    results = {"mode": arguments.mode, "shape": arguments.shape, **kind}
    results |= asyncio.run(run(arguments))
    pairs = [(one["output_tok_s"], one[OFFLINE]) for one in results.get("rounds", []) if OFFLINE in one]
    if pairs:
        results["http_over_offline"] = round(statistics.median(online / offline for online, offline in pairs), 4)
    Console().print_json(data=results)
    print(record.write("serving", results, arguments.out))


if __name__ == "__main__":
    main()
