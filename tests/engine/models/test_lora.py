"""What an adapter's folder may say: read as PEFT reads it, and anything that cannot be computed refused by name."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inferflux.config.tree import AdapterConfig
from inferflux.engine.models import expressions
from inferflux.engine.models.adapter import Adapter, read_adapter
from inferflux.engine.models.lora_spec import LoraSpec, lora_spec, read_lora_config
from inferflux.engine.models.spec import read_spec
from inferflux.errors import ConfigError, ModelLoadError
from tests.support.adapters import ATTENTION, write_adapter, write_files
from tests.support.models import TinyModel, gemma3_multimodal, make_tiny_model

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
# As PEFT 0.21 writes it, without what has no value.
SAVED = {
    **PLAIN,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
Q0, V11 = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.v_proj"


def spec_of(folder: Path, **changes: Any) -> LoraSpec:
    (folder / "adapter_config.json").write_text(json.dumps({**SAVED, **changes}))
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(12) for name in "qkvo"]
    return lora_spec(folder, read_lora_config(folder), modules)


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert spec.adapts(Q0, 0)
    assert spec.adapts(V11, 11)
    assert not spec.adapts("model.layers.0.self_attn.k_proj", 0)
    assert (spec.rank_of(Q0), spec.scale_of(Q0)) == (8, 2.0)


@pytest.mark.parametrize(
    ("changes", "adapted"),
    [
        ({"target_modules": "all-linear"}, [True, True]),
        ({"target_modules": r".*\.0\..*_proj"}, [True, False]),
        ({"target_modules": "q_proj"}, [False, False]),  # an expression, which must match the whole name
        ({"target_modules": [Q0, "o_proj"]}, [True, False]),
        ({"target_modules": ["proj"]}, [False, False]),
        ({"layers_to_transform": 11}, [False, True]),
        ({"layers_to_transform": [0, 3], "layers_pattern": "layers"}, [True, False]),
        ({"layers_to_transform": []}, [True, True]),
        ({"layers_to_transform": [11], "target_modules": [Q0, "v_proj"]}, [True, True]),
        ({"exclude_modules": ["q_proj"]}, [False, True]),
        ({"exclude_modules": r".*\.11\..*"}, [True, False]),
        ({"target_modules": r"^(?!.*vision).*(?:\.0\.self_attn|mlp)\.(?:q|up)_proj$"}, [True, False]),
    ],
)
def test_which_modules_are_adapted(tmp_path: Path, changes: dict[str, Any], adapted: list[bool]) -> None:
    spec = spec_of(tmp_path, **changes)
    assert [spec.adapts(Q0, 0), spec.adapts(V11, 11)] == adapted


def test_ranks_and_scales_of_single_modules(tmp_path: Path) -> None:
    """An expression matches a name's end, behind a dot, and the first one counts."""
    patterns = {
        "rank_pattern": {r"layers\.11\.self_attn\.v_proj": 2, "v_proj": 4, "_proj": 1},
        "alpha_pattern": {Q0: 4},
    }
    spec = spec_of(tmp_path, **patterns)
    assert [spec.rank_of(one) for one in (Q0, V11, "model.layers.1.self_attn.v_proj")] == [8, 2, 4]
    assert [spec.scale_of(one) for one in (Q0, V11)] == [0.5, 8.0]
    rooted = spec_of(tmp_path, **patterns, use_rslora=True)
    assert rooted.scale_of(Q0) == pytest.approx(4 / 8**0.5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"target_modules": "(.|.)*!"}, "target_modules"),
        ({"exclude_modules": "(a|.)+(.+)+!"}, "exclude_modules"),
        ({"rank_pattern": {"q_proj": 4, "(.*)*!": 2}}, r"rank_pattern: (.*)*!"),
    ],
)
def test_an_expression_that_takes_for_ever_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], key: str
) -> None:
    """They try every way to share a name out: for 30 letters, as many as 2 to the 30th."""
    monkeypatch.setattr(expressions, "LIMIT_S", 0.3)
    with pytest.raises(ModelLoadError) as refusal:
        spec_of(tmp_path, **changes)
    path = tmp_path / "adapter_config.json"
    assert f"{path}: {key}: must be a regular expression that finds its modules within 5 s" in str(refusal.value)


