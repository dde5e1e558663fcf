"""Encoders: the vectors that transformers computes, in batches of every length, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inferflux import LLM
from inferflux.config import RuntimeConfig
from inferflux.config.tree import SchedulerConfig
from inferflux.engine.executor import Launched
from inferflux.engine.models.encoder_spec import encoder_architecture, read_encoder_spec
from inferflux.engine.models.sentence_settings import read_pooling
from inferflux.engine.step import StepPlan
from inferflux.errors import ConfigError, ModelLoadError, RequestError
from inferflux.sampling_params import Pooling, SamplingParams
from tests.support.encoders import NUM_POSITIONS, WORDS, reference, write_encoder
from tests.support.engines import run_requests, start_engine

PROMPTS = [[5, 6, 7], list(range(2, 40)), [9], [8, 7, 6, 5] * 6, [11, 12], list(range(40, 2, -1))]


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_are_those_of_transformers(tmp_path: Path, kind: str, pooling: str) -> None:
    model = write_encoder(tmp_path, kind)
    chunks = RuntimeConfig(scheduler=SchedulerConfig(chunked_prefill_tokens=5, max_batch_tokens=16, max_batch_size=4))
    for runtime in (None, chunks):
        vectors = LLM(tmp_path, dtype="float32", runtime=runtime).embed(PROMPTS, pooling=pooling)  # type: ignore[arg-type]
        for vector, prompt in zip(vectors, PROMPTS, strict=True):
            np.testing.assert_allclose(vector, reference(model, prompt, pooling), atol=2e-5)


@pytest.mark.parametrize(("setting", "pooling"), [(None, "mean"), ("mean_tokens", "mean"), ("cls_token", "cls")])
def test_the_folder_says_how_to_pool(tmp_path: Path, setting: str | None, pooling: str) -> None:
    model = write_encoder(tmp_path, pooling=setting)
    llm = LLM(tmp_path, dtype="float32")
    (vector,) = llm.embed("InferFlux serves models!")
    token_ids = [WORDS.index(word) for word in ("[CLS]", "infer", "##flux", "serves", "models", "!", "[SEP]")]
    np.testing.assert_allclose(vector, reference(model, token_ids, pooling), atol=2e-5)


@pytest.mark.parametrize(("mode", "pooling"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last")])
def test_pooling_as_releases_from_5_4_write_it(tmp_path: Path, mode: str, pooling: str) -> None:
    write_settings(tmp_path, "1_Pooling/config.json", {"embedding_dimension": 48, "pooling_mode": mode})
    assert read_pooling(tmp_path) == pooling
    write_settings(tmp_path, "1_Pooling/config.json", {"pooling_mode": "weightedmean"})
    with pytest.raises(ModelLoadError, match="pooling_mode: must be one of cls, mean, lasttoken"):
        read_pooling(tmp_path)


def test_the_folder_says_how_long_texts_may_be(tmp_path: Path) -> None:
    """As sentence-transformers would cut them; a longer window can be asked for, up to the positions there are."""
    write_encoder(tmp_path)
    write_settings(tmp_path, "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False})
    assert read_encoder_spec(tmp_path, None).max_model_len == 12
    assert read_encoder_spec(tmp_path, NUM_POSITIONS).max_model_len == NUM_POSITIONS
    write_settings(tmp_path, "sentence_bert_config.json", {"max_seq_length": 10 * NUM_POSITIONS})
    assert read_encoder_spec(tmp_path, None).max_model_len == NUM_POSITIONS
    write_settings(tmp_path, "sentence_bert_config.json", {"max_seq_length": None})
    assert read_encoder_spec(tmp_path, None).max_model_len == NUM_POSITIONS


@pytest.mark.parametrize("package", ["sentence_transformers.models", "sentence_transformers.base.modules.dense"])
def test_modules_behind_the_pooling_are_refused_and_not_left_out(tmp_path: Path, package: str) -> None:
    modules = [{"idx": number, "type": f"{package}.{name}"} for number, name in enumerate(("Transformer", "Normalize"))]
    write_settings(tmp_path, "modules.json", modules)
    assert read_pooling(tmp_path) is None
    write_settings(tmp_path, "modules.json", [*modules, {"idx": 2, "type": f"{package}.Dense"}])
    with pytest.raises(ModelLoadError, match=r"modules.json: \[2\].type: must be one of Normalize, .*Dense"):
        read_pooling(tmp_path)


def test_half_precision_comes_near(tmp_path: Path) -> None:
    model = write_encoder(tmp_path)
    (vector,) = LLM(tmp_path, dtype="bfloat16").embed([PROMPTS[1]])
    assert np.dot(vector, reference(model, PROMPTS[1], "mean")) > 0.99


def test_it_generates_nothing(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    llm = LLM(tmp_path, dtype="float32")
    with pytest.raises(RequestError, match="only computes embeddings"):
        llm.generate("page")
    assert len(llm.embed([[5] * NUM_POSITIONS])[0]) == 48
    with pytest.raises(RequestError) as refused:
        llm.embed([[5] * (NUM_POSITIONS + 1)])
    assert refused.value.code == "context_length_exceeded"


def test_what_cannot_be_served_says_why(tmp_path: Path) -> None:
    write_encoder(tmp_path, "Roberta")
    assert encoder_architecture(tmp_path) == "RobertaModel"
    assert read_encoder_spec(tmp_path, None).max_model_len == NUM_POSITIONS - 2
    with pytest.raises(ConfigError, match="max_model_len"):
        read_encoder_spec(tmp_path, NUM_POSITIONS)
    write_encoder(tmp_path / "odd", hidden_act="tanh")
    with pytest.raises(ModelLoadError, match="hidden_act"):
        read_encoder_spec(tmp_path / "odd", None)
    with pytest.raises((ConfigError, ModelLoadError), match="pooling_mode"):
        LLM(_with_pooling(tmp_path / "max"))


def test_long_texts_are_not_all_computed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes too long looks like an engine that hangs, and is killed."""
    write_encoder(tmp_path)
    engine = start_engine(
        tmp_path, scheduler={"max_batch_tokens": 16, "chunked_prefill_tokens": 4, "max_batch_size": 8}
    )
    launch, ended = engine.executor.launch, []

    def counting(plan: StepPlan) -> Launched:
        ended.append(sum(row.sample for row in plan.rows))
        return launch(plan)

    monkeypatch.setattr(engine.executor, "launch", counting)
    params = SamplingParams(max_tokens=1, pooling="mean")
    vectors = [result.vector for result in run_requests(engine, [[5] * 60, [6] * 60, [7] * 60, [8] * 60], params)]
    assert (max(ended), sum(ended)) == (1, 4)
    assert vectors[0] == run_requests(engine, [[5] * 60], params)[0].vector


def write_settings(folder: Path, name: str, settings: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(settings))


def _with_pooling(folder: Path) -> Path:
    write_encoder(folder, pooling="max_tokens")
    return folder


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_it_leaves_the_cache_and_its_tiers_alone(tmp_path: Path, pooling: Pooling) -> None:
    """Its pages are in the books only: there is nothing to keep, to copy down or to wait for."""
    write_encoder(tmp_path)
    tiers = {"path": str(tmp_path / "file.kv"), "persist": True}
    engine = start_engine(tmp_path, paged_kv={"page_tokens": 4, "cpu_pages": 4}, nvme_offload=tiers)
    for _ in range(2):
        for result in run_requests(engine, [[5] * 60, [6] * 60], SamplingParams(max_tokens=1, pooling=pooling)):
            assert (result.error, result.num_cached_tokens) == (None, 0)
    assert not engine.has_background_work
    assert (engine.stats().device_pages_cached, engine.stats().tiers) == (0, {})
    engine.close()
