"""What sentence-transformers' files say of a model's vectors: pooling, the longest text, the modules. No torch.

A folder without those files says nothing. One that asks for what is not computed here is refused: its vectors would be
others than its makers'.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast

from inferflux.engine.model_files import read_json_array, read_json_object
from inferflux.engine.models.config_reader import ConfigReader
from inferflux.errors import ModelLoadError
from inferflux.sampling_params import Pooling

_POOLING_FILE: Final = Path("1_Pooling", "config.json")
_LENGTH_FILE: Final = Path("sentence_bert_config.json")
_MODULES_FILE: Final = Path("modules.json")
# By the last part of the class's name; packages were renamed over the years.
_MODULES: Final = frozenset(("Transformer", "Pooling", "Normalize"))
_POOLINGS: Final[Mapping[str, Pooling]] = MappingProxyType({"cls": "cls", "mean": "mean", "lasttoken": "last"})
# How releases before 5.4 wrote a mode: each as a flag of its own.
_MODE_FLAGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "lasttoken",
    }
)
MAX_LENGTH: Final = 2**24


def read_pooling(path: Path) -> Pooling | None:
    """Returns the pooling that the folder asks for, None when it does not say.

    Raises ModelLoadError when it asks for another one than there is here, or for further modules.
    """
    _check_modules(path / _MODULES_FILE)
    file = path / _POOLING_FILE
    if not file.is_file():
        return None
    values = read_json_object(file)
    config = ConfigReader(values, str(file))
    if "pooling_mode" in config:
        return cast(Pooling, config.choice("pooling_mode", _POOLINGS))
    flags = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(flags) != 1 or flags[0] not in _MODE_FLAGS:
        raise config.fail(flags[0] if flags else "pooling_mode_mean_tokens", f"one of {', '.join(_MODE_FLAGS)}, alone")
    return _POOLINGS[_MODE_FLAGS[flags[0]]]


def read_max_length(path: Path) -> int | None:
    """Returns the most tokens of a text that the model was made for, None when the folder does not say."""
    file = path / _LENGTH_FILE
    if not file.is_file():
        return None
    return ConfigReader(read_json_object(file), str(file)).optional_integer("max_seq_length", 1, MAX_LENGTH)


def _check_modules(file: Path) -> None:
    if not file.is_file():
        return
    for index, module in enumerate(read_json_array(file)):
        kind = module.get("type") if isinstance(module, dict) else module
        if str(kind).rpartition(".")[2] not in _MODULES:
            raise ModelLoadError(
                f"{file}: [{index}].type: must be one of {', '.join(sorted(_MODULES))} (got {kind!r:.90})"
            )
