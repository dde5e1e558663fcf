"""Tapes of steps: the very tokens that are computed op by op, and nothing that somebody replaced goes uncalled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.engine import Engine
from inferflux.engine.interface import Submit
from inferflux.engine.runner import runner as runner_module
from inferflux.engine.runner import tapes as tapes_module
from inferflux.engine.runner.inputs import Batch
from inferflux.engine.runner.tapes import StepTapes, step_tapes
from inferflux.sampling_params import SamplingParams
from tests.support.adapters import write_adapter
from tests.support.engines import Result, adapter_configs, run_requests, start_engine
from tests.support.models import FAMILIES, TinyModel

PROMPTS = [[5, 6, 7], [9] * 20, [11, 12], list(range(30, 70))]
PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=1)
# Their mixtures are torch's.
WITHOUT = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
DENSE = [name for name in FAMILIES if name not in WITHOUT]


@pytest.fixture(autouse=True)
def built(true_library: Path) -> None:
    assert true_library.exists()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[StepTapes | None]:
    """What engines got when they were started."""
    tapes: list[StepTapes | None] = []

    def spy(*arguments) -> StepTapes | None:
        tapes.append(step_tapes(*arguments))
        return tapes[-1]

    monkeypatch.setattr(runner_module, "step_tapes", spy)
    return tapes


def answers(engine: Engine) -> list[Result]:
    """Requests that end one after another, so that there are steps of four, three, two rows and one."""
    for index, prompt in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=24 - 6 * index, temperature=0, ignore_eos=True, logprobs=1)
        engine.submit(Submit(100 + index, prompt, params))
    results = {100 + index: Result() for index in range(len(PROMPTS))}
    while engine.has_work:
        for output in engine.step():
            results[output.request_id].token_ids += output.token_ids
            results[output.request_id].logprobs += output.logprobs or []
    return list(results.values())


def on_tape(tapes: list[StepTapes | None]) -> list[int]:
    """Rows of the steps that are on tape."""
    (only,) = tapes
    assert only is not None
    return sorted(num_rows for num_rows, is_adapted in only._tapes if not is_adapted)


@pytest.mark.parametrize("name", DENSE)
def test_every_dense_family_says_on_tape_what_it_says_without(
    name: str, tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None]
) -> None:
    folder = tiny_model(name).folder
    plain = answers(start_engine(folder, cuda_graphs="off"))
    assert made == []
    assert answers(start_engine(folder)) == plain
    assert on_tape(made) == [1, 2, 3, 4]


@pytest.mark.parametrize("limit", [512, 14])
def test_steps_with_chunks_are_played_unless_they_are_large(
    limit: int, tiny_model: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say what is said op by op, to the bit, and score their prompts: rows of one token beside chunks of many."""
    played: list[tuple[int, bool]] = []
    run = StepTapes.run

    def spy(tapes: StepTapes, batch: Batch) -> Any:
        decoded = run(tapes, batch)
        if not batch.only_decodes:
            played.append((len(batch.arrays.token_ids), decoded is not None))
        return decoded

    monkeypatch.setattr(tapes_module, "_MAX_TOKENS", limit)
    monkeypatch.setattr(StepTapes, "run", spy)
    params = [SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=k)
              for k in (None, 1, None, 2)]  # fmt: skip
    said = []
    for graphs in ("off", "auto"):
        scheduler = {"chunked_prefill_tokens": 12, "max_batch_tokens": 16}
        engine = start_engine(tiny_model("qwen3").folder, cuda_graphs=graphs, scheduler=scheduler)
        for index, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True)):
            engine.submit(Submit(index, prompt, one))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        said.append([(one.request_id, one.token_ids, one.logprobs, one.prompt_logprobs) for one in outputs])
    assert said[0] == said[1]
    assert {is_played for size, is_played in played if size <= limit} == {True}
    assert {is_played for size, is_played in played if size > limit} == ({False} if limit < 16 else set())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_steps_with_adapters_have_tapes_of_their_own(
    dtype: str,
    quantization: Any,
    tiny_model: Callable[[str], TinyModel],
    made: list[StepTapes | None],
    tmp_path: Path,
) -> None:
    """They say what is said op by op, to the bit: rows of two adapters, one of which leaves most alone, and of none."""
    model = tiny_model("qwen2")
    write_adapter(tmp_path / "a", model.reference, rank=5)
    write_adapter(tmp_path / "b", model.reference, ("k_proj",))
    config = ModelConfig(id="model", path=str(model.folder), quantization=quantization)
    adapters = adapter_configs({"a": tmp_path / "a", "b": tmp_path / "b"})
    said = []
    for graphs in ("off", "auto"):
        settings = {"dtype": dtype, "cuda_graphs": graphs, "prefix_cache": {"enabled": False}}
        engine = Engine(config, msgspec.convert(settings, RuntimeConfig), adapters=adapters)
        said.append([
            run_requests(engine, PROMPTS, PARAMS, first_id=10 * index, adapters=names)
            for index, names in enumerate((["a", None, "b", "a"], ["b"] * 4, None))
        ])  # fmt: skip
    assert said[0] == said[1]
    assert said[1][0] != said[1][1] != said[1][2]
    (tapes,) = made
    assert tapes is not None
    assert sorted(tapes._tapes) == [(4, False), (4, True)]


