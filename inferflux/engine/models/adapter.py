"""Adapter: a LoRA adapter's folder, held against the model it is for: which tensors go with which of its matrices.

A folder has `adapter_config.json` (see `lora_spec`) and `adapter_model.safetensors`, as PEFT writes them; pickled
weights are never opened. Every tensor that the config asks for must be there, and no other. Reads no weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from inferflux.config.tree import AdapterConfig
from inferflux.engine.models.catalog import FAMILIES
from inferflux.engine.models.lora_spec import CONFIG_FILE, LoraSpec, lora_spec, read_lora_config
from inferflux.engine.models.spec import ModelSpec
from inferflux.engine.models.weight_table import weight_table
from inferflux.engine.weights.loader import check_tensors, listed
from inferflux.engine.weights.safetensors_file import SafetensorsFile, TensorEntry
from inferflux.engine.weights.source import TensorSource, Weight
from inferflux.errors import ConfigError, ModelLoadError

WEIGHTS_FILE: Final = "adapter_model.safetensors"
# Before the names of the model's modules, which stand in two more models once they are adapted.
_WRAPPED: Final = "base_model.model."
_MATRIX: Final = ".weight"


class Pair(NamedTuple):
    """What is added to the product of one of the model's tensors: x @ down.T @ up.T * scale, down [r, in], up [out, r].
    Ranks share it as they share the tensor, by its inputs or by its outputs. rank: r."""

    down: TensorSource
    up: TensorSource
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """pairs: by the name of the model's tensor. num_parameters: of the low ranks as they are computed with."""

    id: str
    folder: Path
    pairs: Mapping[str, Pair]
    num_parameters: int


class AdapterFile:
    """The weights of a folder, opened. tensors: by name, without the `default` that PEFT may have put in."""

    def __init__(self, folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            pickled = any(folder.glob("adapter_model.bin"))
            hint = "; pickled weights (.bin) can run code and are never read: convert them" if pickled else ""
            raise ModelLoadError(f"{folder}: has no {WEIGHTS_FILE}{hint}")
        file = SafetensorsFile(path)
        self.files = [file]
        self.tensors: dict[str, tuple[SafetensorsFile, TensorEntry]] = {}
        for name, entry in file.entries.items():
            plain = name.replace(".default.", ".")
            if plain in self.tensors:
                file.close()
                raise ModelLoadError(f"{path}: tensor {plain!r:.200} is there both with and without default")
            self.tensors[plain] = (file, entry)

    def close(self) -> None:
        for file in self.files:
            file.close()


def read_adapter(config: AdapterConfig, spec: ModelSpec) -> Adapter:
    """Raises ConfigError when there is no such folder, ModelLoadError when it is not sound or not for this model."""
    folder = Path(config.path)
    if not folder.is_dir():
        raise ConfigError(f"adapters: {config.id}: {folder} is not a folder")
    values = read_lora_config(folder)
    with closing(AdapterFile(folder)) as file:
        weights = list(_weights(spec))
        modules = _module_names(spec, file.tensors, [weight for _, weight in weights])
        lora = lora_spec(folder, values, list(modules.values()))
        pairs = {
            source.name: _pair(lora, source, modules[source.name])
            for layer, weight in weights
            for source in weight
            if lora.adapts(modules[source.name], layer)
        }
        _check(file, pairs, folder, sorted({module.rpartition(".")[2] for module in modules.values()}))
    num_parameters = sum(_num_parameters(weight, pairs) for _, weight in weights)
    return Adapter(config.id, folder, MappingProxyType(pairs), num_parameters)


def _weights(spec: ModelSpec) -> Iterator[tuple[int, Weight]]:
    """Yields what can be adapted, by layer: attention's matrices, and those of an MLP that is no mixture of experts."""
    for index, (layer, weights) in enumerate(zip(spec.layers, weight_table(spec).layers, strict=True)):
        for weight in (weights.qkv, weights.o, *(() if layer.sparse else (weights.gate_up, weights.down))):
            assert weight is not None, "a layer has an MLP or experts"
            yield index, weight


def _module_names(spec: ModelSpec, tensors: Mapping[str, object], weights: list[Weight]) -> dict[str, str]:
    """Returns what PEFT calls the module of each of the model's tensors: by the names that the file's have."""
    names = FAMILIES[spec.architecture].names
    prefixes = (names.prefix, *names.adapter_prefixes)
    starts = {prefix: f"{_WRAPPED}{prefix}layers." for prefix in prefixes}
    used = next((prefix for prefix in prefixes if any(one.startswith(starts[prefix]) for one in tensors)), names.prefix)
    sources = [source.name for weight in weights for source in weight]
    return {name: used + name.removeprefix(names.prefix).removesuffix(_MATRIX) for name in sources}


def _pair(lora: LoraSpec, source: TensorSource, module: str) -> Pair:
    rank, (num_outputs, num_inputs) = lora.rank_of(module), source.shape
    name = f"{_WRAPPED}{module}.lora_"
    down = TensorSource(f"{name}A{_MATRIX}", (rank, num_inputs), "row" if source.split == "row" else "replicated")
    up = TensorSource(f"{name}B{_MATRIX}", (num_outputs, rank))
    if source.split == "column":
        up = TensorSource(up.name, up.shape, "column", source.sections, source.heads)
    return Pair(down, up, lora.scale_of(module))


def _check(file: AdapterFile, pairs: Mapping[str, Pair], folder: Path, modules: list[str]) -> None:
    """modules: the last parts of the names of all that can be adapted."""
    if not pairs:
        accepted = f"must name some of this model's {', '.join(modules)}"
        raise ModelLoadError(f"{folder / CONFIG_FILE}: target_modules: {accepted}, which it does not in any layer")
    sources = [source for pair in pairs.values() for source in (pair.down, pair.up)]
    needed = {source.name for source in sources}
    leftover = [name for name in file.tensors if name not in needed]
    if leftover:
        raise ModelLoadError(
            f"{folder / WEIGHTS_FILE}: has tensors that {CONFIG_FILE} does not ask for or this model cannot use, "
            f"{listed(leftover)}; it can use lora_A and lora_B of {', '.join(modules)}"
        )
    check_tensors(file, sources, lambda name: False)


def _num_parameters(weight: Weight, pairs: Mapping[str, Pair]) -> int:
    rank = sum(pairs[source.name].rank for source in weight if source.name in pairs)
    return rank * (weight[0].shape[1] + sum(source.shape[0] for source in weight))
