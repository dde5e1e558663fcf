"""Tokenizers from tokenizer.json against transformers, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from inferflux.engine.text.tokenizer import Tokenizer, load_tokenizer
from inferflux.errors import ModelLoadError, RequestError
from tests.support.encoders import write_word_piece
from tests.support.tokenizers import TEXTS, write_byte_fallback, write_byte_level

FOLDERS = {
    "byte_level": write_byte_level,
    "llama2": write_byte_fallback,
    "gemma": lambda folder: write_byte_fallback(folder, drops_space=False),
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("tokenizer") / request.param)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_as_transformers(folder: Path, add_special_tokens: bool) -> None:
    oracle = AutoTokenizer.from_pretrained(folder)
    expected = [oracle.encode(text, add_special_tokens=add_special_tokens) for text in TEXTS]
    assert load_tokenizer(folder).encode_batch(TEXTS, add_special_tokens=add_special_tokens) == expected


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decodes_as_transformers(folder: Path, skip_special_tokens: bool) -> None:
    oracle, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        ids = oracle.encode(text)
        expected = oracle.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) == expected


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 410), max_size=20), skip_special_tokens=st.booleans())
def test_random_bytes_decode_as_transformers(byte_level: Path, ids: list[int], skip_special_tokens: bool) -> None:
    library = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    expected = library.decode(ids, skip_special_tokens=skip_special_tokens)
    assert load_tokenizer(byte_level).decode(ids, skip_special_tokens=skip_special_tokens) == expected


def test_names_as_transformers(folder: Path) -> None:
    oracle, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.bos_token_id == oracle.bos_token_id
    assert tokenizer.eos_token_ids == {oracle.eos_token_id}
    assert tokenizer.special_ids >= set(oracle.all_special_ids)
    assert tokenizer.named_tokens == oracle.special_tokens_map


def test_text_survives_the_round_trip(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        if "\u2581" not in text and "<" not in text:
            ids = tokenizer.encode(text, add_special_tokens=True)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_token_bytes_are_the_texts_bytes(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = "caf\u00e9\n😀"
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    assert joined.removeprefix(b" " if tokenizer.drops_leading_space else b"") == text.encode()
    assert any("\ufffd" in tokenizer.token_text(token_id) for token_id in ids), "no token held a part of a character"


def test_ids_without_a_token_decode_to_nothing(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for token_id in (-1, tokenizer.vocab_size, 2**31, 2**40):
        assert tokenizer.decode([token_id], skip_special_tokens=False) == ""
        assert tokenizer.token_bytes(token_id) == b""


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff", "\udc00\ud800"])
def test_a_lone_surrogate_is_a_request_error(folder: Path, text: str) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        load_tokenizer(folder).encode(text, add_special_tokens=True)


def test_truncation_and_padding_in_the_file_are_off(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(load_tokenizer(tmp_path).encode("many more than four tokens", add_special_tokens=True)) > 4


def test_added_tokens_of_the_config_are_added_as_transformers_does(tmp_path: Path) -> None:
    new_id = load_tokenizer(write_byte_level(tmp_path / "plain")).vocab_size
    added = {str(new_id): {"content": "<|new|>", "special": True}, str(new_id + 1): {"content": "<think>"}}
    folder = write_byte_level(tmp_path / "added", added_tokens_decoder=added)
    tokenizer, oracle = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("a<|new|>b<think>c", add_special_tokens=False)
    assert ids == oracle.encode("a<|new|>b<think>c", add_special_tokens=False)
    assert {new_id, new_id + 1} < set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>c"


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "special"])
def test_flags_of_the_config_count_as_in_transformers(tmp_path: Path, flag: str) -> None:
    """Where tokenizer.json says otherwise of the same token: a chat template's line ends may go with it, or not."""
    token_id = load_tokenizer(write_byte_level(tmp_path / "plain")).token_id("<tool>")
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    token = {"content": "<tool>", **flags, flag: True}
    folder = write_byte_level(tmp_path / "flags", added_tokens_decoder={str(token_id): token})
    tokenizer, oracle = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "a \n<tool>\n b<tool>c"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == oracle.decode(ids, skip_special_tokens=True)
    plain = load_tokenizer(tmp_path / "plain")
    assert ids != plain.encode(text, add_special_tokens=False) or flag == "special"


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_of_a_special_token_count_as_in_transformers(tmp_path: Path, flag: str) -> None:
    """Where its role's object is all that says so: the token is in the vocabulary, and nowhere added to it."""
    token = {"__type": "AddedToken", "content": "<|end|>", flag: True}
    folder = write_byte_level(tmp_path, eos_token=token)
    content = json.loads((folder / "tokenizer.json").read_text())
    (added,) = (one for one in content["added_tokens"] if one["content"] == "<|end|>")
    content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] < added["id"]]
    content["model"]["vocab"] |= {"<|end|>": added["id"], "<s>": added["id"] + 1}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    oracle, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    ids = tokenizer.encode("a <|end|> b<|end|>c", add_special_tokens=False)
    assert ids == oracle.encode("a <|end|> b<|end|>c", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("is_special", [True, False, None])
@pytest.mark.parametrize(
    "extra",
    [
        {"additional_special_tokens": ["<tool>"]},
        {"extra_special_tokens": ["<tool>"]},
        {"extra_special_tokens": {"tool_token": "<tool>"}},
        {"pad_token": "<tool>"},
    ],
    ids=str,
)
def test_what_is_special_is_so_in_transformers(tmp_path: Path, is_special: bool | None, extra: dict[str, Any]) -> None:
    """A list of extra tokens, a role and the token's own flag may contradict each other."""
    if is_special is not None:
        token_id = load_tokenizer(write_byte_level(tmp_path / "plain")).token_id("<tool>")
        flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        extra = {
            **extra,
            "added_tokens_decoder": {str(token_id): {"content": "<tool>", **flags, "special": is_special}},
        }
    folder = write_byte_level(tmp_path / "special", **extra)
    oracle, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    ids = tokenizer.encode("a <tool> b", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_word_pieces_decode_as_in_transformers(tmp_path: Path, skip_special_tokens: bool) -> None:
    """A piece whose word begins elsewhere keeps its mark, behind special tokens only where those are left out."""
    write_word_piece(tmp_path)
    library, tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(tmp_path)
    for ids in ([], [6], [6, 5], [5, 6], [6, 8, 6], [2, 6, 3], [2, 5, 6, 3], [0, 6, 6], [6, 12], [99, 6]):
        expected = library.decode(ids, skip_special_tokens=skip_special_tokens)
        assert tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) == expected, ids


def test_sentence_transformers_lower_case_comes_first(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": true}')
    lower = load_tokenizer(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": false}')
    plain = load_tokenizer(folder)
    for text in ("Hello WORLD", "ÀÉ <|start|>A"):
        ids = lower.encode(text, add_special_tokens=True)
        assert ids == plain.encode(text.lower(), add_special_tokens=True) != plain.encode(text, add_special_tokens=True)


def test_an_added_token_with_another_id_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path, added_tokens_decoder={"7": {"content": "<|new|>"}})
    with pytest.raises(ModelLoadError, match=r"<\|new\|>.*says 7"):
        load_tokenizer(tmp_path)


def test_a_special_token_without_an_embedding_gets_no_id(tmp_path: Path) -> None:
    """transformers would give [PAD] an id beyond the model's vocabulary, which a user could then type."""
    tokenizer = load_tokenizer(write_byte_level(tmp_path, pad_token="[PAD]"))
    assert max(tokenizer.encode("a[PAD]b", add_special_tokens=True)) < tokenizer.vocab_size
    assert (
        tokenizer.decode(tokenizer.encode("a[PAD]b", add_special_tokens=False), skip_special_tokens=True) == "a[PAD]b"
    )


def test_a_word_level_tokenizer_joins_words_with_spaces(tmp_path: Path) -> None:
    content = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"<u>": 0, "one": 1, "two": 2}, "unk_token": "<u>"},
    }
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("one two one", add_special_tokens=True) == [1, 2, 1]
    assert tokenizer.decode([1, 2, 1], skip_special_tokens=True) == "one two one"


