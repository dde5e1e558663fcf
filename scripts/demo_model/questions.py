"""The questions and answers as data: reads the YAML files beside this one.

Knows no tokenizer and no model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from demo_model.noise import Wordings

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Question:
    """One thing the demo model knows.

    ask: the exact wording that is tested when `listed`. also: other wordings to train on; held_out: wordings that
    training never sees. facts: pieces of the answer that must appear in what the model says.
    """

    ask: str
    answer: str
    facts: tuple[str, ...]
    also: tuple[str, ...]
    held_out: tuple[str, ...]
    listed: bool


@dataclass(frozen=True, slots=True)
class OffTopic:
    """Questions about anything else, all with one answer.

    templates: with {fields}, filled from `fills`, or with a word made up from `syllables`.
    """

    answer: str
    templates: tuple[str, ...]
    fills: dict[str, tuple[str, ...]]
    syllables: tuple[str, ...]
    held_out: tuple[str, ...]


def read_questions() -> list[Question]:
    """Returns all questions, in the order of the files' names."""
    return [
        Question(
            ask=entry["ask"],
            answer=entry["answer"],
            facts=tuple(entry["facts"]),
            also=_lines(entry["also"]),
            held_out=_lines(entry.get("held_out", "")),
            listed=entry.get("listed", False),
        )
        for path in sorted((FOLDER / "questions").glob("*.yaml"))
        for entry in _read(path)
    ]


def read_off_topic() -> OffTopic:
    data = _read(FOLDER / "off_topic.yaml")
    fills = {name: _words(words) for name, words in data["fills"].items()}
    return OffTopic(
        answer=data["answer"],
        templates=_lines(data["templates"]),
        fills=fills,
        syllables=_words(data["syllables"]),
        held_out=_lines(data["held_out"]),
    )


def read_systems() -> tuple[str, ...]:
    return tuple(_read(FOLDER / "systems.yaml"))


def read_wordings() -> Wordings:
    data = _read(FOLDER / "wordings.yaml")
    beginnings = {beginning: tuple(others) for beginning, others in data["beginnings"].items()}
    return Wordings(beginnings, tuple(data["before"]), tuple(data["after"]), frozenset(data["small"].split()))


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))
