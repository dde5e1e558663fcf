"""A stream's pieces joined are the whole text, and no piece ends in half a character."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from inferflux.engine.text.detokenizer import Detokenizer
from inferflux.engine.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizers import TEXTS, write_byte_fallback, write_byte_level, write_sentencepiece

RARE = "\U00013000"  # no tokenizer here has merged any of its four bytes
WRITERS = {"byte_level": write_byte_level, "llama2": write_byte_fallback, "sentencepiece": write_sentencepiece}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(write(tmp_path_factory.mktemp(name))) for name, write in WRITERS.items()}


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool, prompt: list[int], sizes: list[int]) -> list[str]:
    """The pieces for `ids` fed in groups of `sizes`, over and over; the last piece is `finish`'s."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, prompt_ids=prompt)
    pieces, start, turn = [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(detokenizer.feed(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*pieces, detokenizer.finish()]


ids_of_any_kind = st.lists(st.integers(0, 440), max_size=30)
group_sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(WRITERS)), ids=ids_of_any_kind, skip=st.booleans(), sizes=group_sizes)
def test_random_ids_stream_to_their_decoding(
    tokenizers: dict[str, Tokenizer], name: str, ids: list[int], skip: bool, sizes: list[int]
) -> None:
    tokenizer = tokenizers[name]
    assert "".join(stream(tokenizer, ids, skip, [], sizes)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(WRITERS)), prompt=ids_of_any_kind, ids=ids_of_any_kind, skip=st.booleans())
def test_random_ids_continue_their_prompt(
    tokenizers: dict[str, Tokenizer], name: str, prompt: list[int], ids: list[int], skip: bool
) -> None:
    tokenizer = tokenizers[name]
    before = "".join(stream(tokenizer, prompt, skip, [], [1])[:-1])  # without a half character at the prompt's end
    after = "".join(stream(tokenizer, ids, skip, prompt, [1]))
    assert before + after == tokenizer.decode(prompt + ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(WRITERS)), text=st.text(max_size=40), skip=st.booleans())
def test_valid_text_comes_without_replacement_characters(
    tokenizers: dict[str, Tokenizer], name: str, text: str, skip: bool
) -> None:
    tokenizer = tokenizers[name]
    text = text.replace("\u2581", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if skip:  # a special token that the text happens to spell is left out
        assume(not tokenizer.special_ids.intersection(ids))
    pieces = stream(tokenizer, ids, skip, [], [1])
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("name", WRITERS)
def test_known_hard_texts_stream(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=True)
        for skip in (True, False):
            assert "".join(stream(tokenizer, ids, skip, [], [1])) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", WRITERS)
def test_a_character_comes_with_its_last_byte_and_not_later(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("x" + RARE, add_special_tokens=False)
    head = next(index for index in range(len(ids)) if tokenizer.token_bytes(ids[index])[0] >= 0x80)
    pieces = stream(tokenizer, ids[head:], True, ids[:head], [1])
    assert pieces == ["", "", "", RARE, ""]


@pytest.mark.parametrize("name", WRITERS)
def test_bytes_that_cannot_be_completed_are_not_held_back(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    first, second, *_ = tokenizer.encode("x" + RARE, add_special_tokens=False)[-4:]
    letter = tokenizer.encode("xx", add_special_tokens=False)[-1]
    assert stream(tokenizer, [first, letter], True, [letter], [1]) == ["", "\ufffdx", ""]
    assert stream(tokenizer, [second] * 3, True, [letter], [1]) == ["\ufffd"] * 3 + [""]
    assert stream(tokenizer, [first, second], True, [letter], [1]) == ["", "", "\ufffd"]


def test_a_prompt_that_ends_within_a_character_is_continued(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("x" + RARE, add_special_tokens=False)
    assert stream(tokenizer, ids[-1:], True, ids[:-1], [1]) == [RARE, ""]


def test_the_first_words_space_is_kept_after_a_prompt_and_dropped_at_a_texts_start(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["llama2"]
    ids = tokenizer.encode("fox", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids, True, ids, [1])) == " fox"
    assert "".join(stream(tokenizer, ids, True, [], [1])) == "fox"
    only_special = [tokenizer.bos_token_id]
    assert "".join(stream(tokenizer, ids, True, only_special, [1])) == "fox"
    assert "".join(stream(tokenizer, ids, False, only_special, [1])) == " fox"


@pytest.mark.parametrize("name", WRITERS)
def test_a_special_token_that_a_text_spells_is_skipped(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    spelling = tokenizer.decode([min(tokenizer.special_ids)], skip_special_tokens=False)
    ids = tokenizer.encode(spelling, add_special_tokens=False)
    assert "".join(stream(tokenizer, ids, True, [], [1])) == ""
    assert "".join(stream(tokenizer, ids, False, [], [1])) == spelling


def test_special_tokens_in_the_middle_are_skipped(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("one<|end|><tool>two", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids, True, [], [1])) == "one<tool>two"
    assert "".join(stream(tokenizer, ids, False, [], [1])) == "one<|end|><tool>two"
