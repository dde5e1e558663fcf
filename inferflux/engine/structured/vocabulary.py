"""Vocabulary: a model's tokens as llguidance sees them, whichever library reads the tokenizer's files.

Built on the tokenizer's own byte table, so a mask and the detokeniser agree on what each token says.
"""

from collections.abc import Collection

from llguidance import LLTokenizer

from inferflux.engine.text.answer.reasoning import CLOSE, OPEN
from inferflux.engine.text.tokenizer import Tokenizer
from inferflux.errors import RequestError

# A text that no special token and no leading-space rule touches, put before what is tokenised and taken off again.
_ANCHOR = "\n"


class _Wrapper:
    """What LLTokenizer asks of a tokenizer, by the names it asks for."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = [token_id for token_id in sorted(tokenizer.special_ids) if token_id < vocab_size]
        self._tokenizer = tokenizer
        special = tokenizer.special_ids
        plain = [(data, token_id) for token_id, data in enumerate(self.tokens) if data and token_id not in special]
        self._id_of = dict(reversed(plain))
        self._longest = max(map(len, self._id_of), default=1)

    def __call__(self, text: str) -> list[int]:
        """Returns ids whose bytes are exactly the text's: as the model was trained to see them, where that works. Not a
        special token, though the text spells one: that would be a control word, such as the answer's end."""
        data = text.encode()
        for prefix in ("", _ANCHOR):
            lead = self._tokenizer.encode(prefix, add_special_tokens=False) if prefix else []
            token_ids = self._tokenizer.encode(prefix + text, add_special_tokens=False)
            rest = token_ids[len(lead) :]
            is_text = self._tokenizer.special_ids.isdisjoint(rest)
            if is_text and token_ids[: len(lead)] == lead and b"".join(map(self._tokenizer.token_bytes, rest)) == data:
                return rest
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        """The longest token at each place; what begins with no token is left out."""
        token_ids, start = [], 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                token_id = self._id_of.get(data[start:end])
                if token_id is not None:
                    token_ids.append(token_id)
                    break
            else:
                end = start + 1
            start = end
        return token_ids


class Vocabulary:
    """The tokens below `vocab_size` (the model's, which may be fewer or more than the tokenizer's).

    eos_token_ids: what ends an answer; a grammar allows them where it may end. markers: the ids of those around
    thoughts that are special tokens. Takes up to a second for a large vocabulary: make it off the event loop and the
    engine's thread. Immutable; any number of threads may use it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """Raises RequestError when the model has no end-of-text token, without which a grammar cannot end."""
        ends = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size)
        if not ends:
            raise RequestError("this model has no end-of-text token, which a grammar needs")
        wrapper = _Wrapper(tokenizer, vocab_size, ends[0])
        self.size = vocab_size
        ids = {text: tokenizer.token_id(text) for text in (OPEN, CLOSE)}
        self.markers = {text: one for text, one in ids.items() if one in tokenizer.special_ids and one < vocab_size}
        self.library = LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=ends)  # type: ignore[arg-type]
