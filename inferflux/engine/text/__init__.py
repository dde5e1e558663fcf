"""Text: tokenizers, chat templates, incremental detokenisation and stop strings. No torch; no HTTP."""

from inferflux.engine.text.bundle import ChatPrompt, TextBundle, load_text
from inferflux.engine.text.chat_template import ChatTemplate
from inferflux.engine.text.stream import TextDelta, TextStream
from inferflux.engine.text.tokenizer import Tokenizer

__all__ = ["ChatPrompt", "ChatTemplate", "TextBundle", "TextDelta", "TextStream", "Tokenizer", "load_text"]
