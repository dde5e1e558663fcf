"""From checkpoint to tensors: exact values through every path, every rank's share, and a check of every name."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.models.load import load_model
from inferflux.engine.models.spec import read_spec
from inferflux.engine.models.weight_table import weight_table
from inferflux.engine.weights import loader as loader_module
from inferflux.engine.weights.checkpoint import Checkpoint
from inferflux.engine.weights.loader import WeightLoader
from inferflux.engine.weights.source import TensorSource
from inferflux.errors import ConfigError, ModelLoadError
from inferflux.kernels.kernel_set import select
from tests.support.checkpoints import entry, file_bytes

CPU = torch.device("cpu")
WHOLE = ParallelContext(rank=0, size=1, device=CPU)
FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]


def load(folder: Path) -> None:
    load_model(folder, kernels=select(CPU, torch.float32), device=CPU, dtype=torch.float32, context=WHOLE)


@pytest.mark.parametrize("stored", FLOAT_TYPES)
@pytest.mark.parametrize("wanted", FLOAT_TYPES)
def test_every_type_converts_to_every_other(tmp_path, monkeypatch, stored, wanted):
    monkeypatch.setattr(loader_module, "BUFFER_BYTES", 100)  # several chunks, the last one short
    tensors = {name: torch.randn(7, 5).to(stored) for name in ("a", "b")}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        loader = WeightLoader(checkpoint, WHOLE, CPU, wanted)
        result = loader.load((TensorSource("b", (7, 5)), TensorSource("a", (7, 5))))
    assert torch.equal(result, torch.cat((tensors["b"], tensors["a"])).to(wanted))


def test_ranks_share_what_one_rank_has(tmp_path):
    fused, matrix, bias = torch.randn(16, 6), torch.randn(5, 8), torch.randn(5)
    safetensors.torch.save_file({"fused": fused, "matrix": matrix, "bias": bias}, tmp_path / "model.safetensors")
    sources = {
        "fused": TensorSource("fused", (16, 6), "column", (8, 4, 4)),
        "matrix": TensorSource("matrix", (5, 8), "row"),
        "bias": TensorSource("bias", (5,), "row_bias"),
    }
    shares: dict[str, list[torch.Tensor]] = {name: [] for name in sources}
    with Checkpoint(tmp_path) as checkpoint:
        for rank in range(2):
            loader = WeightLoader(checkpoint, ParallelContext(rank, 2, CPU), CPU, torch.float32)
            for name, source in sources.items():
                shares[name].append(loader.load((source,)))
    query, key, value = fused.split((8, 4, 4))
    assert torch.equal(shares["fused"][1], torch.cat((query[4:], key[2:], value[2:])))
    assert torch.equal(torch.cat(shares["matrix"], dim=1), matrix)
    assert torch.equal(shares["bias"][0] + shares["bias"][1], bias)


def test_ranks_that_do_not_fit_print_the_equation(tiny_model):
    context = ParallelContext(rank=0, size=3, device=CPU)
    with pytest.raises(ConfigError, match=r"num_heads % distributed.world_size == 0 failed: 4 % 3 = 1"):
        load_model(
            tiny_model("llama").folder,
            kernels=select(CPU, torch.float32), device=CPU, dtype=torch.float32, context=context,
        )  # fmt: skip


def edited(folder: Path, target: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Copies a model with tensors added, replaced or (None) taken out."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


QUERY = "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({QUERY: None}, f"lacks '{QUERY}'"),
        ({"lm_head.weight": None}, "lacks 'lm_head.weight'"),
        (
            {"model.layers.2.self_attn.q_proj.weight2": torch.ones(1)},
            "does not use: 'model.layers.2.self_attn.q_proj.w",
        ),
        ({"model.layers.4.input_layernorm.weight": torch.ones(64)}, "does not use: 'model.layers.4.input_layernorm"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "does not use"),
        ({QUERY: torch.ones(64, 63)}, "shape must be (64, 64) (got (64, 63))"),
        ({QUERY: torch.ones(64, 64, 1)}, "shape must be (64, 64) (got (64, 64, 1))"),
        ({QUERY: torch.ones(64, 64).to(torch.float8_e4m3fn)}, "quantised checkpoints are not supported"),
        ({QUERY: torch.ones(64, 64).to(torch.int8)}, "dtype must be one of F32, BF16, F16 (got I8)"),
    ],
)
def test_names_and_shapes_must_be_exactly_the_model_s(tiny_model, tmp_path, changes, words):
    folder = edited(tiny_model("llama").folder, tmp_path, changes)
    with pytest.raises(ModelLoadError) as caught:
        load(folder)
    assert words in str(caught.value)


def test_known_leftovers_are_ignored(tiny_model, tmp_path):
    """Old exports keep the rotary frequencies; tied models sometimes keep the output matrix as well."""
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
    load(edited(tiny_model("llama3").folder, tmp_path, {**frequencies, "lm_head.weight": torch.ones(320, 64)}))


def test_shards_load_like_one_file(tiny_model, tmp_path):
    model = tiny_model("qwen3")
    model.reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    spec = read_spec(tmp_path)
    with Checkpoint(tmp_path) as shards, Checkpoint(model.folder) as single:
        for layer in weight_table(spec).layers:
            loaded = [WeightLoader(c, WHOLE, CPU, torch.float32).load(layer.qkv) for c in (shards, single)]
            assert torch.equal(*loaded)


def test_weight_table_counts_every_parameter(tiny_model):
    for family in ("llama_biased", "phi3", "gemma3"):
        spec = read_spec(tiny_model(family).folder)
        for tied in (False, True):
            spec = dataclasses.replace(spec, tied_embeddings=tied)
            sizes = [torch.Size(source.shape).numel() for source in weight_table(spec).sources()]
            assert sum(sizes) == spec.num_parameters


_PEAK_SCRIPT = """
import re, sys, torch
from pathlib import Path
from inferflux.dist.context import ParallelContext
from inferflux.engine.models.load import load_model
from inferflux.kernels.kernel_set import select

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

