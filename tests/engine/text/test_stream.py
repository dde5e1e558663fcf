"""TextStream: whatever the engine's outputs are cut into, the same text, tokens and reason come out."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux.engine.interface import Output
from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextDelta, TextStream, Tokenizer
from inferflux.engine.text.tokenizer import load_tokenizer
from inferflux.sampling_params import SamplingParams
from tests.support.tokenizers import write_byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_level(Path(tmp_path_factory.mktemp("stream"))))


def run(stream: TextStream, ids: list[int], sizes: list[int], reason: str, stop: int | None = None) -> list[TextDelta]:
    """Feeds `ids` in groups of `sizes`, with one logprob each; the last group carries the reason."""
    deltas, start, turn = [], 0, 0
    while True:
        part = ids[start : start + sizes[turn % len(sizes)]]
        start, turn = start + len(part), turn + 1
        last = start >= len(ids)
        logprobs = [TokenLogprobs(token_id, -0.5, 1, []) for token_id in part]
        output = Output(1, part, logprobs, finish_reason=reason if last else None, stop_token_id=stop if last else None)
        deltas.append(stream.feed(output))
        if last or deltas[-1].finish_reason is not None:
            return deltas


def check_whole(stream: TextStream, deltas: list[TextDelta]) -> None:
    """The parts joined are the whole, and each token has its logprob."""
    assert "".join(delta.text for delta in deltas) == stream.text
    assert [token_id for delta in deltas for token_id in delta.token_ids] == stream.token_ids
    assert stream.logprobs is not None
    assert [entry.token_id for entry in stream.logprobs] == stream.token_ids
    assert [entry for delta in deltas for entry in delta.logprobs or ()] == stream.logprobs
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (stream.finish_reason, stream.stop_reason)
    assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_length_ends_with_all_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello 😀 world", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(logprobs=0))
    deltas = run(stream, ids, [1], "length")
    check_whole(stream, deltas)
    assert (stream.text, stream.token_ids, stream.finish_reason) == ("hello 😀 world", ids, "length")


def test_half_a_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x\U00013000", add_special_tokens=False)[:-1]
    stream = TextStream(tokenizer, SamplingParams(logprobs=0))
    deltas = run(stream, ids, [1], "length")
    check_whole(stream, deltas)
    assert stream.text == "x\ufffd"
    assert [delta.text for delta in deltas[1:-1]] == ["", ""]


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_the_eos_token_counts_but_is_not_shown(tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
    ids = tokenizer.encode("bye<|end|>", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(logprobs=0, skip_special_tokens=skip_special_tokens))
    deltas = run(stream, ids, [2], "stop", stop=ids[-1])
    check_whole(stream, deltas)
    assert (stream.text, stream.token_ids) == ("bye", ids)
    assert (stream.finish_reason, stream.stop_reason) == ("stop", None)


def test_a_stop_token_is_named_and_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one!", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(stop_token_ids=(ids[-1],), logprobs=0))
    deltas = run(stream, ids, [1], "stop", stop=ids[-1])
    check_whole(stream, deltas)
    assert (stream.text, stream.stop_reason) == ("one", ids[-1])


def test_eos_that_did_not_end_the_text_is_shown_like_any_special_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|end|>b", add_special_tokens=False)
    hidden, shown = (TextStream(tokenizer, SamplingParams(skip_special_tokens=skip)) for skip in (True, False))
    for stream in (hidden, shown):
        run(stream, ids, [1], "length")
    assert (hidden.text, shown.text) == ("ab", "a<|end|>b")


def test_a_stop_string_cuts_the_text_and_the_tokens_and_ends_them(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one\n\nUser: two", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(stop=("\nUser:",), logprobs=0))
    deltas = run(stream, ids, [1], "length")
    check_whole(stream, deltas)
    assert (stream.text, stream.finish_reason, stream.stop_reason) == ("one\n", "stop", "\nUser:")
    assert tokenizer.decode(stream.token_ids, skip_special_tokens=True) == "one\n\nUser:"
    assert stream.feed(Output(1, ids[-1:], finish_reason="length")) == TextDelta()
    assert stream.text == "one\n"


def test_a_stop_string_in_the_engines_last_output_goes_before_its_reason(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one STOP", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(stop=("STOP",)))
    run(stream, ids, [len(ids)], "length")
    assert (stream.text, stream.finish_reason) == ("one ", "stop")


def test_a_stop_string_that_is_never_completed_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one STO", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(stop=("STOP",), logprobs=0))
    deltas = run(stream, ids, [1], "length")
    check_whole(stream, deltas)
    assert stream.text == "one STO"
    assert not any("S" in delta.text for delta in deltas[:-1])


def test_no_stop_string_ends_the_text_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a.b.c.d", add_special_tokens=False)
    assert len(ids) == 7
    for min_tokens, text in ((0, "a"), (2, "a"), (3, "a.b"), (4, "a.b"), (5, "a.b.c")):
        stream = TextStream(tokenizer, SamplingParams(stop=(".",), min_tokens=min_tokens))
        run(stream, ids, [3], "length")
        assert stream.text == text
        assert len(stream.token_ids) >= min_tokens


def test_an_error_passes_through(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, SamplingParams())
    assert stream.feed(Output(1, [], finish_reason="error", error="lost")).finish_reason == "error"


def test_a_prompt_is_continued(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x\U00013000", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(), ids[:-1])
    assert stream.feed(Output(1, ids[-1:])).text == "\U00013000"


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 403), max_size=25),
    stop=st.lists(st.sampled_from([" ", "e", "th", "\ufffd", "<tool>", "the ", "a\n"]), max_size=3),
    min_tokens=st.integers(0, 10),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    skip=st.booleans(),
)
def test_the_cut_into_outputs_makes_no_difference(
    tokenizer: Tokenizer, ids: list[int], stop: list[str], min_tokens: int, sizes: list[int], skip: bool
) -> None:
    params = SamplingParams(
        stop=tuple(stop), min_tokens=min_tokens, max_tokens=None, logprobs=0, skip_special_tokens=skip
    )
    whole, cut = TextStream(tokenizer, params), TextStream(tokenizer, params)
    run(whole, ids, [max(len(ids), 1)], "length")
    check_whole(cut, run(cut, ids, sizes, "length"))
    for name in ("text", "token_ids", "logprobs", "finish_reason", "stop_reason"):
        assert getattr(cut, name) == getattr(whole, name)
    if whole.stop_reason is None:
        assert whole.text == tokenizer.decode(ids, skip_special_tokens=skip)
    elif min_tokens == 0:
        assert not any(text in whole.text for text in stop)
