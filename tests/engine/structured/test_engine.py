"""Grammars in a running engine: on random weights at temperature 1 nothing else keeps an answer in shape."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from llguidance import LLMatcher

from benchmarks.schemas import random_schema
from inferflux.engine.engine import Engine
from inferflux.engine.interface import Submit
from inferflux.engine.structured import compiling, grammars
from inferflux.engine.structured.grammar import choice_rule
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.engine.text.tokenizer import Tokenizer, load_tokenizer
from inferflux.sampling_params import Grammar, SamplingParams
from tests.support.engines import run_requests, start_engine
from tests.support.models import EOS_ID, TinyModel

REGEX = r"[ab]{3,12}-\d{2}"
GRAMMAR = Grammar("regex", REGEX)
PROMPTS = [[5, 6, 7, 8] * 5, [9, 10, 11, 12] * 5, [5, 6, 7, 8] * 5]
PARAMS = SamplingParams(max_tokens=60, temperature=1.0, seed=4, grammar=GRAMMAR)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], TinyModel]) -> Path:
    return tiny_model("llama").folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return start_engine(folder)


def test_random_schemas_validate(engine: Engine, tokenizer: Tokenizer) -> None:
    schemas = [random_schema(seed) for seed in range(24)]
    answers: list[list[int]] = [[] for _ in schemas]
    for index, schema in enumerate(schemas):
        params = SamplingParams(max_tokens=400, seed=index, grammar=Grammar("json", json.dumps(schema)))
        engine.submit(Submit(index, [5 + index, 6], params))
    num_valid = 0
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answers[output.request_id] += output.token_ids
            if output.finish_reason == "stop":
                assert output.stop_token_id == EOS_ID
                answer = tokenizer.decode(answers[output.request_id], skip_special_tokens=True)
                jsonschema.validate(json.loads(answer), schemas[output.request_id])
                num_valid += 1
    engine.check_integrity()
    assert num_valid > 20, "most must come to an end"


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"min_tokens": 59}, {"top_k": 3, "logprobs": 2}])
def test_the_whole_answer_matches(engine: Engine, tokenizer: Tokenizer, changes: dict[str, object]) -> None:
    params = SamplingParams(**{**{"max_tokens": 60, "seed": 4, "grammar": GRAMMAR}, **changes})
    for result in run_requests(engine, PROMPTS, params):
        assert result.finish_reason == "stop", "even when min_tokens is more than the grammar holds"
        assert re.fullmatch(REGEX, tokenizer.decode(result.token_ids, skip_special_tokens=True))


@pytest.mark.parametrize("text", ["EOS", "a EOS b", "\x7f", '"\\u0041"\n\t\x00'], ids=repr)
def test_a_choice_is_said_as_it_is(engine: Engine, tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("EOS", tokenizer.named_tokens["eos_token"])
    params = SamplingParams(max_tokens=60, seed=4, grammar=Grammar("lark", f"start: {choice_rule((text,))}"))
    (result,) = run_requests(engine, PROMPTS[:1], params)
    assert result.finish_reason == "stop"
    assert tokenizer.decode(result.token_ids, skip_special_tokens=True) == text


def test_preemption_and_prefix_hits_keep_the_place(folder: Path, engine: Engine) -> None:
    params = SamplingParams(max_tokens=60, seed=4, grammar=Grammar("regex", "[a-f]{25,30}"))
    alone = [run_requests(engine, [prompt], params)[0].token_ids for prompt in PROMPTS]
    small = start_engine(
        folder,
        paged_kv={"page_tokens": 4, "device_pages": 14},
        scheduler={"max_batch_size": 4, "chunked_prefill_tokens": 7},
    )
    squeezed = [result.token_ids for result in run_requests(small, PROMPTS, params)]
    assert small.stats().preemptions > 0, "the pool was meant to be too small for all"
    assert squeezed == alone
    again = run_requests(small, PROMPTS[:1], params)
    assert again[0].num_cached_tokens > 0
    assert again[0].token_ids == alone[0]


def test_a_bad_grammar_fails_its_own_request_only(engine: Engine) -> None:
    engine.submit(Submit(1, PROMPTS[0], SamplingParams(max_tokens=8, ignore_eos=True)))
    engine.submit(Submit(2, PROMPTS[1], SamplingParams(max_tokens=8, grammar=Grammar("regex", "("))))
    engine.submit(Submit(3, PROMPTS[2], PARAMS))
    ends = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is not None:
                ends[output.request_id] = output
        engine.check_integrity()
    assert ends[1].finish_reason == "length"
    assert (ends[2].finish_reason, ends[2].error_param) == ("error", "grammar")
    assert "unclosed group" in (ends[2].error or "")
    assert ends[3].finish_reason == "stop"


def test_a_grammar_that_fails_midway_ends_its_row_only(folder: Path) -> None:
    """A matcher that is at odds with the tokens (here: made so) says so, and the rows beside it go on."""
    engine = start_engine(folder)
    engine.submit(Submit(1, PROMPTS[0], PARAMS))
    engine.submit(Submit(2, PROMPTS[1], SamplingParams(max_tokens=20, ignore_eos=True)))
    outputs = []
    while not any(engine.executor._runner._table.grammars):
        outputs += engine.step()
    for grammar in filter(None, engine.executor._runner._table.grammars):
        grammar._matcher.consume_token(200)  # no such token in the grammar
    while engine.has_work:
        outputs += engine.step()
    ends = {output.request_id: output for output in outputs if output.finish_reason is not None}
    assert ends[1].finish_reason == "error"
    assert "the grammar failed" in (ends[1].error or "")
    assert ends[1].error_param == "grammar", "the caller's, not the server's failure"
    assert ends[2].finish_reason == "length"
    engine.check_integrity()


def test_an_abort_while_compiling_leaves_nothing_behind(engine: Engine) -> None:
    engine.submit(Submit(7, PROMPTS[0], SamplingParams(grammar=Grammar("regex", "abort[a-z]{50}"))))
    assert engine.has_work
    assert engine.stats().waiting == 1
    engine.abort([7])
    assert not engine.has_work
    assert engine.stats().waiting == 0
    assert engine.step() == []


def test_a_matcher_goes_with_its_request(folder: Path) -> None:
    """When it ends by itself, after preemptions too, and when it is given up; others keep theirs."""
    engine = start_engine(
        folder,
        paged_kv={"page_tokens": 4, "device_pages": 14},
        scheduler={"max_batch_size": 4, "chunked_prefill_tokens": 7},
    )
    run_requests(engine, PROMPTS, SamplingParams(max_tokens=60, seed=4, grammar=Grammar("regex", "[a-f]{25,30}")))
    assert engine.stats().preemptions > 0
    table = engine.executor._runner._table
    assert table.grammars == [None] * 4
    for number, prompt in enumerate(PROMPTS[:2]):
        engine.submit(Submit(number, prompt, PARAMS))
    while len(list(filter(None, table.grammars))) < 2:
        engine.step()
    engine.abort([0])
    assert [grammar.request_id for grammar in table.grammars if grammar is not None] == [1]
    while engine.has_work:
        engine.step()
    assert table.grammars == [None] * 4


def test_many_grammars_that_wait_are_compiled_once_each_and_not_by_a_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits finds its own compiled when its turn comes, though more wait than are kept for nobody. When all
    have ended, refused ones among them, nothing is held any more."""
    compiled: list[tuple[Grammar, int]] = []

    def compile_noted(vocabulary: Vocabulary, grammar: Grammar) -> LLMatcher:
        compiled.append((grammar, threading.get_ident()))
        return compiling.compile_grammar(vocabulary, grammar)

    monkeypatch.setattr(grammars, "compile_grammar", compile_noted)
    monkeypatch.setattr(grammars, "MAX_KEPT", 2)
    engine = start_engine(folder, scheduler={"max_batch_size": 1})
    shapes = [Grammar("regex", f"[a-{letter}]{{3,5}}") for letter in "bcdefgh"] + [Grammar("regex", "(")]
    for number, shape in enumerate(shapes):
        engine.submit(Submit(number, PROMPTS[0], SamplingParams(max_tokens=8, grammar=shape)))
    while engine.has_work:
        engine.step()
    assert [shape for shape, _ in compiled] == shapes
    assert threading.get_ident() not in {thread for _, thread in compiled}
    assert not engine.executor._grammars._num_holders
    assert len(engine.executor._grammars._kept) == 2


class Panic(BaseException):
    """What a panic of the library looks like from Python: no plain Exception."""


def panic(*_args: object) -> None:
    raise Panic


def test_a_panic_of_the_library_ends_one_request_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start_engine(folder)
    engine.submit(Submit(1, PROMPTS[0], SamplingParams(max_tokens=20, ignore_eos=True)))
    engine.submit(Submit(2, PROMPTS[1], PARAMS))
    outputs = []
    while not any(engine.executor._runner._table.grammars):
        outputs += engine.step()
    for grammar in filter(None, engine.executor._runner._table.grammars):
        monkeypatch.setattr(grammar, "_matcher", SimpleNamespace(consume_tokens=panic, compute_bitmask=panic))
    monkeypatch.setattr(compiling, "library_text", panic)
    engine.submit(Submit(3, PROMPTS[2], SamplingParams(grammar=Grammar("regex", "never seen"))))
    while engine.has_work:
        outputs += engine.step()
    ends = {output.request_id: output for output in outputs if output.finish_reason is not None}
    assert ends[1].finish_reason == "length"
    assert (ends[2].finish_reason, ends[3].error_param) == ("error", "grammar")
    assert all("Panic" in (ends[number].error or "") for number in (2, 3))
    engine.check_integrity()
