"""Cases of sampling: every filter alone and together, ties, large and tiny vocabularies, both ends of every range."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from inferflux.kernels.cases.case import Draw, Inputs, NamedCases, apart


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
# The order of the filters shows where one changes what the next one sees, and only in some draws: of 8 each, any wrong
# order, or a filter that sees logits without their temperature, changes 3 tokens or more.
TOGETHER: Final = (
    Rule(1.5, top_k=5, top_p=0.6),
    Rule(0.6, top_p=0.7),
    Rule(1.5, top_k=8, min_p=0.3),
    Rule(1.5, top_p=0.5, min_p=0.2),
)
EDGES: Final = (
    Rule(top_p=1e-7),
    Rule(1.3, top_k=3, top_p=1e-6),
    Rule(top_k=2**40),
    Rule(1e-5),
    Rule(2.0),
    Rule(2.0, top_k=2, min_p=1e-9),
)


def sampling_cases() -> NamedCases:
    for vocab_size in (2, 50, 1000, 32001):
        yield f"every rule, {vocab_size} tokens", _sampling(RULES, vocab_size)
    yield "ties", _sampling(RULES * 2, 100, step=0.5)
    yield "flat", _sampling(RULES, 6000, scale=0.01)
    yield "all greedy", _sampling((Rule(0.0),) * 5, 333, step=1.0)
    yield "one row", _sampling((Rule(0.8, 50, 0.95),), 32000)
    yield "most tokens held back", _sampling(RULES, 200, held_back=0.95)
    yield "filters in their order", _sampling(TOGETHER * 8, 30, scale=1.0)
    # The first and the last tokens have no mass: neither end of the noise may draw them.
    for name, uniform in (("least", 0.0), ("largest", 1 - 2.0**-53)):
        yield f"edges, {name} noise", _sampling(EDGES, 70, held_back=0.5, uniform=uniform)
    yield "many rows", _sampling(RULES * 3, 20)
    yield "a large vocabulary", _sampling((Rule(0.8), Rule(top_k=50), Rule(top_p=0.95)), 160_001)
    # Flat enough that every other draw is none of the first thousand.
    yield "a large top_k", _sampling((Rule(top_k=3000),) * 8, 6000, scale=0.3)
    yield "rows apart", _apart(_sampling(RULES, 90))


def _sampling(
    rules: tuple[Rule, ...],
    vocab_size: int,
    *,
    scale: float = 3.0,
    step: float = 0.0,
    held_back: float = 0.0,
    uniform: float | None = None,
) -> Callable[[Draw], Inputs]:
    """step: logits are rounded to multiples of it, for ties. held_back: share of tokens with a logit of -1e30.
    uniform: the noise of every row; then neither the first nor the last token has any mass."""

    def build(draw: Draw) -> Inputs:
        logits = torch.randn(len(rules), vocab_size, generator=draw.generator) * scale
        if step:
            logits = (logits / step).round() * step
        logits[torch.rand(logits.shape, generator=draw.generator) < held_back] = -1e30
        noise = torch.rand(len(rules), generator=draw.generator, dtype=torch.float64)
        if uniform is not None:
            logits[:, [0, -1]] = -1e30
            noise.fill_(uniform)
        temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rules, strict=True))
        floats = (draw.float(values) for values in (logits, temperature, top_p, min_p))
        wide_logits, temperature, top_p, min_p = floats
        return Inputs((wide_logits, temperature, top_k.to(draw.device), top_p, min_p, noise.to(draw.device)))

    return build


def _apart(build_rows: Callable[[Draw], Inputs]) -> Callable[[Draw], Inputs]:
    """The same with logits whose rows do not touch each other."""

    def build(draw: Draw) -> Inputs:
        logits, *rest = build_rows(draw).positional
        return Inputs((apart(logits), *rest))

    return build
