"""KV tiers: what a prefix in a lower tier saves, what tiers cost that nothing is found in, and what the books cost.

    python -m benchmarks.kv_tiers                       # every part
    python -m benchmarks.kv_tiers --parts ttft --shapes S --prefix 4096

ttft     time to the first token of a long prompt: computed, from host memory, from the file (read from the disk: its
         pages are dropped from the system's cache first, where the system does so).
loss     output and prompt tokens per second with tiers and without, in turns, for prompts that share nothing, in a pool
         so small that every page is demoted and written.
books    page-table work of one request per step (find, admit, commit, release, demote) as cached pages grow.
quality  perplexity of the demo model on this project's docs with keys and values in 8 bits.
Writes benchmarks/results/kv_tiers.json unless --out says otherwise.
"""

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks import record
from benchmarks.shapes import SHAPES, VOCAB_SIZE, write_model
from inferflux import LLM, SamplingParams
from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.engine import Engine
from inferflux.engine.interface import Submit
from inferflux.engine.kv.lower_tiers import TierSettings
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.request import Request
from inferflux.engine.step import MoveResult

PAGE_TOKENS = 16
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
DOCS = Path(__file__).parent.parent / "docs"


def start(folder: Path, device_pages: int, cpu_pages: int, file: Path | None) -> Engine:
    tree = {
        "paged_kv": {"page_tokens": PAGE_TOKENS, "device_pages": device_pages, "cpu_pages": cpu_pages},
        "nvme_offload": {} if file is None else {"path": str(file), "max_gb": 4.0},
    }
    engine = Engine(ModelConfig(id="bench", path=str(folder)), msgspec.convert(tree, RuntimeConfig))
    while file is not None and engine.stats().tiers["nvme"].state != "on":
        engine.step()
        time.sleep(0.001)
    return engine


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300, VOCAB_SIZE) for _ in range(length)]


def first_token_s(engine: Engine, prompt: list[int]) -> float:
    begin = time.perf_counter()
    engine.submit(Submit(0, prompt, ONE_TOKEN))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begin


def settle(engine: Engine) -> None:
    """Lets everything be written that is to be."""
    while engine.kv.is_writing:
        engine.step()
        time.sleep(0.001)


def drop_from_cache(file: Path) -> None:
    """Asks the system to read the file from its disk the next time."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ttft(folder: Path, length: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """The pool holds one such prompt: computing others sends the first down."""
    pages = length // PAGE_TOKENS + 2
    times: dict[str, list[float]] = {"recomputed": [], "cpu": [], "nvme": []}
    for tier, cpu_pages, file in (("cpu", 4 * pages, None), ("nvme", 0, scratch / "kv")):
        engine = start(folder, pages, cpu_pages, file)
        first_token_s(engine, prompt_of(64, 99))
        for seed in range(rounds):
            wanted = prompt_of(length, 3 * seed)
            times["recomputed"].append(first_token_s(engine, wanted))
            first_token_s(engine, prompt_of(length, 3 * seed + 1))
            settle(engine)
            if file is not None:
                # Once more, to push it out of the host memory that pages pass through.
                first_token_s(engine, prompt_of(length, 3 * seed + 2))
                settle(engine)
                drop_from_cache(file)
            before = engine.stats().tiers[tier].hit_tokens
            seconds = first_token_s(engine, wanted)
            if engine.stats().tiers[tier].hit_tokens - before >= length - 4 * PAGE_TOKENS:
                times[tier].append(seconds)
        engine.close()
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    ratios = {f"{name}_speedup": medians["recomputed"] / medians[name] for name in ("cpu", "nvme") if name in medians}
    return {"prefix_tokens": length, "seconds": medians, **ratios, "samples": {k: len(v) for k, v in times.items()}}


def loss(folder: Path, length: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Eight prompts that share nothing at a time, 32 tokens out, in a pool that holds little more."""
    device_pages = 8 * (length + 64) // PAGE_TOKENS
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    engines = {
        "without": start(folder, device_pages, 0, None),
        "cpu": start(folder, device_pages, device_pages, None),
        "cpu_nvme": start(folder, device_pages, device_pages, scratch / "kv-loss"),
    }
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_number in range(rounds + 1):
        for name, engine in engines.items():
            begin = time.perf_counter()
            for index in range(8):
                engine.submit(Submit(index, prompt_of(length, 1000 * round_number + index), params))
            while engine.has_work:
                engine.step()
            if round_number:  # the first fills the pool
                rates[name].append(8 * (length + 32) / (time.perf_counter() - begin))
    demoted = engines["cpu_nvme"].stats().tiers["cpu"].transfer_bytes
    for engine in engines.values():
        engine.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    losses = {f"{name}_loss": 1 - medians[name] / medians["without"] for name in ("cpu", "cpu_nvme")}
    return {"tokens_per_s": medians, **losses, "demoted_mb": demoted / 1e6}


