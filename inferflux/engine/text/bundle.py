"""TextBundle: everything of a model that has to do with text, loaded together from its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferflux.engine.text.chat_template import ChatTemplate, Message, load_chat_template
from inferflux.engine.text.settings import read_settings
from inferflux.engine.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class TextBundle:
    """A model's tokenizer and chat template."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the prompt's token ids. As `ChatTemplate.render`, also in its errors: call it off the event loop."""
        text = self.chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )
        return self.tokenizer.encode(text, add_special_tokens=False)


def load_text(folder: Path, chat_template: str | None = None) -> TextBundle:
    """Loads a model folder's text parts. chat_template: config models[].chat_template, a file's path or a template.

    Raises ModelLoadError naming the file that cannot be used.
    """
    settings = read_settings(folder)
    tokenizer = load_tokenizer(folder, settings)
    return TextBundle(tokenizer, load_chat_template(folder, chat_template, settings, tokenizer.named_tokens))
