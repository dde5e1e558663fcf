"""Adapters in an engine: each request says what transformers says with its adapter merged in, beside any others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.engine import Engine
from inferflux.engine.service.protocol import Submit
from inferflux.errors import ConfigError, ModelLoadError, RequestError
from inferflux.sampling_params import SamplingParams
from tests.engine.models.test_quantization import round_weights, takes_bytes
from tests.support.adapters import ATTENTION, EVERYTHING, FUSED, write_adapter
from tests.support.encoders import write_encoder
from tests.support.engines import Result, adapter_configs, run_requests, start_engine
from tests.support.models import TinyModel

NUM_OUTPUT = 12
PARAMS = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0, ignore_eos=True, logprobs=0)
TOLERANCE = 1e-4
# What a family's modules are called; of a mixture attention's alone.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "llama": EVERYTHING,
    "llama_biased": EVERYTHING,
    "qwen2": EVERYTHING,
    "qwen3": EVERYTHING,
    "gemma3": EVERYTHING,
    "phi3": FUSED,
    "qwen2_moe": ATTENTION,
}
LENGTHS = (33, 20, 17, 9, 40, 5)
CHOSEN = ("all", None, "some", "all", "some", None)


@dataclass(frozen=True)
class Case:
    """A model with two adapters, prompts for them and for none, and what transformers says to each."""

    folder: Path
    adapters: Mapping[str, Path]
    prompts: list[list[int]]
    expected: list[list[int]]
    logprobs: list[torch.Tensor]

    def run(self, engine: Engine, first_id: int = 0) -> list[Result]:
        return run_requests(engine, self.prompts, PARAMS, first_id, CHOSEN)

    def check(self, results: list[Result]) -> None:
        for result, expected, logprobs in zip(results, self.expected, self.logprobs, strict=True):
            assert result.error is None
            assert result.token_ids == expected
            said = torch.tensor([entry.logprob for entry in result.logprobs])
            torch.testing.assert_close(said, logprobs, rtol=0, atol=TOLERANCE)


def make_case(model: TinyModel, targets: tuple[str, ...], folder: Path) -> Case:
    references: dict[str | None, PreTrainedModel] = {None: model.reference}
    references["all"] = write_adapter(folder / "all", model.reference, targets)
    references["some"] = write_adapter(folder / "some", model.reference, targets[:1] + targets[3:], rank=3, alpha=5.0)
    prompts, answers, logprobs = [], [], []
    for length, chosen in zip(LENGTHS, CHOSEN, strict=True):
        reference = TinyModel(model.folder, references[chosen])
        prompt, answer = reference.clear_case(length, NUM_OUTPUT)
        logits = reference.logits(prompt + answer)[length - 1 : -1]
        prompts.append(prompt)
        answers.append(answer)
        logprobs.append(torch.log_softmax(logits, dim=1).amax(dim=1))
    return Case(model.folder, {name: folder / name for name in ("all", "some")}, prompts, answers, logprobs)


@pytest.fixture(scope="module")
def cases(tiny_model: Callable[[str], TinyModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = make_case(tiny_model(family), TARGETS[family], folder)
        return made[family]

    return case


@pytest.mark.parametrize("family", list(TARGETS))
def test_mixed_batch_equals_each_adapter_merged(cases: Callable[[str], Case], family: str) -> None:
    case = cases(family)
    case.check(case.run(start_engine(case.folder, case.adapters)))


WAYS: Mapping[str, dict[str, Any]] = {
    "chunks": {"scheduler": {"chunked_prefill_tokens": 7, "max_batch_tokens": 16, "max_batch_size": 6}},
    "preemption": {"paged_kv": {"page_tokens": 4, "device_pages": 24}},
    "without graphs": {"cuda_graphs": "off"},
    "draft tokens": {"speculative_decoding": {"enabled": True}},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_however_it_is_computed(cases: Callable[[str], Case], way: str) -> None:
    case = cases("llama_biased")
    engine = start_engine(case.folder, case.adapters, **WAYS[way])
    case.check(case.run(engine))
    assert (engine.stats().preemptions > 0) == (way == "preemption")


def test_a_draft_model_proposes_without_them(cases: Callable[[str], Case]) -> None:
    """The model itself drafts for its adapters: what it proposes is verified by theirs."""
    case = cases("llama")
    settings = {"enabled": True, "method": "draft_model", "draft_model": str(case.folder), "chunk_size": 2}
    engine = start_engine(case.folder, case.adapters, speculative_decoding=settings)
    case.check(case.run(engine))
    assert engine.stats().draft_tokens > 0


def test_alone_and_ahead_of_results(cases: Callable[[str], Case]) -> None:
    """As on a GPU, where a step is planned before the tokens of the one before it are known."""
    case = cases("llama")
    settings = msgspec.convert({"dtype": "float32"}, RuntimeConfig)
    model, adapters = ModelConfig(id="model", path=str(case.folder)), adapter_configs(case.adapters)
    engine = Engine(model, settings, adapters=adapters, overlap=True)
    case.check(case.run(engine))
    engine.drop_cache()
    alone = [
        run_requests(engine, [prompt], PARAMS, first_id=100 + index, adapters=[chosen])[0]
        for index, (prompt, chosen) in enumerate(zip(case.prompts, CHOSEN, strict=True))
    ]
    case.check(alone)


def test_the_model_itself_is_not_touched_by_a_bit(cases: Callable[[str], Case]) -> None:
    """Its rows have the very numbers beside adapters' rows that they have beside others of its own."""
    case = cases("llama")
    plain = run_requests(start_engine(case.folder), case.prompts, PARAMS)
    mixed = case.run(start_engine(case.folder, case.adapters))
    own = [index for index, chosen in enumerate(CHOSEN) if chosen is None]
    assert [mixed[index].logprobs for index in own] == [plain[index].logprobs for index in own]


