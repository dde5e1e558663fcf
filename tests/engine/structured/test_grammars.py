"""Grammars are compiled beside the engine's steps: a step never waits for another request's grammar."""

import threading
from collections.abc import Iterator

import pytest

from inferflux.engine.pending_grammars import PendingGrammars
from inferflux.engine.request import Request
from inferflux.engine.structured import grammars as module
from inferflux.engine.structured.compiling import compile_grammar
from inferflux.engine.structured.grammars import Grammars
from inferflux.engine.structured.vocabulary import Vocabulary
from inferflux.engine.text.tokenizer import load_tokenizer
from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar, SamplingParams
from tests.support.tokenizers import write_byte_level

READY, SLOW, LATER = (Grammar("regex", pattern) for pattern in ("[0-9]+", "[a-f]+", "[x-z]+"))
# For what is there at once; a test that fails waits so long, none that passes does.
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    tokenizer = load_tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))
    return Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


class Compiler:
    """Compiles as always, but SLOW only when told to. compiled: what it was asked for, in order."""

    def __init__(self) -> None:
        self.compiled: list[Grammar] = []
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, vocabulary: Vocabulary, grammar: Grammar) -> object:
        self.compiled.append(grammar)
        if grammar == SLOW:
            self.has_begun.set()
            self.may_end.wait(DEADLINE_S)
        return compile_grammar(vocabulary, grammar)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiler]:
    compiler = Compiler()
    monkeypatch.setattr(module, "compile_grammar", compiler)
    yield compiler
    compiler.may_end.set()


def test_a_ready_grammar_does_not_wait_for_one_being_compiled(vocabulary: Vocabulary, compiler: Compiler) -> None:
    grammars = Grammars(lambda: vocabulary)
    grammars.prepare(0, READY).result(DEADLINE_S)
    slow = grammars.prepare(1, SLOW)
    assert compiler.has_begun.wait(DEADLINE_S)
    found = threading.Event()
    threading.Thread(target=lambda: (grammars.matcher(READY), found.set()), daemon=True).start()
    assert found.wait(DEADLINE_S), "a step would wait for a grammar that is none of its business"
    assert not slow.done()
    compiler.may_end.set()
    slow.result(DEADLINE_S)


def test_each_grammar_is_compiled_once_and_again_only_when_it_was_given_up(
    vocabulary: Vocabulary, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 1)
    grammars = Grammars(lambda: vocabulary)
    for number, grammar in enumerate((READY, READY, LATER, READY)):
        grammars.prepare(number, grammar).result(DEADLINE_S)
        assert grammars.matcher(grammar) is not grammars.matcher(grammar), "each caller has one of its own"
        grammars.release([number])
    assert compiler.compiled == [READY, LATER, READY]


def test_what_a_request_holds_is_not_given_up(
    vocabulary: Vocabulary, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests hold the same one; it is given up when both have ended, and no sooner."""
    monkeypatch.setattr(module, "MAX_KEPT", 0)
    grammars = Grammars(lambda: vocabulary)
    for number, grammar in enumerate((READY, READY, LATER)):
        grammars.prepare(number, grammar).result(DEADLINE_S)
    for ended in ([2], [0]):
        grammars.release(ended)
        grammars.matcher(READY)
    assert compiler.compiled == [READY, LATER]
    grammars.release([1])
    grammars.matcher(READY)
    assert compiler.compiled == [READY, LATER, READY]


def test_no_more_are_held_than_may_be(
    vocabulary: Vocabulary, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who would hold one more waits, and whoever comes behind; none that has gone meanwhile costs anything."""
    monkeypatch.setattr(module, "MAX_HELD", 1)
    grammars = Grammars(lambda: vocabulary)
    first = [grammars.prepare(number, READY) for number in (0, 1)]
    given_up, second, third = (grammars.prepare(number, LATER) for number in (2, 3, 4))
    for prepared in first:
        prepared.result(DEADLINE_S)
    given_up.cancel()
    grammars.release([2])
    grammars.release([0])
    assert not second.running()
    assert compiler.compiled == [READY]
    grammars.release([1])
    second.result(DEADLINE_S)
    third.result(DEADLINE_S)
    assert compiler.compiled == [READY, LATER]


def test_what_cannot_be_compiled_is_refused_both_ways(vocabulary: Vocabulary) -> None:
    grammars, bad = Grammars(lambda: vocabulary), Grammar("regex", "(")
    for ask in (lambda: grammars.prepare(0, bad).result(DEADLINE_S), lambda: grammars.matcher(bad)):
        with pytest.raises(RequestError, match="unclosed group"):
            ask()


def test_a_grammar_that_nobody_waits_for_is_not_compiled(vocabulary: Vocabulary, compiler: Compiler) -> None:
    grammars, pending = Grammars(lambda: vocabulary), PendingGrammars()
    for number, grammar in enumerate((SLOW, LATER, READY)):
        request = Request(number, [1], SamplingParams(grammar=grammar), seed=0, max_total_tokens=9)
        pending.add(request, grammars.prepare(number, grammar))
    assert compiler.has_begun.wait(DEADLINE_S)
    pending.remove([1])
    compiler.may_end.set()
    grammars.prepare(3, READY).result(DEADLINE_S)
    assert compiler.compiled == [SLOW, READY]
    assert [request.id for request, _ in pending.take_ready(idle=False)] == [0, 2]