@pytest.mark.parametrize("name", WITHOUT)
def test_a_mixture_is_computed_op_by_op(
    name: str, tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None]
) -> None:
    run_requests(start_engine(tiny_model(name).folder), PROMPTS[:1], PARAMS)
    assert made == [None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_quantized_models_say_on_tape_what_they_say_without(
    dtype: str, quantization: Any, tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None]
) -> None:
    """Biased too, and with norms of heads."""
    for name in ("qwen2", "qwen3"):
        made.clear()
        model = ModelConfig(id="model", path=str(tiny_model(name).folder), quantization=quantization)
        plain = answers(Engine(model, msgspec.convert({"dtype": dtype, "cuda_graphs": "off"}, RuntimeConfig)))
        assert answers(Engine(model, msgspec.convert({"dtype": dtype}, RuntimeConfig))) == plain
        assert on_tape(made) == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_keys_and_values_of_8_bits_are_on_tape(
    kind: str, tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None]
) -> None:
    folder = tiny_model("llama").folder
    plain = answers(start_engine(folder, paged_kv={"dtype": kind}, cuda_graphs="off"))
    assert answers(start_engine(folder, paged_kv={"dtype": kind})) == plain
    assert on_tape(made) == [1, 2, 3, 4]


def test_why_there_are_no_tapes_is_in_the_log(
    tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None], caplog: pytest.LogCaptureFixture
) -> None:
    """Steps take twice as long then: an operator whose library is not there should see what hinders it."""
    caplog.set_level("INFO", tapes_module.__name__)
    start_engine(tiny_model("llama").folder, dtype="float16")
    assert made == [None]
    assert "activation not by the native library (not written for float16)" in caplog.text


def test_where_a_kernel_is_somebodys_own_there_are_no_tapes(
    tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None], tmp_path: Path
) -> None:
    """Even if it calls the library's, so that torch would never see it."""
    own = tmp_path / "own_norm.py"
    own.write_text("from inferflux.kernels.native.norm import norm as theirs\n\n\n"
                   "def norm(x, weight, eps):\n    return theirs(x, weight, eps)\n")  # fmt: skip
    start_engine(tiny_model("llama").folder, kernels={"norm": str(own)})
    assert made == [None]


@pytest.mark.parametrize("part", ["layer", "mlp", "decoder"])
def test_a_part_that_is_replaced_later_is_called_in_every_step(
    part: str, tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None]
) -> None:
    engine = start_engine(tiny_model("llama").folder)
    before = run_requests(engine, PROMPTS[:1], PARAMS)
    assert on_tape(made) == [1]
    decoder = engine.executor.decoder
    calls = 0

    def counting(inner):
        def call(*arguments):
            nonlocal calls
            calls += 1
            return inner(*arguments)

        return call

    if part == "layer":
        decoder.layers[1] = counting(decoder.layers[1])
    elif part == "mlp":
        decoder.layers[1].mlp = counting(decoder.layers[1].mlp)
    else:
        decoder.hidden_states = counting(decoder.hidden_states)
    after = run_requests(engine, PROMPTS[:1], PARAMS, first_id=1)
    assert calls >= PARAMS.max_tokens - 1
    assert after[0].token_ids == before[0].token_ids


def test_more_threads_than_cores_compute_the_same(
    tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None]
) -> None:
    """Some of them come too late for what is shared, and must neither compute it again nor be waited for in vain."""
    engine = start_engine(tiny_model("llama").folder)
    alone = run_requests(engine, PROMPTS, PARAMS)
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        together = run_requests(engine, PROMPTS, PARAMS, first_id=len(PROMPTS))
    finally:
        torch.set_num_threads(threads)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert on_tape(made)


def test_a_model_for_one_request_at_a_time_has_tapes_too(
    tiny_model: Callable[[str], TinyModel], made: list[StepTapes | None]
) -> None:
    folder, scheduler = tiny_model("llama").folder, {"max_batch_size": 1}
    plain = run_requests(start_engine(folder, scheduler=scheduler, cuda_graphs="off"), PROMPTS, PARAMS)
    assert run_requests(start_engine(folder, scheduler=scheduler), PROMPTS, PARAMS) == plain
    assert on_tape(made) == [1]
