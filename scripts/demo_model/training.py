"""Trains the demo model: packed sequences of pages and chats, AdamW, a cosine schedule, float32 on the CPU.

Knows the corpus and the tokenizer; saves nothing.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from demo_model.corpus import Corpus, Message
from demo_model.vocabulary import ASSISTANT, BEGIN, END, MAX_LENGTH, SYSTEM, USER, VOCAB_SIZE, token_id

ROLE_TOKENS = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
# The model answers questions; it need not learn to ask them.
QUESTION_WEIGHT = 0.1
# Answers matter more than the pages, which are only to give it the words.
PAGE_SHARE = 0.1
# (sequence length, share of the steps): mostly short ones, and enough long ones that every position is trained.
LENGTHS = ((128, 0.3), (256, 0.44), (512, 0.15), (1024, 0.08), (MAX_LENGTH, 0.03))


@dataclass(frozen=True, slots=True)
class Recipe:
    """steps: optimizer steps of `tokens_per_step` tokens, or of one sequence that is longer.

    learning_rate: its peak, reached after `warmup` steps, or a tenth of them all if that is less.
    """

    seed: int = 20
    steps: int = 2400
    tokens_per_step: int = 1024
    learning_rate: float = 3e-3
    warmup: int = 80
    weight_decay: float = 0.05


# For a model that has learned before: enough to learn what was added and to unlearn what was changed.
REFRESHING = Recipe(steps=1000, learning_rate=1.5e-3)


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    """Returns a Llama of about three million parameters; its heads divide by 2 and 4 for tensor parallel tests."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, BEGIN),
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, END),
        rms_norm_eps=1e-5,
    )


class Packer:
    """Turns pages and chats into token ids with a loss weight each, and packs them into sequences."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._rng = rng
        self._begin, self._end = token_id(tokenizer, BEGIN), token_id(tokenizer, END)
        self._roles = {role: token_id(tokenizer, token) for role, token in ROLE_TOKENS.items()}

    def batch(self, num_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns token ids and their loss weights, both [num_rows, length + 1]."""
        rows = [self._row(length + 1) for _ in range(num_rows)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])

    def _row(self, length: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            page = self._rng.random() < PAGE_SHARE
            more = self._encode_page() if page else self._encode_chat(self._corpus.chat(self._rng))
            ids += more[0]
            weights += more[1]
        return ids[:length], weights[:length]

    def _encode_page(self) -> tuple[list[int], list[float]]:
        # Half a page's length at most, so that pages leave room for chats in every sequence.
        limit = self._rng.randint(32, 256)
        ids = self._encode(self._corpus.page_text(self._rng))
        ids = [self._begin, *ids, self._end]
        return ids[:limit], [0.0, *[1.0] * (len(ids) - 1)][:limit]

    def _encode_chat(self, messages: list[Message]) -> tuple[list[int], list[float]]:
        ids, weights = [self._begin], [0.0]
        for message in messages:
            body = [*self._encode(message["content"]), self._end]
            weight = 1.0 if message["role"] == "assistant" else QUESTION_WEIGHT
            ids += [self._roles[message["role"]], *body]
            weights += [0.0, *[weight] * len(body)]
        return ids, weights

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def new_model(tokenizer: Tokenizer, recipe: Recipe) -> LlamaForCausalLM:
    """Returns a model with random weights."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(model_config(tokenizer))


def train(
    model: LlamaForCausalLM, corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe, report: Callable[[str], None]
) -> float:
    """Trains the model (float32) where it is; returns the mean loss of the last 50 steps."""
    rng = random.Random(recipe.seed)
    packer = Packer(corpus, tokenizer, rng)
    model.train()
    optimizer = _optimizer(model, recipe)
    losses: list[float] = []
    start = time.monotonic()
    for step in range(recipe.steps):
        length = rng.choices([length for length, _ in LENGTHS], [share for _, share in LENGTHS])[0]
        ids, weights = packer.batch(max(1, recipe.tokens_per_step // length), length)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        losses.append(_train_step(model, optimizer, ids, weights))
        if (step + 1) % 50 == 0:
            mean = sum(losses[-50:]) / 50
            report(f"step {step + 1}/{recipe.steps} loss {mean:.4f} {time.monotonic() - start:.0f} s")
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def learning_rate(step: int, recipe: Recipe) -> float:
    """Returns the rate of a step: linear warm-up, then half a cosine down to 1 % of the peak."""
    warmup = min(recipe.warmup, recipe.steps // 10)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor, weights: torch.Tensor
) -> float:
    logits = model(input_ids=ids[:, :-1]).logits
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    targets = weights[:, 1:].flatten()
    loss = (losses * targets).sum() / targets.sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.97), fused=True)
