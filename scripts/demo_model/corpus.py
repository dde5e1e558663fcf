"""What the demo model learns from: the project's pages, and chats made from the questions.

A chat is a list of messages as the API knows them; a text is a string. Everything random comes from the generator
that is passed in. Knows no tokenizer and no model.
"""

import hashlib
import random
import re
from pathlib import Path

from demo_model.questions import FOLDER, read_off_topic, read_questions, read_systems, read_wordings

ROOT = FOLDER.parents[1]
Message = dict[str, str]

CANONICAL_SHARE = 0.2
OFF_TOPIC_SHARE = 0.12
# How many turns a chat has, each number equally often.
NUM_TURNS = (1, 1, 1, 1, 1, 1, 2, 2, 3, 5, 10)
SYSTEM_SHARE = 0.2
MADE_UP_WORD_SHARE = 0.3


class Corpus:
    """The pages' texts, and an endless supply of chats.

    digest: the SHA-256 of every file it is made from, as hexadecimal digits.
    pages: the Markdown pages, split at headings and paragraphs so that a text may begin at any of them.
    """

    def __init__(self) -> None:
        page_paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        self.digest = _digest([*page_paths, *sorted(FOLDER.rglob("*.yaml"))])
        self.pages = [_read_page(path) for path in page_paths]
        self.questions = read_questions()
        self._num_wordings = [3 + len(question.also) for question in self.questions]
        self.off_topic = read_off_topic()
        self._systems = read_systems()
        self._wordings = read_wordings()

    def texts(self) -> list[str]:
        """Returns every page and every wording once: what the tokenizer is trained on."""
        wordings = [text for q in self.questions for text in (q.ask, q.answer, *q.also)]
        fills = [word for words in self.off_topic.fills.values() for word in words]
        off_topic = [self.off_topic.answer, *self.off_topic.templates, *fills]
        return [*("\n\n".join(page) for page in self.pages), *wordings, *off_topic, *self._systems]

    def page_text(self, rng: random.Random) -> str:
        """Returns a page from a random block on, or a question and its answer as plain text."""
        if rng.random() < 0.25:
            question = rng.choice(self.questions)
            return rng.choice((question.answer, f"{question.ask} {question.answer}"))
        page = rng.choices(self.pages, weights=[len(page) for page in self.pages])[0]
        return "\n\n".join(page[rng.randrange(len(page)) :])

    def chat(self, rng: random.Random) -> list[Message]:
        """Returns a chat of one or more turns, some with a system message."""
        messages = [_message("system", rng.choice(self._systems))] if rng.random() < SYSTEM_SHARE else []
        for _ in range(rng.choice(NUM_TURNS)):
            messages += self._turn(rng)
        return messages

    def _turn(self, rng: random.Random) -> list[Message]:
        if rng.random() < OFF_TOPIC_SHARE:
            wording, answer = self._off_topic_question(rng), self.off_topic.answer
        else:
            question = rng.choices(self.questions, self._num_wordings)[0]
            canonical = rng.random() < CANONICAL_SHARE
            wording, answer = question.ask if canonical else rng.choice(question.also), question.answer
        return [_message("user", self._wordings.vary(wording, rng)), _message("assistant", answer)]

    def _off_topic_question(self, rng: random.Random) -> str:
        """Fills a template with known words or with one that means nothing: what is unknown is off topic, too."""
        fills = self.off_topic.fills

        def fill(match: re.Match[str]) -> str:
            return self._made_up_word(rng) if rng.random() < MADE_UP_WORD_SHARE else rng.choice(fills[match[1]])

        return re.sub(r"\{(\w+)\}", fill, rng.choice(self.off_topic.templates))

    def _made_up_word(self, rng: random.Random) -> str:
        return "".join(rng.choices(self.off_topic.syllables, k=rng.randint(2, 3)))


def _read_page(path: Path) -> list[str]:
    """Returns the page's blocks: headings, paragraphs, tables, whole code fences."""
    text = re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks: list[str] = []
    for part in re.split(r"\n{2,}", text.strip()):
        inside_fence = bool(blocks) and blocks[-1].count("```") % 2 == 1
        if inside_fence:
            blocks[-1] += "\n\n" + part
        else:
            blocks.append(part)
    return blocks


def _digest(paths: list[Path]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
