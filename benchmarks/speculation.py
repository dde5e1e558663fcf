"""Speculative decoding: what draft tokens bring, by how many of them are right.

    python -m benchmarks.speculation --shape S --dtype bfloat16

Eight requests one by one, then 8 and 32 at once, first without drafts, whose answers are kept; then, in turns, with
drafts of which every one is right with a given chance, taken from those answers. So the figures say what a proposer of
such a hit rate gives on this machine, whatever the text; the best round counts. other_answers: how many differed from
the first ones, which only rounding may cause, where products of another number of rows are computed another way.
Results go to benchmarks/results/speculation.json unless --out says otherwise.
"""

import argparse
import json
import operator
import random
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import record
from benchmarks.shapes import SHAPES, VOCAB_SIZE, write_model
from inferflux import LLM, SamplingParams
from inferflux.config import RuntimeConfig
from inferflux.config.tree import SpeculativeConfig
from inferflux.engine.request import Request

BATCHES = (1, 8, 32)
CHANCES = (0.0, 0.5, 0.8, 0.95)
NUM_PROMPT, NUM_OUTPUT = 128, 64
# Requests that are served in a turn, one batch after another: the speed of one alone is mostly luck with its drafts.
LEAST_SERVED = 8


class Hearsay:
    """Proposes what requests said before, each token right with a chance."""

    def __init__(self) -> None:
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.begin(0.0)

    def begin(self, chance: float) -> None:
        """From now on each token is right with that chance; of one chance the same ones in every turn."""
        self._chance, self._random = chance, random.Random(0)

    def propose(self, request: Request, count: int) -> list[int]:
        answer = self.answers[tuple(request.prompt_token_ids)][request.num_output_tokens :][:count]
        return [token if self._random.random() < self._chance else (token + 1) % VOCAB_SIZE for token in answer]


def measure(folder: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    plain = LLM(folder, dtype=dtype, max_model_len=512)
    runtime = RuntimeConfig(speculative_decoding=SpeculativeConfig(enabled=True))
    drafting = LLM(folder, dtype=dtype, max_model_len=512, runtime=runtime)
    hearsay = Hearsay()
    assert drafting.engine.speculator is not None
    drafting.engine.speculator.propose = hearsay.propose
    results = []
    for size in BATCHES:
        rng = random.Random(size)
        batches = [[prompt_of(rng) for _ in range(size)] for _ in range(max(1, LEAST_SERVED // size))]
        answers = [answers_of(plain, batch) for batch in batches]
        for batch, answer in zip(batches, answers, strict=True):
            hearsay.answers |= zip(map(tuple, batch), answer, strict=True)
        best: dict[str, float] = {}
        num_others = 0
        for _ in range(rounds):
            for chance in (None, *CHANCES):
                llm = plain if chance is None else drafting
                hearsay.begin(chance or 0.0)
                started = time.perf_counter()
                found = [answers_of(llm, batch) for batch in batches]
                speed = size * len(batches) * NUM_OUTPUT / (time.perf_counter() - started)
                num_others += sum(map(operator.ne, chain(*found), chain(*answers)))
                name = "none" if chance is None else str(chance)
                best[name] = max(best.get(name, 0.0), round(speed, 1))
        results.append({"requests": size, "output_tok_s_by_chance": best, "other_answers": num_others})
    return results


def prompt_of(rng: random.Random) -> list[int]:
    return [rng.randrange(300, VOCAB_SIZE) for _ in range(NUM_PROMPT)]


def answers_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0, ignore_eos=True)
    return [out.token_ids for out in llm.generate(prompts, params, progress=False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="S")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model", SHAPES[arguments.shape], getattr(torch, arguments.dtype))
        results = measure(folder, arguments.dtype, arguments.rounds)
    found = {"shape": arguments.shape, "dtype": arguments.dtype, "requests": results}
    record.write("speculation", found, arguments.out)
    Console().print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
