"""LLM, the offline face: prompts of every kind in, texts out, interleaved streams kept apart."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from inferflux import LLM, SamplingParams
from inferflux.config import PagedKvConfig, RuntimeConfig, SchedulerConfig
from inferflux.config.tree import NvmeOffloadConfig, SpeculativeConfig
from inferflux.engine.request import Request, RequestState
from inferflux.errors import ConfigError, EngineError, ModelLoadError, RequestError
from tests.support.adapters import write_adapter
from tests.support.models import FAMILIES, write_tokenizer

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(llama_folder: Path) -> LLM:
    return LLM(llama_folder, dtype="float32")


def test_prompts_of_every_kind(llm: LLM) -> None:
    text = "hello there"
    ids = llm.tokenizer.encode(text, add_special_tokens=True)
    messages = [{"role": "user", "content": "hi"}]
    by_text, by_ids, by_chat = llm.generate([text, ids, messages], GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == llm.tokenizer.decode(by_text.token_ids, skip_special_tokens=True)
    assert by_chat.prompt_token_ids == llm.tokenizer.encode("<|bos|>user: hi\nassistant: ", add_special_tokens=False)
    assert by_text.finish_reason == "length"
    assert len(by_text.token_ids) == 24


def test_a_single_prompt_is_a_batch_of_one(llm: LLM) -> None:
    ids = llm.tokenizer.encode("one", add_special_tokens=True)
    for prompt in ("one", ids, [{"role": "user", "content": "one"}]):
        assert len(llm.generate(prompt, GREEDY)) == 1


def test_a_stream_put_together_is_the_whole(llm: LLM) -> None:
    whole = llm.generate("abc", GREEDY)[0]
    deltas = list(llm.stream("abc", GREEDY))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [delta.finish_reason for delta in deltas][-1] == "length"


def test_interleaved_streams_do_not_mix(llm: LLM) -> None:
    prompts = ["first prompt", "second one", "and a third"]
    expected = [one.token_ids for one in llm.generate(prompts, GREEDY)]
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
    received: list[list[int]] = [[], [], []]
    for _ in range(GREEDY.max_tokens or 0):
        for index, stream in enumerate(streams):
            received[index] += next(stream).token_ids
    assert received == expected


def test_leaving_a_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("abc", GREEDY)
    next(stream)
    assert llm.engine.stats().running == 1
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.stats().device_pages_in_use == 0
    llm.engine.check_integrity()


def test_a_stream_collected_in_the_middle_of_a_step_ends_behind_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python collects it wherever memory is next asked for: here while its own row is being planned."""
    expected = llm.generate("abc", GREEDY)[0].token_ids
    gc.freeze()  # what was there before need not be looked through at each step
    cycle: list[object] = [llm.stream("def", GREEDY)]
    next(cycle[0])  # type: ignore[call-overload]
    cycle.append(cycle)
    allocate, states = llm.engine.kv.allocate, []

    def collecting(request: Request, num_new_tokens: int) -> list[int] | None:
        gc.collect()
        states.append(request.state)
        return allocate(request, num_new_tokens)

    gc.disable()
    try:
        del cycle
        monkeypatch.setattr(llm.engine.kv, "allocate", collecting)
        assert llm.generate("abc", GREEDY)[0].token_ids == expected
    finally:
        gc.enable()
        gc.unfreeze()
    assert RequestState.FINISHED not in states
    assert llm.engine.stats().device_pages_in_use == 0
    llm.engine.check_integrity()
    assert not llm.engine.has_work