cpu = torch.device("cpu")
for dtype in (torch.bfloat16, torch.float32):
    kernels = select(cpu, dtype)
    # What packing a matrix of some size for the first time sets up and measures is no weight.
    for num_outputs, num_inputs in ((1024, 1024), (1536, 1024), (5632, 1024), (1024, 2816)):
        weight, x = torch.ones(num_outputs, num_inputs, dtype=dtype), torch.ones(1, num_inputs, dtype=dtype)
        kernels.linear.run(kernels.linear.pack(weight, None), x)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    context = ParallelContext(0, 1, cpu)
    model = load_model(Path(sys.argv[1]), kernels=kernels, device=cpu, dtype=dtype, context=context)
    print((status("VmHWM") - before) / (model.spec.num_parameters * dtype.itemsize))
    del model
"""


def write_large_model(folder: Path) -> None:
    """Writes 90 million bfloat16 zeros as a sparse file."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    spec, header, stop = read_spec(folder), {}, 0
    for source in weight_table(spec).sources():
        start, stop = stop, stop + 2 * math.prod(source.shape)
        header[source.name] = entry("BF16", source.shape, start, stop)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(file_bytes(header))
        file.truncate(file.tell() + stop)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak so")
def test_loading_peaks_below_a_fifth_over_the_weights(tmp_path):
    """In a process of its own, since a peak is a process's; the model is large so that fixed costs do not show."""
    write_large_model(tmp_path)
    command = [sys.executable, "-c", _PEAK_SCRIPT, str(tmp_path)]
    peaks = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert [float(peak) > 1.2 for peak in peaks] == [False, False], f"bfloat16, float32: {peaks}"
    assert float(peaks[0]) > 0.9, "a peak below the weights themselves was not measured"
