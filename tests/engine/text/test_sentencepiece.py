"""SentencePiece folders against the sentencepiece library (plain text) and transformers (text with special tokens)."""

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import GemmaTokenizer, LlamaTokenizer

from inferflux.engine.text.tokenizer import load_tokenizer
from inferflux.errors import ModelLoadError, RequestError
from tests.support.tokenizers import TEXTS, write_sentencepiece

KINDS = {
    "llama": (LlamaTokenizer, {"add_bos_token": True}),
    "gemma": (GemmaTokenizer, {"dummy_prefix": False, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}),
}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), model_type=request.param)


def test_plain_text_is_the_librarys_own_encoding(folder: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        if "<s>" not in text:
            assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text)
            assert tokenizer.encode(text, add_special_tokens=True) == [library.bos_id(), *library.encode(text)]


def test_text_survives_the_round_trip(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        if "\u2581" not in text and "<s>" not in text:
            ids = tokenizer.encode(text, add_special_tokens=True)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", KINDS)
def test_encodes_and_decodes_as_transformers(tmp_path: Path, kind: str) -> None:
    reader, settings = KINDS[kind]
    folder = write_sentencepiece(tmp_path, **settings)
    oracle, tokenizer = reader.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        if text.startswith(" ") and kind == "llama":
            continue  # transformers adds no prefix space before a space; the model's own library does
        expected = oracle.encode(text, add_special_tokens=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_names_come_from_the_model_without_a_config(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.special_ids) == (1, {2}, {0, 1, 2})


@pytest.mark.parametrize(
    ("flags", "first", "last"), [({}, 1, None), ({"add_bos_token": False, "add_eos_token": True}, None, 2)]
)
def test_bos_and_eos_follow_the_config(tmp_path: Path, flags: dict, first: int | None, last: int | None) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path, eos_token="</s>", **flags))
    bare = tokenizer.encode("hello", add_special_tokens=False)
    expected = [*([first] if first else []), *bare, *([last] if last else [])]
    assert tokenizer.encode("hello", add_special_tokens=True) == expected


def test_legacy_puts_a_space_after_each_special_token(tmp_path: Path) -> None:
    new = load_tokenizer(write_sentencepiece(tmp_path / "new", legacy=False))
    old = load_tokenizer(write_sentencepiece(tmp_path / "old", legacy=True))
    for tokenizer, expected in ((new, "<s>x</s>y"), (old, "<s> x</s> y")):
        ids = tokenizer.encode("<s>x</s>y", add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_added_tokens_are_split_out_with_the_space_they_swallow(tmp_path: Path) -> None:
    size = load_tokenizer(write_sentencepiece(tmp_path)).vocab_size
    added = {
        str(size): {"content": "<|im_end|>", "special": True},
        str(size + 1): {"content": "<|im_end|>!"},
        str(size + 2): {"content": "<mask>", "lstrip": True, "rstrip": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 3
    ids = tokenizer.encode("a<|im_end|>b<|im_end|>!c <mask> d", add_special_tokens=False)
    assert [token_id for token_id in ids if token_id >= size] == [size, size + 1, size + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<|im_end|>!c<mask>d"


def test_older_added_tokens_file_counts(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<extra>": 380}')
    assert load_tokenizer(tmp_path).encode("<extra>", add_special_tokens=False) == [380]


def test_tokens_read_within_a_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("hello 😀", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == " hello 😀".encode()
    assert tokenizer.token_text(1) == "<s>"
    assert tokenizer.token_bytes(10**6) == b""


def test_bad_text_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"U\+D800 at character 1"):
        load_tokenizer(write_sentencepiece(tmp_path)).encode("a\ud800", add_special_tokens=True)
    for content in (b"", b"junk" * 100, (tmp_path / "tokenizer.model").read_bytes()[:500]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelLoadError, match=r"tokenizer\.model: is (not )?a SentencePiece model"):
            load_tokenizer(tmp_path)
