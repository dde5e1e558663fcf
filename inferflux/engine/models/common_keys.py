"""What the configs of decoders and encoders have in common: the checkpoint's type, and the length served. No torch."""

from typing import Final, Literal, cast

from inferflux.engine.models.config_reader import ConfigReader
from inferflux.errors import ConfigError

CheckpointDtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: Final = {name: name for name in ("float32", "bfloat16", "float16")}


def read_checkpoint_dtype(*configs: ConfigReader) -> CheckpointDtype:
    """transformers 5.x writes `dtype`, 4.x `torch_dtype`; without either it is taken as float32. Raises ModelLoadError
    for another type."""
    for config in configs:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                return cast(CheckpointDtype, config.choice(key, _DTYPES))
    return "float32"


def check_length(length: int, longest: int) -> None:
    """Raises ConfigError when a model that is made for `longest` tokens is to be served with such a length."""
    if not 1 <= length <= longest:
        raise ConfigError(
            f"models[].max_model_len: must be >= 1 and <= {longest}, what the model is made for (got {length})"
        )
