"""Asks the demo model its questions with transformers' greedy decoding and counts the right answers.

Knows a finished model folder and the questions; trains nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.questions import Question, read_off_topic, read_questions

MAX_NEW_TOKENS = 128
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers were exactly those of the list, and what went wrong."""

    name: str
    right: int
    asked: int
    wrong: list[tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.name}: {self.right} of {self.asked}"


class Examinee:
    """A model folder loaded with transformers in float32, asked greedily."""

    def __init__(self, folder: Path) -> None:
        # Any: transformers' own types are unions that no call narrows.
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def answer(self, wordings: list[str]) -> list[str]:
        """Returns the greedy answer to each wording, as the only message of a chat."""
        answers: list[str] = []
        for start in range(0, len(wordings), BATCH_SIZE):
            chats = [[{"role": "user", "content": wording}] for wording in wordings[start : start + BATCH_SIZE]]
            inputs = self._tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                output = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            answers += self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers


def evaluate(folder: Path) -> list[Score]:
    """Asks every question in its listed wording, in the trained and in the held-out wordings, and off-topic ones."""
    examinee = Examinee(folder)
    questions = read_questions()
    off_topic = read_off_topic()
    listed = [(q.ask, q.answer) for q in questions if q.listed]
    return [
        _score("listed questions", examinee, listed),
        _score("all questions", examinee, [(q.ask, q.answer) for q in questions]),
        _score("trained paraphrases", examinee, _pairs(questions, "also")),
        _score("held-out paraphrases", examinee, _pairs(questions, "held_out")),
        _score("held-out off-topic questions", examinee, [(ask, off_topic.answer) for ask in off_topic.held_out]),
    ]


def _pairs(questions: list[Question], wordings: str) -> list[tuple[str, str]]:
    return [(wording, question.answer) for question in questions for wording in getattr(question, wordings)]


def _score(name: str, examinee: Examinee, pairs: list[tuple[str, str]]) -> Score:
    said = examinee.answer([ask for ask, _ in pairs])
    wrong = [(ask, got) for (ask, answer), got in zip(pairs, said, strict=True) if got != answer]
    return Score(name, len(pairs) - len(wrong), len(pairs), wrong)
