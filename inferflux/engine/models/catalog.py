"""The catalog: one row per model family, saying how its `config.json` and its checkpoints are to be read.

A new family whose layers are made of the same parts is a new row. Nothing of a model's folder is ever executed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from inferflux.engine.models.config_reader import ConfigReader
from inferflux.engine.models.weight_names import (
    FUSED_NAMES,
    GEMMA_MULTIMODAL_NAMES,
    GEMMA_NAMES,
    LLAMA_NAMES,
    MIXTRAL_NAMES,
    WeightNames,
)

FULL = "full_attention"
SLIDING = "sliding_attention"
LayerTypes = tuple[str, ...]
LayerTypesOf = Callable[[ConfigReader, int], LayerTypes]
# Whether something holds of a family's models, or the key under which the config of each says so.
Rule = bool | str


def _all_full(config: ConfigReader, num_layers: int) -> LayerTypes:
    return (FULL,) * num_layers


@dataclass(frozen=True, slots=True)
class MoeKeys:
    """Under which keys a family's configs keep the sizes of its mixtures of experts.

    normalise: whether the chosen experts' weights are made to add up to 1.
    shared: an expert that every token goes through, of `shared_expert_intermediate_size`.
    """

    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    expert_size: str = "moe_intermediate_size"
    normalise: Rule = "norm_topk_prob"
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family apart.

    layer_types: (config, num_layers) -> one of FULL and SLIDING per layer.
    defaults: what its configs may leave out.
    qkv_bias, o_bias, mlp_bias: whether these products add a bias.
    qk_norm: queries and keys are normalised, head by head; qk_norm_whole: all heads of a token as one.
    moe: MLPs are mixtures of experts, in the layers that `decoder_sparse_step` and `mlp_only_layers` say.
    qkv_clip: reads `clip_qkv`, beyond which queries, keys and values are cut off.
    nope: reads `no_rope_layers`. norm_offset: norms multiply by 1 + weight. sandwich_norms: attention and MLP outputs
    are normalised too. scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
    config_section: where the language model's keys are, in a config of several models.
    """

    names: WeightNames = LLAMA_NAMES
    layer_types: LayerTypesOf = _all_full
    defaults: Mapping[str, object] = field(default_factory=dict)
    qkv_bias: Rule = False
    o_bias: Rule = False
    mlp_bias: Rule = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    moe: MoeKeys | None = None
    qkv_clip: bool = False
    nope: bool = False
    norm_offset: bool = False
    sandwich_norms: bool = False
    scaled_embedding: bool = False
    attention_soft_cap: bool = False
    activation_key: str = "hidden_act"
    config_section: str | None = None


def _all_sliding(config: ConfigReader, num_layers: int) -> LayerTypes:
    return (SLIDING if "sliding_window" in config else FULL,) * num_layers


def _all_sliding_if_used(config: ConfigReader, num_layers: int) -> LayerTypes:
    return _all_sliding(config, num_layers) if config.flag("use_sliding_window") else (FULL,) * num_layers


def _listed(config: ConfigReader, num_layers: int) -> LayerTypes | None:
    """The config's `layer_types`, or None where it has none."""
    if "layer_types" not in config:
        return None
    types = config.strings("layer_types")
    if len(types) != num_layers or not set(types) <= {FULL, SLIDING}:
        raise config.fail("layer_types", f"a list of {num_layers} words, each {FULL} or {SLIDING}")
    return types


def _listed_or_sliding(config: ConfigReader, num_layers: int) -> LayerTypes:
    """Mistral's; those that list their layers are the ones that transformers calls Ministral."""
    return _listed(config, num_layers) or _all_sliding(config, num_layers)


def _sliding_above(config: ConfigReader, num_layers: int) -> LayerTypes:
    if not config.flag("use_sliding_window") or "sliding_window" not in config:
        return (FULL,) * num_layers
    first = config.integer("max_window_layers", 0, 2**20)
    return _listed(config, num_layers) or tuple(SLIDING if i >= first else FULL for i in range(num_layers))


def _every_second_below(config: ConfigReader, num_layers: int) -> LayerTypes:
    if not config.flag("use_sliding_window"):
        return (FULL,) * num_layers
    end = config.integer("max_window_layers", 0, 2**20)
    return _listed(config, num_layers) or tuple(SLIDING if i < end and i % 2 == 0 else FULL for i in range(num_layers))


