"""Embeddings of decoder models: the vectors that transformers' hidden states give, however the prompt is computed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from inferflux.engine.engine import Engine
from inferflux.engine.interface import Submit
from inferflux.engine.runner.outputs import NOT_FINITE
from inferflux.errors import RequestError
from inferflux.sampling_params import Pooling, SamplingParams
from tests.support.engines import run_requests, start_engine
from tests.support.models import TinyModel

PROMPTS = [[5, 6, 7, 8] * 10, [9], [10, 11] * 9, [5, 6, 7, 8] * 10 + [12]]
Vector = npt.NDArray[np.float32]
RUNTIMES = {
    "at once": {},
    "in chunks": {"scheduler": {"chunked_prefill_tokens": 7, "max_batch_tokens": 16, "max_batch_size": 3}},
    "with few pages": {"paged_kv": {"page_tokens": 4, "device_pages": 16}, "scheduler": {"max_batch_size": 3}},
}


def embed(engine: Engine, prompts: list[list[int]], pooling: Pooling) -> list[Vector]:
    vectors: dict[int, Vector] = {}
    for index, prompt in enumerate(prompts):
        engine.submit(Submit(index, prompt, SamplingParams(max_tokens=1, pooling=pooling)))
    while engine.has_work:
        for output in engine.step():
            assert (output.error, output.finish_reason, output.token_ids) == (None, "stop", [])
            assert output.vector is not None
            vectors[output.request_id] = np.frombuffer(output.vector, "<f4")
        engine.check_integrity()
    return [vectors[index] for index in range(len(prompts))]


def reference(model: TinyModel, prompt: list[int], pooling: Pooling) -> Vector:
    with torch.inference_mode():
        states = model.reference.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0].float()
    vector = states[-1] if pooling == "last" else states.mean(dim=0)
    normal: Vector = (vector / vector.norm()).numpy()
    return normal


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_vectors_are_those_of_the_hidden_states(
    tiny_model: Callable[[str], TinyModel], family: str, pooling: Pooling
) -> None:
    model = tiny_model(family)
    expected = [reference(model, prompt, pooling) for prompt in PROMPTS]
    for runtime in RUNTIMES.values():
        engine = start_engine(model.folder, **runtime)
        for _ in range(2):  # the second time on what the prefix cache kept of the first
            for vector, right in zip(embed(engine, PROMPTS, pooling), expected, strict=True):
                assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
                np.testing.assert_allclose(vector, right, atol=2e-5)


def test_embeddings_run_beside_answers(tiny_model: Callable[[str], TinyModel]) -> None:
    engine = start_engine(tiny_model("llama").folder)
    engine.submit(Submit(100, PROMPTS[0], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)))
    engine.submit(Submit(101, PROMPTS[2], SamplingParams(max_tokens=1, pooling="mean")))
    ends = {}
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason:
                ends[output.request_id] = output
    assert (ends[100].finish_reason, ends[100].vector) == ("length", None)
    np.testing.assert_allclose(
        np.frombuffer(ends[101].vector, "<f4"), reference(tiny_model("llama"), PROMPTS[2], "mean"), atol=2e-5
    )


def test_a_prompt_may_fill_the_window_and_no_more(tiny_model: Callable[[str], TinyModel]) -> None:
    engine = start_engine(tiny_model("llama").folder, paged_kv={"device_pages": 64})
    window = engine.info.max_model_len
    (vector,) = embed(engine, [[7] * window], "last")
    assert np.isfinite(vector).all()
    with pytest.raises(RequestError) as refused:
        embed(engine, [[7] * (window + 1)], "last")
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="pooling"):
        embed(engine, [[7]], "cls")


def test_a_vector_and_a_scored_prompt_in_one_step(tiny_model: Callable[[str], TinyModel]) -> None:
    """Each result must be read from its own tensors, whatever else the step brings home."""
    model = tiny_model("llama")
    engine = start_engine(model.folder)
    engine.submit(Submit(0, PROMPTS[0], SamplingParams(max_tokens=1, pooling="last")))
    engine.submit(Submit(1, PROMPTS[2], SamplingParams(max_tokens=1, temperature=0, logprobs=0, prompt_logprobs=1)))
    outputs = {output.request_id: output for output in engine.step()}
    assert len(outputs) == 2, "both end in one step"
    vector = np.frombuffer(outputs[0].vector or b"", "<f4")
    np.testing.assert_allclose(vector, reference(model, PROMPTS[0], "last"), atol=2e-5)
    expected = torch.log_softmax(model.logits(PROMPTS[2]), dim=1)
    scores = [entry.logprob for entry in outputs[1].prompt_logprobs or []]
    assert scores == pytest.approx([expected[i, token].item() for i, token in enumerate(PROMPTS[2][1:])], abs=1e-4)


def test_a_vector_that_is_no_number_is_an_error(
    tiny_model: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One state in the middle is enough to spoil a mean, and the last token's logits do not show it."""
    engine = start_engine(tiny_model("llama").folder)
    whole = engine.executor.decoder.hidden_states

    def spoilt(*arguments: Any) -> torch.Tensor:
        hidden: torch.Tensor = whole(*arguments)
        hidden[1] = torch.nan  # the first of the pooled tokens, behind the sampled one
        return hidden

    monkeypatch.setattr(engine.executor.decoder, "hidden_states", spoilt)
    (result,) = run_requests(engine, [PROMPTS[0]], SamplingParams(max_tokens=1, pooling="mean"))
    assert (result.error, result.vector) == (NOT_FINITE, None)
