"""TextBundle: everything of a model that has to do with text, loaded together from its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from inferflux.engine.text.answer import reasoning
from inferflux.engine.text.answer.formats import AnswerStyle
from inferflux.engine.text.chat_template import ChatTemplate, Message, load_chat_template
from inferflux.engine.text.settings import read_settings
from inferflux.engine.text.tokenizer import Tokenizer, load_tokenizer
from inferflux.errors import RequestError


class ChatPrompt(NamedTuple):
    """A rendered conversation. opens_thoughts: it ends with `<think>`, so that the answer begins with thoughts."""

    token_ids: list[int]
    opens_thoughts: bool


@dataclass(frozen=True, slots=True)
class TextBundle:
    """A model's tokenizer and chat template, and how its answers are written."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate

    @property
    def style(self) -> AnswerStyle:
        return self.chat_template.style

    def special_ids(self, texts: Sequence[str]) -> frozenset[int]:
        """Returns the ids of those texts that are special tokens."""
        ids = {self.tokenizer.token_id(text) for text in texts}
        return frozenset(token_id for token_id in ids if token_id in self.tokenizer.special_ids)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> ChatPrompt:
        """Returns the prompt. As `ChatTemplate.render`, also in its errors: call it off the event loop.
        add_special_tokens: also those that the tokenizer adds to a text, which a template writes itself."""
        text = self.chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )
        opens_thoughts = text.rstrip().endswith(reasoning.OPEN)
        try:
            token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except RequestError as error:  # a call's arguments may spell half a surrogate pair
            raise RequestError(f"messages: {error}", param="messages") from None
        return ChatPrompt(token_ids, opens_thoughts)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Returns the prompt's token ids alone."""
        return self.chat_prompt(messages).token_ids


def load_text(folder: Path, chat_template: str | None = None) -> TextBundle:
    """Loads a model folder's text parts. chat_template: config models[].chat_template, a file's path or a template.

    Raises ModelLoadError naming the file that cannot be used, ConfigError when that is the chat_template given here.
    """
    settings = read_settings(folder)
    tokenizer = load_tokenizer(folder, settings)
    return TextBundle(tokenizer, load_chat_template(folder, chat_template, settings, tokenizer.named_tokens))
