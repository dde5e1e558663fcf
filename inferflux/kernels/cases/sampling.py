"""Cases of sampling: every filter alone and together, ties, large and tiny vocabularies."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from inferflux.kernels.cases.case import Draw, Inputs, NamedCases


class Rule(NamedTuple):
    """Sampling settings: (temperature, top_k, top_p, min_p)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


RULES: Final = (
    Rule(0.0),
    Rule(),
    Rule(0.7),
    Rule(top_k=1),
    Rule(top_k=5),
    Rule(1.3, top_k=40),
    Rule(top_p=0.9),
    Rule(top_p=0.1),
    Rule(0.5, top_p=0.999),
    Rule(min_p=0.1),
    Rule(min_p=1.0),
    Rule(0.9, top_k=20, top_p=0.8, min_p=0.05),
    Rule(0.0, top_k=3, top_p=0.5),
)


def sampling_cases() -> NamedCases:
    for vocab_size in (2, 50, 1000, 32001):
        yield f"every rule, {vocab_size} tokens", _sampling(RULES, vocab_size)
    yield "ties", _sampling(RULES * 2, 100, step=0.5)
    yield "flat", _sampling(RULES, 6000, scale=0.01)
    yield "all greedy", _sampling((Rule(0.0),) * 5, 333, step=1.0)
    yield "one row", _sampling((Rule(0.8, 50, 0.95),), 32000)
    yield "most tokens held back", _sampling(RULES, 200, held_back=0.95)


def _sampling(
    rules: tuple[Rule, ...], vocab_size: int, *, scale: float = 3.0, step: float = 0.0, held_back: float = 0.0
) -> Callable[[Draw], Inputs]:
    """step: logits are rounded to multiples of it, for ties. held_back: share of tokens with a logit of -1e30."""

    def build(draw: Draw) -> Inputs:
        logits = torch.randn(len(rules), vocab_size, generator=draw.generator) * scale
        if step:
            logits = (logits / step).round() * step
        logits[torch.rand(logits.shape, generator=draw.generator) < held_back] = -1e30
        uniform = torch.rand(len(rules), generator=draw.generator, dtype=torch.float64)
        temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rules, strict=True))
        floats = (draw.float(values) for values in (logits, temperature, top_p, min_p))
        wide_logits, temperature, top_p, min_p = floats
        return Inputs((wide_logits, temperature, top_k.to(draw.device), top_p, min_p, uniform.to(draw.device)))

    return build
