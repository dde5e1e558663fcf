"""Makes inferflux/demo_model: the tiny Llama that answers questions about InferFlux and stands in for missing models.

    python scripts/train_demo_model.py              trains tokenizer and model, then checks the answers
    python scripts/train_demo_model.py --refresh    the same from the tokenizer and weights that are there: sooner
    python scripts/train_demo_model.py --check      only asks the questions of the folder that is there

CPU only, seeded; under thirty minutes on two cores that are its own. Exit status 1 when a listed question is answered
wrongly.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from demo_model.corpus import ROOT, Corpus
from demo_model.evaluation import Score, evaluate
from demo_model.training import REFRESHING, Recipe, new_model, train
from demo_model.vocabulary import save_tokenizer, train_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

FOLDER = ROOT / "inferflux" / "demo_model"
# The last norm's weights, and so all logits, are multiplied by this: greedy answers stay as they are, and an answer
# drawn at temperature 1, as for a client that sets none, is as sure as one drawn at 1/2.
SHARPNESS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Train or check the demo model.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="train nothing, only ask the questions")
    what.add_argument("--refresh", action="store_true", help="go on from the folder's tokenizer and weights")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the model is written to or read from")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {Recipe().steps}, or {REFRESHING.steps})")
    parser.add_argument("--learning-rate", type=float, help="its peak (default: the recipe's)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = REFRESHING if arguments.refresh else Recipe()
    rate = arguments.learning_rate or recipe.learning_rate
    recipe = replace(recipe, steps=arguments.steps or recipe.steps, learning_rate=rate)
    card = None if arguments.check else build(arguments.folder, recipe, arguments.refresh)
    scores = evaluate(arguments.folder)
    for score in scores:
        print(score)
        for ask, got in score.wrong:
            print(f"    {ask!r} -> {got!r}")
    if card is not None:
        write_card(arguments.folder, card, scores)
    return 1 if scores[0].wrong else 0


def build(folder: Path, recipe: Recipe, refresh: bool) -> dict[str, str]:
    """Trains tokenizer and model, writes them to `folder` and returns the model card's facts.

    refresh: the tokenizer of `folder` stays, and training begins with its weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    corpus = Corpus()
    if refresh:
        tokenizer, model = Tokenizer.from_file(str(folder / "tokenizer.json")), load_model(folder)
    else:
        tokenizer = train_tokenizer(corpus.texts())
        save_tokenizer(tokenizer, folder)
        model = new_model(tokenizer, recipe)
    loss = train(model, corpus, tokenizer, recipe, lambda line: print(line, file=sys.stderr))
    save_model(model, tokenizer, folder)
    return {
        "parameters": f"{model.num_parameters():,}",
        "weights": "bfloat16",
        "corpus SHA-256": corpus.digest,
        "began with": "the weights of the model before" if refresh else "random weights",
        "seed": str(recipe.seed),
        "steps": f"{recipe.steps} of {recipe.tokens_per_step} tokens",
        "loss at the end": f"{loss:.4f}",
        "training time": f"{(time.process_time() - start) / 60:.0f} minutes of CPU time",
        "torch": torch.__version__,
    }


def load_model(folder: Path) -> LlamaForCausalLM:
    """Returns what `save_model` wrote, in float32 and no longer sharpened."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.div_(SHARPNESS)
    return model


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, generation_config.json and sharpened bfloat16 weights, the tied output matrix once."""
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPNESS)
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    generation = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, facts: dict[str, str], scores: list[Score]) -> None:
    """Writes the model card from what was measured in this run."""
    answers = [(score.name, f"{score.right} of {score.asked} answered word for word") for score in scores]
    rows = [*facts.items(), *answers]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = f"""# The demo model

A tiny Llama that answers questions about InferFlux: the newcomer's first reply, what a missing model falls back to,
and a test oracle. It learned this project's pages and the questions in `scripts/demo_model/` by heart and knows nothing
else. Made by `python scripts/train_demo_model.py`, which writes this page too; same licence as InferFlux.

| | |
| --- | --- |
{table}

Scores are of greedy decoding with transformers in float32. Held-out questions were never seen in training.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
