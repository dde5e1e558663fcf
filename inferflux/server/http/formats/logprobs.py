"""Log-probabilities in the words of POST /v1/completions: parallel lists, tokens as text, offsets into the answer."""

from collections.abc import Iterable, Sequence

from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import Tokenizer
from inferflux.engine.text.detokenizer import Detokenizer
from inferflux.server.http.schemas.completions import CompletionLogprobs

# JSON has no infinity; OpenAI's word for "practically impossible".
LOWEST_LOGPROB = -9999.0


class _Offset:
    """Counts the characters before the next token as the detokenizer makes them of all tokens before it: bytes that are
    no text become U+FFFD, and a space at a text's beginning may be dropped. value: the index of the character that the
    next token begins, or of the one it may complete where that began in the prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], start: int) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, prompt_ids=prompt_ids)
        self._num_decoded = start
        self.value = start

    def advance(self, token_id: int) -> None:
        self._num_decoded += len(self._detokenizer.feed((token_id,)))
        self.value = self._num_decoded + self._detokenizer.num_held


class LogprobLists:
    """Turns one choice's entries into lists, piece by piece. prompt_ids: what the answer continues."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._offset = _Offset(tokenizer, prompt_ids, 0)

    def prompt(self, entries: Iterable[TokenLogprobs], text: str) -> CompletionLogprobs:
        """Returns the lists of the echoed prompt. Nothing precedes its first token, which so has no probability."""
        first_id, offset = self._prompt_ids[0], _Offset(self._tokenizer, (), 0)
        offset.advance(first_id)
        self._offset = _Offset(self._tokenizer, self._prompt_ids, len(text))
        first = CompletionLogprobs([_token(self._tokenizer, first_id)], [None], [None], [0])
        return join(first, self._lists(entries, offset))

    def output(self, entries: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        """Returns the lists of the tokens that follow."""
        return self._lists(entries, self._offset)

    def _lists(self, entries: Iterable[TokenLogprobs], offset: _Offset) -> CompletionLogprobs:
        lists = CompletionLogprobs([], [], [], [])
        for entry in entries:
            token = _token(self._tokenizer, entry.token_id)
            top = {_token(self._tokenizer, token_id): finite(logprob) for token_id, logprob in entry.top}
            lists.tokens.append(token)
            lists.token_logprobs.append(finite(entry.logprob))
            lists.top_logprobs.append({**top, token: finite(entry.logprob)})
            lists.text_offset.append(offset.value)
            offset.advance(entry.token_id)
        return lists


def join(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Returns the lists of both, in order."""
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _token(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is part of a character as its bytes, so that no two tokens look the same."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
