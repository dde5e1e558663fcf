"""EncoderSpec: the sizes of a bidirectional encoder (BERT, RoBERTa), read from a Hugging Face folder. No torch.

These models embed and generate nothing. A new family whose parts are the same is a new row of ENCODERS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, cast

from inferflux.engine.model_files import read_json_object
from inferflux.engine.models.common_keys import CheckpointDtype, check_length, read_checkpoint_dtype
from inferflux.engine.models.config_reader import ConfigReader
from inferflux.engine.models.sentence_settings import read_max_length

EncoderActivation = Literal["gelu", "gelu_tanh", "relu", "silu"]

_ACTIVATIONS: Final = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """prefix: what checkpoints of a larger model put before the names. pads_positions: positions begin behind the
    padding token's id."""

    prefix: str
    pads_positions: bool = False


ENCODERS: Final[Mapping[str, EncoderFamily]] = MappingProxyType(
    {
        "BertModel": EncoderFamily("bert."),
        "BertForMaskedLM": EncoderFamily("bert."),
        "RobertaModel": EncoderFamily("roberta.", pads_positions=True),
        "XLMRobertaModel": EncoderFamily("roberta.", pads_positions=True),
    }
)


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """first_position: the position of a text's first token. max_model_len: the longest text in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    first_position: int
    num_types: int
    max_model_len: int
    norm_eps: float
    activation: EncoderActivation
    checkpoint_dtype: CheckpointDtype

    @property
    def num_parameters(self) -> int:
        hidden, inner = self.hidden_size, self.intermediate_size
        layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden
        return (self.vocab_size + self.num_positions + self.num_types + 2) * hidden + self.num_layers * layer


def encoder_architecture(path: Path) -> str | None:
    """Returns which encoder the folder `path` holds, None when it is none."""
    file = path / "config.json"
    if not file.is_file():
        return None
    names = ConfigReader(read_json_object(file), str(file)).strings("architectures")
    return next((name for name in names if name in ENCODERS), None)


def read_encoder_spec(path: Path, max_model_len: int | None) -> EncoderSpec:
    """Raises ModelLoadError naming the file and the key when a value is not usable, ConfigError when max_model_len is
    not what the model is made for."""
    file = path / "config.json"
    config = ConfigReader(read_json_object(file), str(file), {"hidden_act": "gelu", "layer_norm_eps": 1e-12})
    architecture = encoder_architecture(path)
    assert architecture is not None, "the caller has asked"
    if config.flag("is_decoder") or config.flag("add_cross_attention"):
        raise config.fail("is_decoder", "false: only encoders are supported")
    if "position_embedding_type" in config:
        config.choice("position_embedding_type", {"absolute": "absolute"})
    first = config.integer("pad_token_id", 0, 2**20) + 1 if ENCODERS[architecture].pads_positions else 0
    num_positions = config.integer("max_position_embeddings", 1, 2**20)
    hidden, num_heads = config.integer("hidden_size", 1, 2**17), config.integer("num_attention_heads", 1, 1024)
    if hidden % num_heads:
        raise config.fail("num_attention_heads", f"a divisor of hidden_size ({hidden})")
    longest = num_positions - first
    check_length(longest if max_model_len is None else max_model_len, longest)
    return EncoderSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size", 1, 2**22),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size", 1, 2**20),
        num_layers=config.integer("num_hidden_layers", 1, 1024),
        num_heads=num_heads,
        num_positions=num_positions,
        first_position=first,
        num_types=config.integer("type_vocab_size", 1, 1024),
        max_model_len=max_model_len or min(longest, read_max_length(path) or longest),
        norm_eps=config.number("layer_norm_eps", 0.0, 1.0),
        activation=cast(EncoderActivation, config.choice("hidden_act", _ACTIVATIONS)),
        checkpoint_dtype=read_checkpoint_dtype(config),
    )
