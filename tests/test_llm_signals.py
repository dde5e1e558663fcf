"""Signal handlers that raise while an LLM computes: a Ctrl-C in a notebook, an alarm that bounds a call's time. Raised
within a step they were taken for a kernel's error, or left requests whose pages nobody would free."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from inferflux import LLM, SamplingParams
from inferflux.errors import EngineError

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


class OutOfTime(Exception):
    pass


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise OutOfTime


@pytest.fixture(scope="module")
def llm(llama_folder: Path) -> LLM:
    return LLM(llama_folder, dtype="float32")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, _out_of_time)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _interrupted(function: Callable[..., Any], call: int, *numbers: int) -> Callable[..., Any]:
    """The function, which sends this process signals when it is called for the `call`-th time."""
    num_calls = 0

    def interrupted(*args: Any, **keywords: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **keywords)

    return interrupted


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGALRM, OutOfTime)], ids=["ctrl-c", "alarm"]
)
@pytest.mark.parametrize("part", ["add", "allocate", "compute", "commit", "end"])
def test_a_handler_raises_between_steps_and_the_llm_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, part: str, number: int, raised: type[BaseException]
) -> None:
    """A stream of another prompt's is in the same steps: it loses nothing."""
    prompts = ["first prompt", "second one"]
    expected = [one.token_ids for one in llm.generate(prompts, GREEDY)]
    stream = llm.stream(prompts[0], GREEDY)
    received = list(next(stream).token_ids)
    scheduler: Any = llm.engine.scheduler
    owner, name = {
        "add": (scheduler._queues, "add"),
        "allocate": (llm.engine.kv, "allocate"),
        "compute": (llm.engine.executor._runner, "_compute"),
        "commit": (llm.engine.kv, "commit"),
        "end": (scheduler._queues, "end"),
    }[part]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _interrupted(getattr(owner, name), 1, number))
        with pytest.raises(raised):
            llm.generate(prompts[1], GREEDY)
    for delta in stream:
        received += delta.token_ids
    assert received == expected[0]
    assert not llm.engine.has_work
    assert llm.engine.stats().device_pages_in_use == 0
    llm.engine.check_integrity()
    assert [one.token_ids for one in llm.generate(prompts, GREEDY)] == expected
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) == (
        signal.default_int_handler,
        _out_of_time,
    )


def test_all_handlers_are_called_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, _frame: called.append(number))
    runner: Any = llm.engine.executor._runner
    monkeypatch.setattr(runner, "_compute", _interrupted(runner._compute, 2, signal.SIGINT, signal.SIGALRM))
    with pytest.raises(KeyboardInterrupt):
        llm.generate("abc", GREEDY)
    assert called == [signal.SIGALRM]


def test_a_second_ctrl_c_ends_a_step_that_does_not_end(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with it the LLM, whose books may be half written: later calls say so."""
    llm = LLM(llama_folder, dtype="float32")
    runner: Any = llm.engine.executor._runner

    def endless(_batch: object) -> None:
        while True:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner, "_compute", endless)
    stream = llm.stream("other", GREEDY)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("abc", GREEDY)
    for use in (lambda: next(stream), lambda: llm.generate("abc", GREEDY)):
        with pytest.raises(EngineError, match="was ended by KeyboardInterrupt in its engine: load another one"):
            use()
    llm.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
