"""Random-weight model folders in the shapes of published models, so that speed can be measured without a download.

The weights are noise: figures of speed and memory are real, the text is not.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 32000


@dataclass(frozen=True)
class Shape:
    """A dense decoder with tied embeddings. Sizes as in the model's config.json."""

    model_type: str
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    qkv_bias: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values per token and byte of element size."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


SHAPES = {
    "S": Shape("llama", "LlamaForCausalLM", 576, 30, 9, 3, 1536, qkv_bias=False),  # SmolLM2-135M
    "M": Shape("qwen2", "Qwen2ForCausalLM", 896, 24, 14, 2, 4864, qkv_bias=True),  # Qwen2.5-0.5B
    "toy": Shape("llama", "LlamaForCausalLM", 64, 2, 4, 2, 128, qkv_bias=False),  # for tests of the benchmarks
}


def write_model(folder: Path, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Path:
    """Writes config, weights and tokenizer of a random model into `folder` (reused when complete) and returns it."""
    if (folder / "tokenizer.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype), indent=1))
    save_file(_weights(shape, dtype, seed), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _weights(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    weights = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", query), ("k", key_value), ("v", key_value)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
            if shape.qkv_bias:
                weights[f"{prefix}self_attn.{name}_proj.bias"] = torch.zeros(rows, dtype=dtype)
        weights[f"{prefix}self_attn.o_proj.weight"] = matrix(hidden, query)
        weights[f"{prefix}mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[f"{prefix}mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[f"{prefix}mlp.down_proj.weight"] = matrix(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=dtype)
    return weights


def _tokenizer() -> Tokenizer:
    """A byte-level vocabulary without merges, padded with words, so that every id decodes to some text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet]
    words += [f"Ġw{index}" for index in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