def books(num_cached: int, rounds: int) -> dict[str, Any]:
    """Half of the pages are cached on the device, half in host memory. Every move ends at once."""
    page_tokens, num_pages = 4, num_cached // 2 + 64
    settings = TierSettings(host_pages=num_cached // 2, page_bytes=1)
    kv = KVManager(num_pages, page_tokens, b"model", True, settings)
    requests = prompts(page_tokens * 32)
    for _ in range(num_cached // 32 + 2):
        serve(kv, next(requests))
    seconds = []
    for _ in range(rounds):
        request = next(requests)
        begin = time.perf_counter()
        serve(kv, request)
        seconds.append(time.perf_counter() - begin)
    return {"cached_pages": num_cached, "median_us": 1e6 * statistics.median(seconds), "max_us": 1e6 * max(seconds)}


def prompts(length: int) -> Iterator[Request]:
    rng = random.Random(0)
    params = SamplingParams(max_tokens=1)
    while True:
        tokens = [rng.randrange(2**20) for _ in range(length)]
        yield Request(0, tokens, params, seed=0, max_total_tokens=length + 1)


def serve(kv: KVManager, request: Request) -> None:
    """A whole life of a request of 32 pages: what 32 decoding steps and more do to the books."""
    assert kv.admit(request, kv.match_prefix(request), len(request.tokens), 0)
    kv.match_lower_tiers(request, 0)
    kv.commit(request, request.num_uncomputed)
    kv.release(request)
    moves, _ = kv.take_moves()
    kv.end_moves([MoveResult(move.id, 0.0) for move in moves], [])


def quality() -> dict[str, Any]:
    """Scores the docs in pieces of the model's window."""
    text = "".join((DOCS / name).read_text() for name in ("Architecture.md", "UserGuide.md"))
    scored: dict[str, list[float]] = {}
    for kind in ("auto", "int8", "fp8"):
        runtime = msgspec.convert({"dtype": "float32", "paged_kv": {"dtype": kind}}, RuntimeConfig)
        llm = LLM("stub", runtime=runtime)
        ids, window = llm.tokenizer.encode(text, add_special_tokens=True), llm.engine.info.max_model_len - 2
        pieces = [ids[first : first + window] for first in range(0, len(ids), window)]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        generations = llm.generate(pieces, params, progress=False)
        scored[kind] = [entry.logprob for each in generations for entry in each.prompt_logprobs or []]
    wide = scored["auto"]
    return {
        kind: {
            "perplexity": math.exp(-statistics.fmean(values)),
            "mean_logprob_difference": statistics.fmean(abs(a - b) for a, b in zip(values, wide, strict=True)),
            "tokens": len(values),
        }
        for kind, values in scored.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("ttft", "loss", "books", "quality"), default=None)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["S", "M"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens of ttft's prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cached", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts = arguments.parts or ("ttft", "loss", "books", "quality")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in arguments.shapes if {"ttft", "loss"} & set(parts) else ():
            folder = write_model(Path(scratch) / shape, SHAPES[shape], getattr(torch, arguments.dtype))
            if "ttft" in parts:
                results.setdefault("ttft", {})[shape] = ttft(folder, arguments.prefix, arguments.rounds, Path(scratch))
            if "loss" in parts:
                length = min(256, arguments.prefix)
                results.setdefault("loss", {})[shape] = loss(folder, length, arguments.rounds, Path(scratch))
    if "books" in parts:
        results["books"] = [books(count, 200) for count in arguments.cached]
    if "quality" in parts:
        results["quality"] = quality()
    print(record.write("kv_tiers", results, arguments.out).read_text())


if __name__ == "__main__":
    main()