def _sliding_without_rope(config: ConfigReader, num_layers: int) -> LayerTypes:
    if not config.flag("use_sliding_window") or "sliding_window" not in config:
        return (FULL,) * num_layers
    return _listed(config, num_layers) or tuple(FULL if r else SLIDING for r in rotating_layers(config, num_layers))


def _alternating(config: ConfigReader, num_layers: int) -> LayerTypes:
    """Every n-th layer is full, the others slide; n is `sliding_window_pattern`."""
    period = config.integer("sliding_window_pattern", 1, 2**20)
    return _listed(config, num_layers) or tuple(SLIDING if (i + 1) % period else FULL for i in range(num_layers))


def rotating_layers(config: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers rotate their queries and keys, by `no_rope_layers` (1 rotates) or `no_rope_layer_interval`."""
    if "no_rope_layers" in config:
        return tuple(bool(flag) for flag in config.numbers("no_rope_layers", num_layers, 0, 1))
    interval = config.integer("no_rope_layer_interval", 1, 2**20)
    return tuple((i + 1) % interval != 0 for i in range(num_layers))


def sparse_layers(config: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every `decoder_sparse_step`-th, but for those in `mlp_only_layers`."""
    step = config.optional_integer("decoder_sparse_step", 1, 2**20) or 1
    dense = config.integers("mlp_only_layers", 0, num_layers - 1)
    return tuple((i + 1) % step == 0 and i not in dense for i in range(num_layers))


_COMMON: Mapping[str, object] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_GEMMA: Mapping[str, object] = {
    **_COMMON,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3: Mapping[str, object] = {
    **_GEMMA,
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "sliding_window_pattern": 6,
}
_QWEN: Mapping[str, object] = {
    **_COMMON,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_GEMMA3_TEXT = Family(
    names=GEMMA_NAMES,
    defaults=_GEMMA3,
    layer_types=_alternating,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm=True,
    norm_offset=True,
    sandwich_norms=True,
    scaled_embedding=True,
    activation_key="hidden_activation",
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        defaults={**_COMMON, "max_position_embeddings": 2048},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "MistralForCausalLM": Family(
        defaults={**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        layer_types=_listed_or_sliding,
    ),
    "SeedOssForCausalLM": Family(
        defaults={
            **_COMMON,
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
        },
        qkv_bias="attention_bias",
        o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "Qwen2ForCausalLM": Family(defaults=_QWEN, layer_types=_sliding_above, qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        defaults={**_QWEN, "head_dim": 128},
        layer_types=_sliding_above,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
    ),
    "MixtralForCausalLM": Family(
        names=MIXTRAL_NAMES,
        defaults={
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "rope_theta": 1e6,
        },
        layer_types=_all_sliding,
        moe=MoeKeys(expert_size="intermediate_size", normalise=True),
    ),
    "Qwen2MoeForCausalLM": Family(
        defaults={**_QWEN, "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True},
        layer_types=_every_second_below,
        qkv_bias="qkv_bias",
        moe=MoeKeys(shared=True),
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults={**_QWEN, "num_experts_per_tok": 8},
        layer_types=_all_sliding_if_used,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        moe=MoeKeys(),
    ),
    "OlmoeForCausalLM": Family(
        defaults={
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "num_experts_per_tok": 8,
            "num_experts": 64,
        },
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm_whole=True,
        moe=MoeKeys(expert_size="intermediate_size"),
        qkv_clip=True,
    ),
    "SmolLM3ForCausalLM": Family(
        defaults={
            **_COMMON,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        layer_types=_sliding_without_rope,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        nope=True,
    ),
    "Phi3ForCausalLM": Family(
        names=FUSED_NAMES,
        defaults={
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        layer_types=_all_sliding,
    ),
    "Gemma2ForCausalLM": Family(
        names=GEMMA_NAMES,
        defaults={
            **_GEMMA,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        layer_types=_alternating,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norm_offset=True,
        sandwich_norms=True,
        scaled_embedding=True,
        attention_soft_cap=True,
        activation_key="hidden_activation",
    ),
    "Gemma3ForCausalLM": _GEMMA3_TEXT,
    "Gemma3ForConditionalGeneration": replace(_GEMMA3_TEXT, names=GEMMA_MULTIMODAL_NAMES, config_section="text_config"),
}