def test_n_choices_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=5, n=3, ignore_eos=True)
    first = llm.generate("abc", params)[0]
    again = llm.generate(["other", "abc"], params)[1]
    assert len({tuple(choice.token_ids) for choice in first.outputs}) == 3
    assert [choice.token_ids for choice in first.outputs] == [choice.token_ids for choice in again.outputs]


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    whole = llm.generate("abc", GREEDY)[0].text
    stop = whole[4:6]
    cut = llm.generate("abc", SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, stop=(stop,)))[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert llm.engine.stats().running == 0


def test_logprobs_come_for_prompt_and_output(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    generation = llm.generate("hello there", params)[0]
    assert generation.prompt_logprobs is not None
    assert len(generation.prompt_logprobs) == len(generation.prompt_token_ids) - 1
    logprobs = generation.outputs[0].logprobs
    assert logprobs is not None
    assert [entry.token_id for entry in logprobs] == generation.token_ids
    assert all(len(entry.top) == 2 and entry.top[0][0] == entry.token_id for entry in logprobs)


def test_a_prompt_is_scored_without_generating(llm: LLM) -> None:
    """With max_tokens 0; the scores are those that a prompt has before an answer."""
    scores = [
        llm.generate("hello there", SamplingParams(max_tokens=number, temperature=0, prompt_logprobs=1))[0]
        for number in (1, 0)
    ]
    assert scores[1].prompt_logprobs == scores[0].prompt_logprobs
    before = llm.engine.stats().generation_tokens
    for generation in llm.generate(["hello there", [5, 6, 7]], SamplingParams(max_tokens=0, n=2)):
        for output in generation.outputs:
            assert (output.text, output.token_ids, output.finish_reason) == ("", [], "length")
    assert llm.engine.stats().generation_tokens == before
    assert not llm.engine.has_work


def test_one_bad_prompt_runs_none(llm: LLM) -> None:
    with pytest.raises(RequestError, match="token ids"):
        llm.generate([[5, 6], [10**6]], GREEDY)
    assert not llm.engine.has_work


@pytest.mark.parametrize("prompt", [5.5, True, None, b"abc"])
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: object) -> None:
    with pytest.raises(RequestError, match="must be a string"):
        llm.generate([[prompt]])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="must be a string"):
        llm.generate(["fine", prompt])  # type: ignore[list-item]


def test_params_must_match_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="one per prompt"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match=r"must be SamplingParams.*got dict"):
        llm.generate(["a"], {"max_tokens": 5})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="n"):
        next(llm.stream("a", SamplingParams(n=2)))
    for run in (llm.generate, lambda prompt, params: list(llm.stream(prompt, params))):
        with pytest.raises(RequestError, match=r"pooling: .*embed\(\)"):
            run("a", SamplingParams(pooling="last"))


@pytest.mark.parametrize(
    "field",
    [
        {"stop": None}, {"stop": "a"}, {"stop": 5}, {"stop": [1]}, {"stop_token_ids": None}, {"stop_token_ids": 5},
        {"logit_bias": [1]}, {"logit_bias": {"5": 1}}, {"ignore_eos": 3}, {"skip_special_tokens": None},
        {"grammar": "a+"}, {"pooling": "first"},
    ],
)  # fmt: skip
def test_a_parameter_of_another_type_is_named(field: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**field)
    assert refused.value.param in field
    assert str(refused.value).startswith(f"{refused.value.param}: ")


@pytest.mark.parametrize("prompts", [None, 5, {"role": "user"}, b"abc"])
def test_what_are_no_prompts_are_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompts: must be one prompt or a list"):
        llm.generate(prompts)


def test_threads_share_one_engine(llm: LLM) -> None:
    prompts = [f"number {index}" for index in range(8)]
    alone = [llm.generate(prompt, GREEDY)[0].text for prompt in prompts]

    def streamed(prompt: str) -> str:
        return "".join(delta.text for delta in llm.stream(prompt, GREEDY))

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(streamed, prompts)) == alone
        assert [found[0].text for found in pool.map(lambda one: llm.generate(one, GREEDY), prompts)] == alone
    assert not llm.engine.has_work


