"""Structured output: how many answers to random JSON schemas validate, and what a grammar costs per token.

    python -m benchmarks.structured --schemas 500

Random weights at temperature 1: nothing but the grammar keeps an answer in shape. jsonschema is the judge. Answers cut
off by --max-tokens are counted apart, since they cannot validate. Results go to benchmarks/results/structured.json
unless --out says otherwise.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import torch

from benchmarks import record
from benchmarks.schemas import random_schema
from benchmarks.shapes import SHAPES, write_model
from inferflux import LLM, SamplingParams
from inferflux.sampling_params import Grammar


def judge(text: str, schema: dict[str, Any]) -> str | None:
    """Returns what is wrong with an answer, None when it is valid."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def measure(llm: LLM, num_schemas: int, max_tokens: int) -> dict[str, Any]:
    """Answers one prompt per schema, all at once, and judges each; then the same work without grammars."""
    schemas = [random_schema(seed) for seed in range(num_schemas)]
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed, grammar=Grammar("json", json.dumps(schema)))
        for seed, schema in enumerate(schemas)
    ]
    prompts = [[2 + seed % 200, 3] for seed in range(num_schemas)]
    start = time.perf_counter()
    answers = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    finished = [(a.text, s) for a, s in zip(answers, schemas, strict=True) if a.finish_reason == "stop"]
    faults = [fault for text, schema in finished if (fault := judge(text, schema)) is not None]
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    free = [
        msgspec.structs.replace(one, grammar=None, ignore_eos=True, max_tokens=len(answer.token_ids))
        for one, answer in zip(params, answers, strict=True)
    ]
    start = time.perf_counter()
    llm.generate(prompts, free)
    free_seconds = time.perf_counter() - start
    return {
        "schemas": num_schemas,
        "finished": len(finished),
        "valid": len(finished) - len(faults),
        "faults": faults[:20],
        "output_tokens": num_tokens,
        "tok_s_with_grammar": round(num_tokens / seconds, 1),
        "tok_s_without": round(num_tokens / free_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), SHAPES[arguments.shape], torch.float32)
        results = measure(LLM(folder, dtype="float32"), arguments.schemas, arguments.max_tokens)
    print(json.dumps(results, indent=1))
    print(record.write("structured", {arguments.shape: results}, arguments.out))


if __name__ == "__main__":
    main()
