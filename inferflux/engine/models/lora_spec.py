"""LoraSpec: which matrices a LoRA adapter adds to, and how much, read from PEFT's `adapter_config.json` and checked.

What else a config may ask for that would change the numbers is refused, and so is an expression that takes long. Knows
modules by their names; no torch, no weights.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from inferflux.engine.model_files import read_json_object
from inferflux.engine.models.config_reader import ConfigReader
from inferflux.engine.models.expressions import LIMIT_S, Expressions

CONFIG_FILE: Final = "adapter_config.json"
ALL_LINEAR: Final = "all-linear"
MAX_RANK: Final = 4096
MAX_ALPHA: Final = 1e6
MAX_PATTERN_CHARS: Final = 1000
# What these keys may say, besides nothing: anything else would change what the adapter computes.
_PLAIN: Final[Mapping[str, tuple[object, ...]]] = MappingProxyType(
    {
        "bias": ("none",),
        "lora_bias": (False,),
        "fan_in_fan_out": (False,),
        "use_dora": (False,),
        "use_qalora": (False,),
        "modules_to_save": ([],),
        "target_parameters": ([],),
        "trainable_token_indices": ([], {}),
        "layer_replication": ([],),
        "alora_invocation_tokens": ([],),
        "layers_pattern": ([], "", "layers", ["layers"]),
        # Others begin from base weights of their own, which such a file does not hold.
        "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    }
)
# What is read here, and what was for the training only. A flag or a section that is not known may change anything.
_KNOWN: Final = frozenset(
    [
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "rank_pattern",
        "alpha_pattern",
        "auto_mapping",
        "inference_mode",
        "ensure_weight_tying",
        "megatron_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
    ]
).union(_PLAIN)


@dataclass(frozen=True, slots=True)
class ModuleRule:
    """Names modules: `names` themselves or what ends with one after a dot, or what an expression has `matched`."""

    names: tuple[str, ...] = ()
    matched: frozenset[str] | None = None

    def __contains__(self, module: str) -> bool:
        if self.matched is not None:
            return module in self.matched
        return module in self.names or module.endswith(tuple(f".{name}" for name in self.names))


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """rank, alpha: of modules that `ranks` and `alphas` say nothing of; there the first that have a module count.

    rooted: the scale is alpha / sqrt(rank), not alpha / rank. layers: only these; None: all. A module that `targets`
    names in full is adapted in any layer.
    """

    rank: int
    alpha: float
    rooted: bool
    ranks: tuple[tuple[frozenset[str], int], ...]
    alphas: tuple[tuple[frozenset[str], float], ...]
    targets: ModuleRule
    excluded: ModuleRule
    layers: frozenset[int] | None

    def adapts(self, module: str, layer: int) -> bool:
        """Whether the module of this name, which lies in this layer, is adapted."""
        if module in self.excluded or module not in self.targets:
            return False
        return self.layers is None or layer in self.layers or module in self.targets.names

    def rank_of(self, module: str) -> int:
        return next((rank for modules, rank in self.ranks if module in modules), self.rank)

    def scale_of(self, module: str) -> float:
        alpha = next((alpha for modules, alpha in self.alphas if module in modules), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def read_lora_config(folder: Path) -> dict[str, Any]:
    """Reads the folder's adapter_config.json. Raises ModelLoadError for what is not supported in it."""
    path = folder / CONFIG_FILE
    values = read_json_object(path)
    config = ConfigReader(values, str(path))
    config.choice("peft_type", {"LORA": "LORA"})
    _check_plain(values, config)
    return values


def lora_spec(folder: Path, values: Mapping[str, Any], modules: Sequence[str]) -> LoraSpec:
    """Returns what a folder's config says of a model with these modules. Raises ModelLoadError for what is wrong."""
    config = ConfigReader(values, str(folder / CONFIG_FILE))
    with Expressions(modules) as expressions:
        ranks = tuple(
            (found, section.integer(key, 1, MAX_RANK))
            for found, key, section in _patterns(config, "rank_pattern", expressions)
        )
        alphas = tuple(
            (found, section.number(key, 0.0, MAX_ALPHA))
            for found, key, section in _patterns(config, "alpha_pattern", expressions)
        )
        return LoraSpec(
            rank=config.integer("r", 1, MAX_RANK),
            alpha=config.number("lora_alpha", 0.0, MAX_ALPHA),
            rooted=config.flag("use_rslora"),
            ranks=ranks,
            alphas=alphas,
            targets=_modules(config, values, "target_modules", expressions),
            excluded=_modules(config, values, "exclude_modules", expressions),
            layers=_layers(config, values.get("layers_to_transform")),
        )


def _check_plain(values: Mapping[str, object], config: ConfigReader) -> None:
    for key, accepted in _PLAIN.items():
        if values.get(key) is not None and values[key] not in accepted:
            words = [word if isinstance(word, str) else repr(word).lower() for word in accepted if word != ""]
            raise config.fail(key, f"absent or {' or '.join(words)}: anything else is not supported")
    for key, value in values.items():
        if key not in _KNOWN and (value is True or (isinstance(value, list | dict) and value)):
            raise config.fail(key, "absent: it is not supported")


def _modules(config: ConfigReader, values: Mapping[str, object], key: str, expressions: Expressions) -> ModuleRule:
    """Returns whom a list of names, an expression or `all-linear` means; the latter only where a target is wanted."""
    value, is_target = values.get(key), key == "target_modules"
    if value is None and not is_target:
        return ModuleRule()
    if is_target and value == ALL_LINEAR:
        return ModuleRule(matched=frozenset(expressions.names))
    if isinstance(value, str):
        return ModuleRule(matched=_matching(config, key, value, expressions))
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise config.fail(key, "a list of module names, or a regular expression" + f", or {ALL_LINEAR}" * is_target)
    return ModuleRule(tuple(value))


def _patterns(
    config: ConfigReader, key: str, expressions: Expressions
) -> Iterator[tuple[frozenset[str], str, ConfigReader]]:
    """Yields what the object under `key` has values for: the modules, their key, and a reader of the object."""
    section = config.section(key)
    for one in section:
        yield _matching(section, one, one, expressions, before=r"(?:.*\.)?"), one, section


def _matching(
    config: ConfigReader, key: str, pattern: str, expressions: Expressions, before: str = ""
) -> frozenset[str]:
    try:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise ValueError
        return expressions.matching(pattern, before)
    except TimeoutError:
        raise config.fail(key, f"a regular expression that finds its modules within {LIMIT_S:g} s") from None
    except (re.error, ValueError, RecursionError, OverflowError):
        raise config.fail(key, f"a regular expression of at most {MAX_PATTERN_CHARS} characters") from None


def _layers(config: ConfigReader, value: object) -> frozenset[int] | None:
    key = "layers_to_transform"
    layers = config.integers(key, 0, 2**20) if isinstance(value, list) else config.optional_integer(key, 0, 2**20)
    if isinstance(layers, int):
        return frozenset((layers,))
    return frozenset(layers) if layers else None
