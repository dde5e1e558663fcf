"""ModelSpec: the sizes and flags of a decoder, read from a Hugging Face folder and checked. No torch, no weights.

What differs between families is in `catalog`; here is what they share. Reads both the 4.x and the 5.x spelling of
transformers' configs.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from inferflux.engine.layers.rope_spec import LinearScaling, LongRopeScaling, RopeSpec, YarnScaling
from inferflux.engine.model_files import read_json_object
from inferflux.engine.models.catalog import (
    FAMILIES,
    FULL,
    SLIDING,
    Family,
    MoeKeys,
    Rule,
    rotating_layers,
    sparse_layers,
)
from inferflux.engine.models.common_keys import CheckpointDtype, check_length, read_checkpoint_dtype
from inferflux.engine.models.config_reader import ConfigReader
from inferflux.engine.models.encoder_spec import ENCODERS
from inferflux.engine.models.read_rope import MAX_POSITIONS, read_rope
from inferflux.errors import ModelLoadError, did_you_mean

Activation = Literal["silu", "gelu", "gelu_tanh"]

MAX_VOCAB_SIZE = 2**22
MAX_HIDDEN_SIZE = 2**17
MAX_INTERMEDIATE_SIZE = 2**20
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_EXPERTS = 4096
MAX_HEAD_DIM = 1024
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """window: how many of the latest positions a query sees, its own included; None: all.
    rope: index into ModelSpec.ropes; None: queries and keys are not rotated.
    sparse: its MLP is a mixture of experts."""

    window: int | None
    rope: int | None
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of experts (`LayerSpec.sparse`): each token uses `experts_per_token` of `num_experts` gated MLPs.

    normalise: their weights are made to add up to 1. shared_size: of the expert that every token goes through; 0: none.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    normalise: bool
    shared_size: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only model. Sizes are those of the whole model, not of one rank's share.

    max_position_embeddings: the length the config gives. max_model_len: the length it is served with.
    checkpoint_dtype: what the config says its tensors are.
    eos_token_ids: every id that ends an answer, ids outside the vocabulary (which cannot be sampled) left out.
    qk_norm: queries and keys are normalised head by head; qk_norm_whole: all heads of a token as one vector.
    qkv_clip: queries, keys and values are cut off there, once they are normalised; None: they are not.
    norm_offset: norms multiply by 1 + weight. sandwich_norms: attention and MLP outputs are normalised too.
    embedding_scale multiplies embeddings; attention_scale multiplies q.k. Soft caps: see kernels.ops; None: off.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    max_model_len: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm_eps: float
    activation: Activation
    attention_scale: float
    attention_soft_cap: float | None
    final_soft_cap: float | None
    embedding_scale: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norm_offset: bool
    sandwich_norms: bool
    qk_norm_whole: bool = False
    qkv_clip: float | None = None
    moe: MoeSpec | None = None
    tied_embeddings: bool = False
    checkpoint_dtype: CheckpointDtype = "float32"
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, tied ones counted once."""
        query, key_value = self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * query + key_value)
        layer += self.hidden_size * (4 if self.sandwich_norms else 2) + (2 * self.head_dim if self.qk_norm else 0)
        layer += (query + key_value if self.qkv_bias else 0) + (self.hidden_size if self.o_bias else 0)
        layer += query + key_value // 2 if self.qk_norm_whole else 0
        mlps = sum(self._num_mlp_parameters(one.sparse) for one in self.layers)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * layer + mlps + self.hidden_size

    def _num_mlp_parameters(self, sparse: bool) -> int:
        if not sparse or self.moe is None:
            biases = 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
            return 3 * self.hidden_size * self.intermediate_size + biases
        moe = self.moe
        per_input = moe.num_experts * (1 + 3 * moe.expert_size) + 3 * moe.shared_size
        return self.hidden_size * (per_input + (1 if moe.shared_size else 0))

    @property
    def longest_model_len(self) -> int:
        """The most positions its rotary embedding is made for, scaling counted."""
        longest = self.max_position_embeddings
        for rope in self.ropes:
            if isinstance(rope.scaling, YarnScaling):
                longest = max(longest, int(rope.scaling.original_max_positions * rope.scaling.factor))
            elif isinstance(rope.scaling, LinearScaling) and len(self.ropes) == 1:
                longest = max(longest, int(self.max_position_embeddings * rope.scaling.factor))
        return longest


