"""Log-probabilities in the words of POST /v1/completions: parallel lists, tokens as text, offsets into the answer."""

from collections.abc import Iterable

from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import Tokenizer
from inferflux.server.http.schemas.completions import CompletionLogprobs

# JSON has no infinity; OpenAI's word for "practically impossible".
LOWEST_LOGPROB = -9999.0
_CONTINUATION = bytes(range(0x80, 0xC0))


class LogprobLists:
    """Turns one choice's entries into lists, piece by piece. offset: characters of the answer before the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.byte_table(skip_special_tokens=True)
        self.offset = 0

    def prompt(self, token_ids: list[int], entries: Iterable[TokenLogprobs], text: str) -> CompletionLogprobs:
        """Returns the lists of an echoed prompt. Nothing precedes its first token, which so has no probability."""
        first = CompletionLogprobs([_token(self._tokenizer, token_ids[0])], [None], [None], [0])
        if self._tokenizer.drops_leading_space and self._bytes[token_ids[0]].startswith(b" "):
            self.offset = -1
        self._advance(token_ids[0])
        lists = join(first, self.output(entries))
        self.offset = len(text)
        return lists

    def output(self, entries: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        """Returns the lists of the tokens that follow."""
        lists = CompletionLogprobs([], [], [], [])
        for entry in entries:
            token = _token(self._tokenizer, entry.token_id)
            top = {_token(self._tokenizer, token_id): finite(logprob) for token_id, logprob in entry.top}
            lists.tokens.append(token)
            lists.token_logprobs.append(finite(entry.logprob))
            lists.top_logprobs.append({**top, token: finite(entry.logprob)})
            lists.text_offset.append(self.offset)
            self._advance(entry.token_id)
        return lists

    def _advance(self, token_id: int) -> None:
        """Counts the characters that begin in the token: all bytes but those that continue one."""
        data = self._bytes[token_id]
        self.offset += len(data) if data.isascii() else len(data.translate(None, _CONTINUATION))


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
