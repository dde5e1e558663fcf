"""A tokenizer as llguidance sees it: the same bytes for every token, whichever library reads the files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.engine.text.tokenizer import load_tokenizer
from inferflux.errors import RequestError
from tests.support.tokenizers import write_byte_fallback, write_byte_level, write_sentencepiece

WRITERS: tuple[Callable[[Path], Path], ...] = (write_byte_level, write_byte_fallback, write_sentencepiece)
TEXTS = ('{"name": "Ann"}', "ab", " two  spaces", "größe: 日本 😀\n", "\x00\x7f")


@pytest.mark.parametrize("write", WRITERS)
def test_tokens_say_what_the_tokenizer_says(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    tokenizer = load_tokenizer(write(tmp_path))
    (eos,) = tokenizer.eos_token_ids
    library = Vocabulary(tokenizer, tokenizer.vocab_size, [eos]).library
    assert library.vocab_size == tokenizer.vocab_size
    assert library.eos_tokens == [eos]
    for text in TEXTS:
        token_ids = library.tokenize_str(text)
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode(), text
    assert all(library.is_special_token(token_id) for token_id in tokenizer.special_ids)


@pytest.mark.parametrize("write", WRITERS)
def test_a_text_that_spells_a_special_token_is_text(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """A choice that spelt the end-of-text token ended its answer at once, one with another token failed."""
    tokenizer = load_tokenizer(write(tmp_path))
    library = Vocabulary(tokenizer, tokenizer.vocab_size, [*tokenizer.eos_token_ids]).library
    for text in (*tokenizer.named_tokens.values(), f"a{tokenizer.named_tokens['eos_token']}b"):
        token_ids = library.tokenize_str(text)
        assert tokenizer.special_ids.isdisjoint(token_ids)
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()


@pytest.mark.parametrize("vocab_size", [300, 512])
def test_the_model_may_have_fewer_or_more_tokens(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    assert Vocabulary(tokenizer, vocab_size, [7]).library.vocab_size == vocab_size


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    with pytest.raises(RequestError, match="no end-of-text token"):
        Vocabulary(tokenizer, 300, [300])
