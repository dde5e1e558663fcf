"""Driving a real engine in a test: submit token ids, step to the end, check the books after every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import AdapterConfig
from inferflux.engine.engine import Engine
from inferflux.engine.interface import Submit
from inferflux.engine.step import TokenLogprobs
from inferflux.sampling_params import SamplingParams


@dataclass
class Result:
    """What one request led to."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    vector: bytes | None = None


def start_engine(folder: Path, adapters: Mapping[str, Path] | None = None, **runtime: object) -> Engine:
    """Returns an engine in float32 for the folder; `runtime` are sections of the `runtime` configuration tree."""
    settings = msgspec.convert({"dtype": "float32", **runtime}, RuntimeConfig)
    return Engine(ModelConfig(id="model", path=str(folder)), settings, adapters=adapter_configs(adapters or {}))


def adapter_configs(adapters: Mapping[str, Path]) -> list[AdapterConfig]:
    return [AdapterConfig(id=name, path=str(folder), base="model") for name, folder in adapters.items()]


def run_requests(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: SamplingParams | Sequence[SamplingParams],
    first_id: int = 0,
    adapters: Sequence[str | None] | None = None,
) -> list[Result]:
    """Runs all prompts at once, checking integrity after every step; returns the results in order.

    params: all prompts', or each one's. adapters: each prompt's; None: none has one."""
    results = {first_id + index: Result() for index in range(len(prompts))}
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for index, (prompt, one, adapter) in enumerate(zip(prompts, each, adapters or [None] * len(prompts), strict=True)):
        engine.submit(Submit(first_id + index, prompt, one, adapter=adapter))
    while engine.has_work:
        for output in engine.step():
            result = results[output.request_id]
            result.token_ids += output.token_ids
            result.logprobs += output.logprobs or []
            result.finish_reason = output.finish_reason
            result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
            result.error = output.error
            result.vector = output.vector
        engine.check_integrity()
    return list(results.values())


def tokens_of(results: Sequence[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]