def _break(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


BROKEN = {
    "no_tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer: needs tokenizer.json"),
    "not_json": (_break("tokenizer.json", b"{"), "tokenizer.json: is not a usable tokenizer"),
    "not_utf8": (_break("tokenizer.json", b"\xff\xfe"), "tokenizer.json: is not a usable tokenizer"),
    "wrong_shape": (_break("tokenizer.json", b"[]"), "tokenizer.json: is not a usable tokenizer"),
    "bad_config": (_break("tokenizer_config.json", b"{"), "tokenizer_config.json: is not valid JSON"),
    "config_list": (_break("tokenizer_config.json", b"[]"), "tokenizer_config.json: must be a JSON object"),
    "bad_bos": (_break("tokenizer_config.json", b'{"bos_token": 5}'), "bos_token: must be a string"),
    "bad_flag": (_break("tokenizer_config.json", b'{"legacy": "no"}'), "legacy: must be true or false"),
    "bad_extra": (_break("tokenizer_config.json", b'{"additional_special_tokens": 1.5}'), "must be a list of tokens"),
    "bad_added": (_break("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'), "added_tokens_decoder.x"),
    "bad_template": (_break("tokenizer_config.json", b'{"chat_template": 5}'), "chat_template: must be a string or"),
    "deep": (_break("tokenizer_config.json", b"[" * 100_000), "is not valid JSON"),
    "decoder": (
        _break(
            "tokenizer.json",
            b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": {"type": "CTC", '
            b'"pad_token": "p", "word_delimiter_token": "|", "cleanup": true}}',
        ),
        "decoder stage .*CTC.* is not supported",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_name(tmp_path: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(write_byte_level(tmp_path))
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(tmp_path)


def test_an_unsupported_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tekken\.json alone is not supported"):
        load_tokenizer(tmp_path)


def test_an_oversize_file_is_not_read(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    with (tmp_path / "tokenizer_config.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(ModelLoadError, match="too large"):
        load_tokenizer(tmp_path)


def test_special_tokens_map_counts_where_the_config_lists_no_tokens(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    tokenizer: Tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == {tokenizer.encode("<|end|>", add_special_tokens=False)[0]}