def test_it_closes_at_the_end_of_a_with(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("stub") as llm:
        closed: list[bool] = []
        monkeypatch.setattr(llm.engine, "close", lambda: closed.append(True))
    assert closed == [True]


def test_a_closed_llm_says_so() -> None:
    """What ran and what comes later alike; closing again, as the end of a `with` does, is nothing."""
    with LLM("stub") as llm:
        stream = llm.stream("abc", GREEDY)
        next(stream)
        llm.close()
        for use in (lambda: next(stream), lambda: llm.generate("abc", GREEDY), lambda: llm.embed("abc")):
            with pytest.raises(EngineError, match="closed"):
                use()


def test_a_setting_that_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r'dtype: must be one of auto, bfloat16, .* \(got "float12"\)'):
        LLM("stub", dtype="float12")
    with pytest.raises(ConfigError, match=r"max_model_len: must be >= 1 \(got 0\)"):
        LLM("stub", max_model_len=0)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        (RuntimeConfig(scheduler=SchedulerConfig(chunked_prefill_tokens=0)), "chunked_prefill_tokens: must be >= 1"),
        (RuntimeConfig(scheduler=SchedulerConfig(max_batch_size="4")), "max_batch_size: must be an integer"),  # type: ignore[arg-type]
        (RuntimeConfig(paged_kv=PagedKvConfig(eviction="fifo")), "eviction: must be one of"),  # type: ignore[arg-type]
        (RuntimeConfig(speculative_decoding=SpeculativeConfig(chunk_size=0)), "chunk_size: must be >= 1"),
        ({"dtype": "float32"}, "must be a RuntimeConfig"),
    ],
)
def test_runtime_settings_made_in_python_are_checked_too(runtime: Any, words: str) -> None:
    """A prefill chunk of nothing would step for ever."""
    with pytest.raises(ConfigError, match=f"runtime.*{words}"):
        LLM("stub", runtime=runtime)


def test_a_path_in_the_runtime_settings_may_be_one(tmp_path: Path) -> None:
    offload: Any = {"path": tmp_path / "file.kv", "max_gb": 0.1}
    with LLM("stub", runtime=RuntimeConfig(nvme_offload=NvmeOffloadConfig(**offload))) as llm:
        assert llm.generate("abc", GREEDY)[0].finish_reason == "length"


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no where: is not a folder"):
        LLM(tmp_path / "no where")


def test_embeddings_of_prompts_of_every_kind(llm: LLM) -> None:
    ids = llm.tokenizer.encode("one", add_special_tokens=True)
    by_text, by_ids, other = llm.embed(["one", ids, [{"role": "user", "content": "two"}]])
    assert by_text == by_ids
    assert len(by_text) == len(other) == 64
    assert sum(number * number for number in other) == pytest.approx(1)
    (mean,) = llm.embed("one and another", pooling="mean")
    assert mean != llm.embed("one and another")[0]
    with pytest.raises(RequestError):
        llm.embed(["fine", []])
    assert not llm.engine.has_work


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """With two adapters."""
    folder = tmp_path_factory.mktemp("adapted")
    model = FAMILIES["llama"](folder)
    write_tokenizer(folder)
    for name in ("one", "two"):
        write_adapter(folder / name, model)
    return LLM(folder, dtype="float32", adapters={"one": folder / "one", "two": str(folder / "two")})


def test_adapters_are_chosen_by_name_for_all_prompts_or_for_each(adapted: LLM, llm: LLM) -> None:
    plain = llm.generate("abc", GREEDY)[0]
    each = adapted.generate(["abc"] * 3, GREEDY, adapter=[None, "one", "two"])
    assert each[0].token_ids == plain.token_ids
    assert len({tuple(out.token_ids) for out in each}) == 3
    assert [out.token_ids for out in adapted.generate(["abc"] * 2, GREEDY, adapter="two")] == [each[2].token_ids] * 2
    streamed = adapted.stream("abc", GREEDY, adapter="one")
    assert [token for delta in streamed for token in delta.token_ids] == each[1].token_ids
    vectors = adapted.embed(["abc", "abc"], adapter=["one", None])
    assert vectors[0] != pytest.approx(vectors[1])
    assert vectors[1] == pytest.approx(llm.embed("abc")[0], abs=1e-5)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("ones", 'adapter: this model has no adapter named "ones"; did you mean "one"'),
        (["one"], r"adapter: must be one for all or one per prompt \(2, got 1\)"),
        ([1, 2], "adapter: must be a name, or a list of names and None"),
        (b"one", "adapter: must be a name, or a list of names and None"),
    ],
)
def test_adapters_that_are_none_are_refused(adapted: LLM, adapter: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        adapted.generate(["a", "b"], GREEDY, adapter=adapter)
    assert not adapted.engine.has_work


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ({"two words": "x"}, r"adapters.id: must be letters, digits"),
        ({"a": "/no/such/folder"}, "adapters: a: /no/such/folder is not a folder"),
        (["x"], r"adapters: must be folders by name \(got list\)"),
    ],
)
def test_adapters_must_be_folders_by_name(adapters: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM("stub", adapters=adapters)