def read_spec(path: Path) -> ModelSpec:
    """Reads `config.json` and, for the end-of-text ids, `generation_config.json` of the folder `path`.

    Raises ModelLoadError naming the file and the key when the folder, the architecture or a value is not usable.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ModelLoadError(f"{path}: is not a model folder: it has no config.json")
    top = ConfigReader(read_json_object(file), str(file))
    architecture = _architecture(top)
    family = FAMILIES[architecture]
    config = top if family.config_section is None else top.section(family.config_section)
    config = config.with_defaults(family.defaults)
    for reader in (top, config):
        _check_supported(reader)
    spec = _build(architecture, family, config)
    eos_token_ids = tuple(i for i in _eos_token_ids(path, top, config) if i < spec.vocab_size)
    # In a config of several models, the outer object says whether the language model's embeddings are tied.
    tied = (top if "tie_word_embeddings" in top else config).flag("tie_word_embeddings")
    dtype = read_checkpoint_dtype(top, config)
    spec = replace(spec, tied_embeddings=tied, checkpoint_dtype=dtype, eos_token_ids=eos_token_ids)
    return with_max_model_len(spec, None)


def _check_supported(config: ConfigReader) -> None:
    """Raises ModelLoadError for what would be computed otherwise than is meant."""
    if "quantization_config" in config:
        raise config.fail("quantization_config", "absent: quantised checkpoints are not supported")
    if "per_layer_config" in config:
        raise config.fail("per_layer_config", "absent: layers with settings of their own are not supported")
    if config.flag("use_bidirectional_attention"):
        raise config.fail("use_bidirectional_attention", "false: only causal models are supported")
    if "is_causal" in config and not config.flag("is_causal"):
        raise config.fail("is_causal", "true: only causal models are supported")


def with_max_model_len(spec: ModelSpec, max_model_len: int | None) -> ModelSpec:
    """Returns the spec of the model served with at most max_model_len tokens (None: max_position_embeddings).

    Settles which of LongRoPE's two lists rotates. Raises ConfigError when the model is not made for such a length.
    """
    length = spec.max_position_embeddings if max_model_len is None else max_model_len
    check_length(length, spec.longest_model_len)
    return replace(spec, max_model_len=length, ropes=tuple(_settle_rope(rope, length) for rope in spec.ropes))


def _settle_rope(rope: RopeSpec, length: int) -> RopeSpec:
    if not isinstance(rope.scaling, LongRopeScaling):
        return rope
    return replace(rope, scaling=replace(rope.scaling, long=length > rope.scaling.original_max_positions))


def _architecture(config: ConfigReader) -> str:
    names = config.strings("architectures")
    supported = [name for name in names if name in FAMILIES]
    if not supported:
        hint = did_you_mean(names[0], FAMILIES) if names else ""
        raise config.fail("architectures", f"one of {', '.join((*FAMILIES, *ENCODERS))}{hint}")
    return supported[0]


def _build(architecture: str, family: Family, config: ConfigReader) -> ModelSpec:
    hidden_size = config.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_heads, num_kv_heads, head_dim = _heads(config, hidden_size)
    max_positions = config.integer("max_position_embeddings", 1, MAX_POSITIONS)
    layers, ropes = _layers(family, config, num_layers, (head_dim, max_positions))
    query_scalar = config.optional_number("query_pre_attn_scalar", 1e-3, 1e6)
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size", 1, MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", 1, MAX_INTERMEDIATE_SIZE),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        max_model_len=max_positions,
        layers=layers,
        ropes=ropes,
        norm_eps=config.number("rms_norm_eps", 0.0, 1.0),
        activation=cast(Activation, config.choice(family.activation_key, _ACTIVATIONS)),
        attention_scale=(head_dim if query_scalar is None else query_scalar) ** -0.5,
        attention_soft_cap=_soft_cap(config, "attn_logit_softcapping") if family.attention_soft_cap else None,
        final_soft_cap=_soft_cap(config, "final_logit_softcapping"),
        embedding_scale=hidden_size**0.5 if family.scaled_embedding else 1.0,
        qkv_bias=_holds(family.qkv_bias, config),
        o_bias=_holds(family.o_bias, config),
        mlp_bias=_holds(family.mlp_bias, config),
        qk_norm=family.qk_norm,
        norm_offset=family.norm_offset,
        sandwich_norms=family.sandwich_norms,
        qk_norm_whole=family.qk_norm_whole,
        qkv_clip=config.optional_number("clip_qkv", 1e-3, 1e6) if family.qkv_clip else None,
        moe=_moe(family.moe, config) if family.moe is not None else None,
    )


def _moe(keys: MoeKeys, config: ConfigReader) -> MoeSpec:
    count = next((key for key in keys.num_experts if key in config), keys.num_experts[0])
    num_experts = config.integer(count, 1, MAX_EXPERTS)
    return MoeSpec(
        num_experts=num_experts,
        experts_per_token=config.integer("num_experts_per_tok", 1, num_experts),
        expert_size=config.integer(keys.expert_size, 1, MAX_INTERMEDIATE_SIZE),
        normalise=_holds(keys.normalise, config),
        shared_size=config.integer("shared_expert_intermediate_size", 1, MAX_INTERMEDIATE_SIZE) if keys.shared else 0,
    )


def _heads(config: ConfigReader, hidden_size: int) -> tuple[int, int, int]:
    """Returns query heads, key/value heads and head size."""
    num_heads = config.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = config.optional_integer("num_key_value_heads", 1, MAX_HEADS) or num_heads
    if num_heads % num_kv_heads:
        raise config.fail("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    head_dim = config.optional_integer("head_dim", 2, MAX_HEAD_DIM)
    if head_dim is None:
        if hidden_size % num_heads:
            raise config.fail("num_attention_heads", f"a divisor of hidden_size ({hidden_size})")
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise config.fail("head_dim", f"even, since rotary embedding pairs its dims (it comes to {head_dim})")
    return num_heads, num_kv_heads, head_dim


def _layers(
    family: Family, config: ConfigReader, num_layers: int, sizes: tuple[int, int]
) -> tuple[tuple[LayerSpec, ...], tuple[RopeSpec, ...]]:
    """Returns the layers and the distinct ropes they refer to. sizes: head_dim, max_position_embeddings."""
    types = family.layer_types(config, num_layers)
    rotates = rotating_layers(config, num_layers) if family.nope else (True,) * num_layers
    sparse = sparse_layers(config, num_layers) if family.moe is not None else (False,) * num_layers
    window = config.integer("sliding_window", 1, MAX_POSITIONS) if SLIDING in types else None
    by_type = {kind: read_rope(config, kind, *sizes) for kind in sorted(set(types))}
    ropes = tuple(dict.fromkeys(by_type.values()))
    layers = tuple(
        LayerSpec(None if kind == FULL else window, ropes.index(by_type[kind]) if rotating else None, is_sparse)
        for kind, rotating, is_sparse in zip(types, rotates, sparse, strict=True)
    )
    return layers, ropes


def _holds(rule: Rule, config: ConfigReader) -> bool:
    return config.flag(rule) if isinstance(rule, str) else rule


def _soft_cap(config: ConfigReader, key: str) -> float | None:
    return config.optional_number(key, 1e-3, 1e6)


def _eos_token_ids(path: Path, top: ConfigReader, config: ConfigReader) -> tuple[int, ...]:
    """The ids in `generation_config.json`, else those of the config."""
    file = path / "generation_config.json"
    if file.is_file():
        ids = ConfigReader(read_json_object(file), str(file)).token_ids("eos_token_id")
        if ids:
            return ids
    return top.token_ids("eos_token_id") or config.token_ids("eos_token_id")
