"""A workload that puts every tier to use, and an engine to play it: for tests that compare tiers with none."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import DistributedConfig
from inferflux.engine.engine import Engine
from inferflux.engine.executor import Executor
from inferflux.engine.interface import Submit
from inferflux.engine.kv.rates import Rates
from inferflux.engine.stats import TierStats
from inferflux.engine.step import TokenLogprobs
from inferflux.sampling_params import SamplingParams
from tests.support.waiting import wait_until

# Differences of log-probabilities that rounding cannot turn round.
CLEAR = {"float32": 1e-3, "bfloat16": 0.25}
PAGE_TOKENS = 8


@dataclass
class Script:
    """One request: when it comes, and after how many of its tokens its caller leaves (None: stays)."""

    arrival: int
    prompt: list[int]
    params: SamplingParams
    leaves_after: int | None = None


@dataclass
class Said:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


def make_workload(seed: int, num_requests: int) -> list[Script]:
    """Requests that share prefixes of every length, in bursts, some of them given up."""
    rng = random.Random(seed)
    stems = [[rng.randrange(5, 300) for _ in range(160)] for _ in range(6)]
    scripts = []
    for index in range(num_requests):
        prompt = rng.choice(stems)[: rng.randrange(8, 160)] + [rng.randrange(5, 300) for _ in range(rng.randrange(6))]
        # The long ones find that they cannot all grow.
        max_tokens = 64 if rng.random() < 0.1 else rng.randrange(1, 13)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=2)
        leaves_after = rng.randrange(1, 12) if rng.random() < 0.1 else None
        scripts.append(Script(index // 8 * 12, prompt, params, leaves_after))
    return scripts


def settings_of(folder: Path, dtype: str, **runtime: Any) -> tuple[ModelConfig, RuntimeConfig]:
    paged_kv = {"page_tokens": PAGE_TOKENS, **runtime.pop("paged_kv", {})}
    scheduler = {"max_batch_size": 6, "max_batch_tokens": 96, "chunked_prefill_tokens": 40}
    tree = {"dtype": dtype, "paged_kv": paged_kv, "scheduler": scheduler, **runtime}
    return ModelConfig(id="tiny", path=str(folder)), msgspec.convert(tree, RuntimeConfig)


def start(folder: Path, dtype: str, **runtime: Any) -> Engine:
    return Engine(*settings_of(folder, dtype, **runtime))


def run(engine: Engine, scripts: list[Script]) -> list[Said]:
    """Plays the workload, checking the books after every few steps."""
    said = [Said() for _ in scripts]
    step = submitted = 0
    while submitted < len(scripts) or engine.has_work:
        while submitted < len(scripts) and scripts[submitted].arrival <= step:
            engine.submit(Submit(submitted, scripts[submitted].prompt, scripts[submitted].params))
            submitted += 1
        for output in engine.step():
            one = said[output.request_id]
            one.tokens += output.token_ids
            one.logprobs += output.logprobs or []
            limit = scripts[output.request_id].leaves_after
            if limit is not None and len(one.tokens) >= limit:
                engine.abort([output.request_id])
        step += 1
        if step % 8 == 0:
            engine.check_integrity()
    engine.check_integrity()
    return said


def assert_same(actual: list[Said], expected: list[Said], dtype: str) -> None:
    num_sure = 0
    for got, true in zip(actual, expected, strict=True):
        for index, (token, other) in enumerate(zip(got.tokens, true.tokens, strict=False)):
            (_, best), (_, second) = true.logprobs[index].top[:2]
            if token != other:
                assert best - second < CLEAR[dtype], f"token {index}: {token}, not {other}"
                break
            num_sure += 1
    num_all = sum(len(true.tokens) for true in expected)
    assert num_sure > 0.8 * num_all, "too little was compared"


def drain(engine: Engine) -> None:
    """Lets the chores end, as an idle engine does."""
    wait_until(lambda: not engine.kv.is_writing, engine.step)


def tier(engine: Engine, name: str) -> TierStats:
    return engine.stats().tiers[name]


def wait_for_file(engine: Engine, state: str = "on") -> None:
    wait_until(lambda: tier(engine, "nvme").state == state, engine.step)


def follow(executor: Executor) -> None:
    for _ in executor.follow():
        pass
    executor.close()


def play_on_ranks(
    distributed: DistributedConfig,
    folder: Path,
    runtime: dict[str, Any],
    scripts: list[Script],
    overlap: bool,
) -> tuple[list[Said], dict[str, TierStats]] | None:
    """A job for a `World`: plays the workload twice, the second time with all of it in the lower tiers.

    Pages are loaded wherever they are found: what is faster for a tiny model depends on who else uses the machine.
    """
    model, settings = settings_of(folder, "float32", **runtime)
    if distributed.rank > 0:
        follow(Executor(model, settings, distributed))
        return None
    engine = Engine(model, settings, distributed, overlap=overlap)
    wait_for_file(engine)
    with patch.object(Rates, "prefers_load", lambda self, tier, page_tokens, now: True):
        said = run(engine, scripts)
        drain(engine)
        said += run(engine, scripts)
    stats = engine.stats().tiers
    engine.close()
    return said, stats


def states_around(
    distributed: DistributedConfig, folder: Path, runtime: dict[str, Any], cure: Callable[[], None]
) -> list[str] | None:
    """A job: what rank 0 says of the file once its own is open, and after `cure` when that has helped."""
    model, settings = settings_of(folder, "float32", **runtime)
    if distributed.rank > 0:
        follow(Executor(model, settings, distributed))
        return None
    engine = Engine(model, settings, distributed)
    own = Path(settings.nvme_offload.path or "")
    wait_until(own.exists, engine.step)
    for _ in range(50):
        engine.step()
    states = [tier(engine, "nvme").state]
    cure()
    wait_for_file(engine)
    states.append(tier(engine, "nvme").state)
    engine.close()
    return states
