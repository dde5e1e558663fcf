"""Log-probabilities of POST /v1/completions: where each token stands in the text."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text.detokenizer import Detokenizer
from inferflux.engine.text.tokenizer import Tokenizer, load_tokenizer
from inferflux.server.http.formats.logprobs import LogprobLists, join
from tests.support.tokenizers import write_byte_fallback, write_byte_level, write_sentencepiece

KINDS = {"byte level": write_byte_level, "byte fallback": write_byte_fallback, "sentencepiece": write_sentencepiece}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    write: Callable[[Path], Path] = KINDS[request.param]
    return load_tokenizer(write(tmp_path_factory.mktemp("tokenizer")))


def entries(token_ids: Sequence[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token_id, -1.0, 1, []) for token_id in token_ids]


def answer_to(tokenizer: Tokenizer, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, prompt_ids=prompt_ids)
    return detokenizer.feed(answer_ids) + detokenizer.finish()


def test_offsets_find_tokens_behind_bytes_that_are_no_text(tokenizer: Tokenizer) -> None:
    """A model may write bytes that begin no character; each becomes U+FFFD, which moves all that follows."""
    draw, num_broken = random.Random(1), 0
    for _ in range(200):
        prompt_ids = tokenizer.encode("A prompt", add_special_tokens=True)
        answer_ids = [draw.randrange(tokenizer.vocab_size) for _ in range(12)]
        text = answer_to(tokenizer, prompt_ids, answer_ids)
        num_broken += "\ufffd" in text
        lists = LogprobLists(tokenizer, prompt_ids).output(entries(answer_ids))
        for token_id, offset in zip(answer_ids, lists.text_offset, strict=True):
            token = tokenizer.token_text(token_id)
            if token_id not in tokenizer.special_ids and "\ufffd" not in token:
                assert text[offset:].startswith(token), (text, lists)
    assert num_broken > 20, "bytes that are no text hardly came up"


def test_offsets_of_an_echoed_prompt(tokenizer: Tokenizer) -> None:
    """SentencePiece's first word has a space that the text has not, wherever special tokens come before it."""
    for special in (True, False):
        bos = [tokenizer.bos_token_id] if special and tokenizer.bos_token_id is not None else []
        ids = [*bos, *tokenizer.encode("quick brown café 😀", add_special_tokens=False)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answer_ids = tokenizer.encode("dog", add_special_tokens=False)
        lists = LogprobLists(tokenizer, ids)
        whole = join(lists.prompt(entries(ids[1:]), text), lists.output(entries(answer_ids)))
        text += answer_to(tokenizer, ids, answer_ids)
        for token_id, offset in list(zip([*ids, *answer_ids], whole.text_offset, strict=True))[len(bos) + 1 :]:
            token = tokenizer.token_text(token_id)
            if "\ufffd" not in token:
                assert text[offset:].startswith(token), (token, offset, text)


def test_a_character_that_began_in_the_prompt(tokenizer: Tokenizer) -> None:
    """It comes out whole with the answer, so the token that ends it stands at 0 and the next one at 1."""
    ids = tokenizer.encode("😀", add_special_tokens=False)
    first = next(i for i, token_id in enumerate(ids) if "\ufffd" in tokenizer.token_text(token_id))
    after = tokenizer.encode("x", add_special_tokens=False)[-1]
    assert answer_to(tokenizer, ids[: first + 1], [*ids[first + 1 :], after]).startswith("😀")
    lists = LogprobLists(tokenizer, ids[: first + 1]).output(entries([*ids[first + 1 :], after]))
    assert (lists.text_offset[0], lists.text_offset[-1]) == (0, 1)
