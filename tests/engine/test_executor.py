"""A real tiny model through the executor alone: plans in, the oracle's tokens out; and what it refuses to load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.tree import PagedKvConfig, SchedulerConfig
from inferflux.engine.executor import Executor
from inferflux.engine.step import Row, RowStart, StepPlan
from inferflux.errors import ConfigError, ModelLoadError
from inferflux.sampling_params import SamplingParams
from tests.support.models import EOS_ID, MAX_POSITIONS, VOCAB_SIZE, TinyModel

MakeModel = Callable[[str], TinyModel]


def load(folder: Path, *, paged_kv: dict[str, Any] | None = None, **model: Any) -> Executor:
    runtime = RuntimeConfig(
        dtype="float32",
        scheduler=SchedulerConfig(max_batch_size=4),
        paged_kv=PagedKvConfig(**{"device_pages": 20, **(paged_kv or {})}),
    )
    return Executor(ModelConfig(id="tiny", **{"path": str(folder), **model}), runtime)


def greedy(executor: Executor, prompt: list[int], num_tokens: int, chunk: int) -> list[int]:
    """One request in slot 2, pages taken from the pool's end."""
    page_tokens, last = executor.info.page_tokens, executor.info.device_pages - 1
    tokens, computed, num_pages = list(prompt), 0, 0
    starts = [RowStart(2, 1, SamplingParams(temperature=0.0), 0, prompt, len(prompt), [])]
    while len(tokens) < len(prompt) + num_tokens:
        end = min(len(tokens), computed + chunk)
        needed = -(-end // page_tokens)
        row = Row(2, computed, tokens[computed:end], [last - i for i in range(num_pages, needed)], end == len(tokens))
        (result,) = executor.execute(StepPlan(1, starts, [row])).rows
        starts, computed, num_pages = [], end, needed
        tokens += [] if result.token_id is None else [result.token_id]
    return tokens[len(prompt) :]


@pytest.mark.parametrize("chunk", [7, 100])
def test_plans_yield_what_transformers_yields(tiny_model: MakeModel, chunk: int):
    model = tiny_model("llama")
    prompt = [5 + (11 * index) % 200 for index in range(33)]
    assert greedy(load(model.folder), prompt, 24, chunk) == model.greedy(prompt, 24)


def test_info_and_phases_describe_the_load(tiny_model: MakeModel):
    model = tiny_model("llama")
    executor = load(model.folder)
    info = executor.info
    assert info.architecture == "LlamaForCausalLM"
    assert info.num_parameters == model.reference.num_parameters()
    assert info.vocab_size == VOCAB_SIZE
    assert (info.device_pages, info.page_tokens) == (20, 16)
    assert (info.dtype, info.device) == ("float32", "cpu")
    assert [name for name, _ in executor.phases] == ["import", "ranks", "weights", "pool", "warmup"]
    assert all(seconds >= 0 for _, seconds in executor.phases)


@pytest.mark.parametrize("named_with_its_id", [True, False])
def test_what_the_tokenizer_ends_texts_with_ends_answers(
    tiny_model: MakeModel, tmp_path: Path, named_with_its_id: bool
):
    """A fine-tuned model may end its turns with a token that the config it took over knows nothing of."""
    folder = shutil.copytree(tiny_model("llama").folder, tmp_path / "tuned")
    assert load(folder).info.eos_token_ids == [EOS_ID]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if named_with_its_id:
        settings["added_tokens_decoder"] = {str(EOS_ID): {"content": settings["eos_token"], "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(folder).info.eos_token_ids == [7, 9, EOS_ID]


def test_the_window_is_what_the_pool_holds_or_what_was_asked_for(tiny_model: MakeModel):
    folder = tiny_model("llama").folder
    assert load(folder).info.max_model_len == 320
    assert load(folder, max_model_len=100).info.max_model_len == 100
    assert load(folder, paged_kv={"device_pages": 0}).info.max_model_len == MAX_POSITIONS
    with pytest.raises(ConfigError, match="max_model_len"):
        load(folder, max_model_len=MAX_POSITIONS)
    with pytest.raises(ConfigError, match="max_model_len"):
        load(folder, max_model_len=MAX_POSITIONS + 1)


def test_the_fingerprint_follows_the_model_and_the_page(tiny_model: MakeModel):
    llama, qwen = tiny_model("llama").folder, tiny_model("qwen2").folder
    fingerprint = load(llama).fingerprint
    assert load(llama).fingerprint == fingerprint
    assert load(qwen).fingerprint != fingerprint
    assert load(llama, paged_kv={"page_tokens": 8}).fingerprint != fingerprint
    assert load(llama, dtype="bfloat16").fingerprint != fingerprint


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_where_there_is_none(tiny_model: MakeModel):
    with pytest.raises(ConfigError, match="no CUDA device"):
        load(tiny_model("llama").folder, backend="cuda")


def test_what_cannot_be_loaded_is_named(tiny_model: MakeModel, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"models\[\]\.path"):
        load(tmp_path, path=None)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"paged_kv\.dtype.*float32"):
        load(tiny_model("llama").folder, paged_kv={"dtype": "bfloat16"})