def test_a_machine_that_stands_still_is_no_expressions_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "LIMIT_S", 0.5)
    with expressions.Expressions(("q_proj", "k_proj")) as tried:
        assert tried.matching("(q|k)_proj") == {"q_proj", "k_proj"}
        assert tried._process is not None
        tried._process.send_signal(signal.SIGSTOP)
        threading.Timer(0.6, tried._process.send_signal, (signal.SIGCONT,)).start()
        assert tried.matching("q_.*") == {"q_proj"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, 'peft_type: must be one of LORA (got "IA3")'),
        ({"peft_type": None}, "peft_type: must be one of LORA (got null)"),
        ({"r": 0}, "r: must be an integer >= 1 and <= 4096 (got 0)"),
        ({"r": True}, "r: must be an integer >= 1 and <= 4096 (got true)"),
        ({"lora_alpha": "16"}, 'lora_alpha: must be a number >= 0 and <= 1e+06 (got "16")'),
        ({"bias": "all"}, 'bias: must be absent or none: anything else is not supported (got "all")'),
        ({"use_dora": True}, "use_dora: must be absent or false"),
        ({"lora_bias": True}, "lora_bias: must be absent or false"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: must be absent or false"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: must be absent"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices: must be absent"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters: must be absent"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: must be absent"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: must be absent"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: must be absent or true or false or gaussian"),
        ({"layers_pattern": "h"}, "layers_pattern: must be absent or "),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: must be absent: it is not supported"),
        ({"use_something_new": True}, "use_something_new: must be absent: it is not supported"),
        ({"target_modules": None}, "target_modules: must be a list of module names, or a regular expression, or all-"),
        ({"target_modules": [1]}, "target_modules: must be a list of module names"),
        ({"target_modules": "("}, "target_modules: must be a regular expression of at most 1000 characters"),
        ({"target_modules": "a" * 1001}, "target_modules: must be a regular expression of at most 1000 characters"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: must be an integer >= 1"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern: (: must be a regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern: must be an object"),
        ({"layers_to_transform": [-1]}, "layers_to_transform: must be a list of integers >= 0"),
        ({"layers_to_transform": "0"}, "layers_to_transform: must be an integer >= 0"),
        ({"use_rslora": "yes"}, "use_rslora: must be true or false"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError) as refusal:
        spec_of(tmp_path, **changes)
    assert f"{tmp_path / 'adapter_config.json'}: {words}" in str(refusal.value)


@pytest.fixture
def folder(tiny_model: Callable[[str], TinyModel], tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", tiny_model("llama").reference, ("q_proj", "v_proj"))
    return tmp_path / "a"


def read(folder: Path, model: Path) -> Adapter:
    return read_adapter(AdapterConfig(id="a", path=str(folder), base="model"), read_spec(model))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes a folder's tensors, by their names without what all of them begin with."""
    start = "base_model.model.model.layers."
    tensors = {
        name.removeprefix(start): tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    change(tensors)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_files(folder, config, {start + name: tensor for name, tensor in tensors.items()})


Change = Callable[[dict[str, torch.Tensor]], object]
Q_A, Q_B = "0.self_attn.q_proj.lora_A.weight", "0.self_attn.q_proj.lora_B.weight"


def without(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def having(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(Q_B), f"lacks 'base_model.model.model.layers.{Q_B}'"),
        (without(Q_A, Q_B), f"lacks 'base_model.model.model.layers.{Q_A}'"),
        (having("0.self_attn.k_proj.lora_A.weight", 4, 64), "adapter_config.json does not ask for"),
        (having("9.self_attn.q_proj.lora_A.weight", 4, 64), "it can use lora_A and lora_B of down_proj, gate_proj"),
        (having("0.self_attn.q_proj.lora_magnitude_vector", 64), "lora_magnitude_vector"),
        (having(Q_A, 8, 64), "shape must be (4, 64) (got (8, 64))"),
        (having(Q_B, 4, 64), "shape must be (64, 4) (got (4, 64))"),
        (having(Q_A, 4, 64, dtype=torch.int8), "dtype must be one of F32, BF16, F16"),
        (having(Q_A.replace(".weight", ".default.weight"), 4, 64), "with and without default"),
    ],
)
def test_tensors_are_those_that_the_config_asks_for(
    folder: Path, tiny_model: Callable[[str], TinyModel], change: Change, words: str
) -> None:
    model = tiny_model("llama").folder
    assert len(read(folder, model).pairs) == 8
    rewrite(folder, change)
    with pytest.raises(ModelLoadError) as refusal:
        read(folder, model)
    assert words in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_names_with_default_in_them_are_the_same(folder: Path, tiny_model: Callable[[str], TinyModel]) -> None:
    model = tiny_model("llama").folder
    before = read(folder, model)

    def put_in(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    rewrite(folder, put_in)
    assert read(folder, model) == before


def test_a_folder_without_what_is_needed(tmp_path: Path, tiny_model: Callable[[str], TinyModel]) -> None:
    model = tiny_model("llama").folder
    with pytest.raises(ConfigError, match=r"adapters: a: .*gone is not a folder"):
        read(tmp_path / "gone", model)
    with pytest.raises(ModelLoadError, match=r"adapter_config\.json: cannot be read"):
        read(tmp_path, model)
    spec_of(tmp_path)
    with pytest.raises(ModelLoadError, match=r"has no adapter_model\.safetensors$"):
        read(tmp_path, model)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ModelLoadError, match=r"pickled weights .* are never read"):
        read(tmp_path, model)


def test_modules_of_another_model_are_none_of_this_one(tmp_path: Path, tiny_model: Callable[[str], TinyModel]) -> None:
    write_files(tmp_path, {**PLAIN, "target_modules": ["c_attn"]}, {"one": torch.ones(1)})
    with pytest.raises(ModelLoadError, match=r"target_modules: must name some of this model's down_proj, gate_proj, "):
        read(tmp_path, tiny_model("llama").folder)


def test_experts_are_refused(tmp_path: Path, tiny_model: Callable[[str], TinyModel]) -> None:
    """In a model of transformers they are one tensor, in the files of older ones a module each."""
    model = tiny_model("mixtral")
    write_adapter(tmp_path / "a", model.reference, ATTENTION)
    rewrite(tmp_path / "a", having("0.block_sparse_moe.experts.0.w1.lora_A.weight", 4, 64))
    accepted = "it can use lora_A and lora_B of k_proj, o_proj, q_proj, v_proj"
    with pytest.raises(ModelLoadError, match=rf"experts\.0\.w1.*{accepted}"):
        read(tmp_path / "a", model.folder)


def test_layers_of_a_larger_model_have_two_names(tmp_path: Path) -> None:
    """The checkpoint's, and that of the modules in memory, which newer adapters are saved with."""
    (tmp_path / "model").mkdir()
    model = make_tiny_model(gemma3_multimodal, tmp_path / "model")
    adapter = tmp_path / "a"
    write_adapter(adapter, model.reference.model.language_model, ("q_proj",))
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = []
    for prefix in ("language_model.model.", "model.language_model."):
        named = {name.replace("base_model.model.", f"base_model.model.{prefix}"): one for name, one in tensors.items()}
        write_files(adapter, config, named)
        found.append(read(adapter, model.folder).pairs)
    assert found[0].keys() == found[1].keys()
    assert {pair.down.name for pair in found[1].values()} < named.keys()
