"""Grammars of every kind compile, bad ones say what is wrong, and hostile ones cost little."""

import json
import time
from pathlib import Path
from typing import Literal

import pytest

from inferflux.engine.structured.compiling import MAX_ERROR_CHARS, compile_grammar
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.engine.text.tokenizer import load_tokenizer
from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar
from tests.support.tokenizers import write_byte_level


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    tokenizer = load_tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))
    return Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def schema(value: object) -> Grammar:
    return Grammar("json", json.dumps(value))


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("regex", "[0-9]{3}"), "123"),
        (Grammar("lark", 'start: "a" b+\nb: "b"'), "abb"),
        (schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}), '{"a": 5}'),
        (schema({"enum": ["x", 1]}), '"x"'),
        (schema(True), "[1, null]"),
        (schema({}), '{"any": "thing"}'),
    ],
)
def test_the_answer_is_accepted(vocabulary: Vocabulary, grammar: Grammar, text: str) -> None:
    matcher = compile_grammar(vocabulary, grammar)
    assert matcher.consume_tokens(vocabulary.library.tokenize_str(text))
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("lark", "start: nope"), "unknown name"),
        (Grammar("lark", "no start"), "Expected token"),
        (Grammar("json", "{"), "not valid JSON"),
        (Grammar("json", "[" * 100_000), "not valid JSON"),
        (schema([]), "must be a JSON schema"),
        (schema({"type": "wrong"}), "Invalid type"),
        (schema({"$ref": "#/nowhere"}), "does not exist"),
        (schema({"$ref": "http://127.0.0.1/schema.json"}), ""),
        (schema({"not": {"type": "string"}}), "Unimplemented keys"),
        (schema(False), "must be a JSON schema"),
        (schema({"type": "string", "minLength": 3, "maxLength": 1}), "Unsatisfiable"),
        (schema({"allOf": [{"pattern": f"{chr(97 + i)}.*{chr(98 + i)}"} for i in range(20)], "type": "string"}), ""),
    ],
)
def test_what_cannot_be_used_says_why(vocabulary: Vocabulary, grammar: Grammar, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        compile_grammar(vocabulary, grammar)
    assert words in str(refused.value)
    assert len(str(refused.value)) <= MAX_ERROR_CHARS
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "((((a{1,100}){1,100}){1,100}){1,100})"),
        Grammar("regex", "(.*a){30}.*"),
        Grammar("lark", 'start: s s s s s s s s s s\ns: "a" | "a" s | s "a" | ""'),
        Grammar("lark", 'start: "a" b\nb: "c" b'),
        schema({"enum": [f"x{index}" for index in range(10_000)]}),
        schema({"type": "array", "items": {"type": "integer"}, "minItems": 100_000}),
        schema({"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(500)}}),
    ],
)
def test_hostile_grammars_cost_little(vocabulary: Vocabulary, grammar: Grammar) -> None:
    """They may be refused or compiled, but not take long: each takes milliseconds, the limit is for a busy machine."""
    start = time.process_time()
    try:
        matcher = compile_grammar(vocabulary, grammar)
    except RequestError:
        pass
    else:
        matcher.compute_bitmask()
    assert time.process_time() - start < 5


@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "plain tokens"])
@pytest.mark.parametrize("thoughts", ["open", "may"])
def test_thoughts_end_with_the_models_own_marker(
    tmp_path: Path, special: bool, thoughts: Literal["open", "may"]
) -> None:
    """Where it is a special token a shape left the model no way to end its thoughts."""
    first = load_tokenizer(write_byte_level(tmp_path)).vocab_size
    markers = ("<think>", "</think>")
    added = {str(first + place): {"content": text, "special": special} for place, text in enumerate(markers)}
    tokenizer = load_tokenizer(write_byte_level(tmp_path, added_tokens_decoder=added))
    matcher = compile_grammar(
        Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids), Grammar("regex", "[ab]{2}", thoughts)
    )
    opening = [first] if thoughts == "may" else []
    hm, ab = (tokenizer.encode(text, add_special_tokens=False) for text in ("hm\n, yes", "ab"))
    for token_ids in (opening, hm):
        assert not token_ids or matcher.consume_tokens(token_ids)
        assert not matcher.is_accepting()
    assert matcher.consume_tokens([first + 1, *ab])
    assert matcher.is_accepting()
