"""The four offline workloads: token ids and lengths only, seeded, the same for every system under test.

single: one request, 128 in, 128 out. prefill: one request, 1024 in, 1 out. batch: 32 requests at once, 32-256 in,
32-128 out. prefix: 16 requests that share 512 tokens and have 32 of their own, 32 out. Greedy, end of sequence ignored.
"""

import random
from dataclasses import dataclass

from benchmarks.shapes import VOCAB_SIZE


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    num_output: int


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(300, VOCAB_SIZE) for _ in range(count)]


def single(seed: int) -> list[Job]:
    return [Job(_tokens(random.Random(seed), 128), 128)]


def prefill(seed: int) -> list[Job]:
    return [Job(_tokens(random.Random(seed), 1024), 1)]


def batch(seed: int) -> list[Job]:
    rng = random.Random(seed)
    return [Job(_tokens(rng, rng.randint(32, 256)), rng.randint(32, 128)) for _ in range(32)]


def prefix(seed: int) -> list[Job]:
    rng = random.Random(seed)
    shared = _tokens(rng, 512)
    return [Job(shared + _tokens(rng, 32), 32) for _ in range(16)]


WORKLOADS = {"single": single, "prefill": prefill, "batch": batch, "prefix": prefix}