def test_adapters_never_share_pages(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    engine = start_engine(case.folder, case.adapters)
    prompt = case.prompts[0]
    answers = {}
    for index, chosen in enumerate((None, "all", "some")):
        (result,) = run_requests(engine, [prompt], PARAMS, first_id=index, adapters=[chosen])
        assert result.num_cached_tokens == 0, "somebody else's pages were found"
        answers[chosen] = result.token_ids
    assert len({tuple(answer) for answer in answers.values()}) == 3
    for index, chosen in enumerate(("some", None, "all"), 10):
        (result,) = run_requests(engine, [prompt], PARAMS, first_id=index, adapters=[chosen])
        assert result.num_cached_tokens == (len(prompt) - 2) // 16 * 16 > 0
        assert result.token_ids == answers[chosen]


def test_a_slot_forgets_the_adapter_of_its_last_request(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    engine = start_engine(case.folder, case.adapters, scheduler={"max_batch_size": 1, "max_batch_tokens": 64})
    case.check(case.run(engine))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_model_may_be_quantised(tiny_model: Callable[[str], TinyModel], tmp_path: Path, scheme: Any) -> None:
    """The low ranks are not rounded: they are added to what the rounded matrices say."""
    model = tiny_model("qwen2")
    rounded = type(model.reference).from_pretrained(model.folder, attn_implementation="eager").eval()
    round_weights(rounded, scheme)
    reference = TinyModel(model.folder, write_adapter(tmp_path / "a", rounded))
    prompt = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    config = ModelConfig(id="model", path=str(model.folder), quantization=scheme)
    settings = msgspec.convert({"dtype": "float32"}, RuntimeConfig)
    engine = Engine(config, settings, adapters=adapter_configs({"a": tmp_path / "a"}))
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=20)
    (result,) = run_requests(engine, [prompt], params, adapters=["a"])
    expected = torch.log_softmax(reference.logits(prompt)[-1], dim=0)
    told = result.logprobs[0].top
    said = torch.tensor([logprob for _, logprob in told])
    # The reference's merged matrices round the low ranks' inputs too, which shows where that is to bytes (0.34).
    atol = 0.5 if takes_bytes(scheme) else 0.03
    torch.testing.assert_close(said, expected[[token_id for token_id, _ in told]], rtol=0, atol=atol)
    plain = torch.log_softmax(TinyModel(model.folder, rounded).logits(prompt)[-1], dim=0)
    assert (plain - expected).abs().max() > 1, "the adapter does not show"


def test_vectors_are_the_adapters(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    engine = start_engine(case.folder, case.adapters)
    params = SamplingParams(max_tokens=1, pooling="mean")
    results = run_requests(engine, [case.prompts[0]] * 3, params, adapters=[None, "all", "some"])
    assert len({result.vector for result in results}) == 3


def test_prompts_are_scored_by_the_adapter(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    engine = start_engine(case.folder, case.adapters)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    engine.submit(Submit(1, case.prompts[0] + case.expected[0], params, adapter="all"))
    (output,) = [output for output in iter_steps(engine) if output.prompt_logprobs]
    said = torch.tensor([entry.logprob for entry in output.prompt_logprobs[-NUM_OUTPUT:]])
    torch.testing.assert_close(said, case.logprobs[0], rtol=0, atol=TOLERANCE)


def iter_steps(engine: Engine) -> list[Any]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_an_unknown_adapter_is_refused(cases: Callable[[str], Case]) -> None:
    case = cases("llama")
    engine = start_engine(case.folder, case.adapters)
    with pytest.raises(RequestError, match='adapter: this model has no adapter named "som"; did you mean "some"'):
        engine.submit(Submit(1, [5], PARAMS, adapter="som"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38])
def test_what_is_no_number_is_refused(tiny_model: Callable[[str], TinyModel], tmp_path: Path, value: float) -> None:
    """Also where only the scale makes it infinite."""
    model = tiny_model("llama")
    write_adapter(tmp_path / "a", model.reference, ("q_proj",))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[name][5, 2] = value
    save_file(tensors, file)
    with pytest.raises(ModelLoadError, match=rf"adapter_model\.safetensors: tensor '{name}': must be finite"):
        start_engine(model.folder, {"a": tmp_path / "a"})


def test_an_encoder_takes_none(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    with pytest.raises(ConfigError, match="adapters: a: model is an encoder"):
        start_engine(tmp_path, {"a": tmp_path})
