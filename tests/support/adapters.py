"""LoRA adapters for the tiny models, written as PEFT writes them, and the same model with one merged in: the oracle.

Plain torch: what is written here shares no line with what reads it.
"""

import copy
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EVERYTHING = (*ATTENTION, *MLP)
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
STD = 0.15


def write_adapter(
    folder: Path,
    model: PreTrainedModel,
    targets: Sequence[str] = EVERYTHING,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    std: float = STD,
    **config: Any,
) -> PreTrainedModel:
    """Writes an adapter for every module of these names, drawn from the folder's name, and returns the model with it
    merged in. config: further keys of adapter_config.json, which change nothing of what is drawn."""
    merged, tensors = copy.deepcopy(model), {}
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    for name, module in merged.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            down, up = (
                torch.randn(shape, generator=generator) * std
                for shape in ((rank, module.in_features), (module.out_features, rank))
            )
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            with torch.no_grad():
                module.weight.add_(up @ down * (alpha / rank))
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets), "bias": "none"}
    write_files(folder, {**plain, "task_type": "CAUSAL_LM", "inference_mode": True, **config}, tensors)
    return merged


def write_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
