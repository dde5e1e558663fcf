"""Checkpoint: all tensors of a model folder by name, whether they lie in one safetensors file or in many.

Files may be symbolic links (the caches of model hubs are made of them), but the index can name none outside its
folder. Pickled weights (`.bin`, `.pt`) are never opened. Knows no model; no torch.
"""

from pathlib import Path
from types import TracebackType

from inferflux.engine.model_files import read_json_object
from inferflux.engine.weights.safetensors_file import SafetensorsFile, TensorEntry
from inferflux.errors import ModelLoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_FILES = 512
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """The open files of one folder. `tensors`: name -> (file, entry). A context manager: leaving it closes the files.

    Raises ModelLoadError when there are no safetensors, a file is not sound, or the index and the files disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, tuple[SafetensorsFile, TensorEntry]] = {}
        weight_map = _weight_map(folder)
        try:
            for name in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]:
                self._add(SafetensorsFile(folder / name))
            if weight_map is not None:
                self._check_index(weight_map, folder / INDEX_FILE)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def _add(self, file: SafetensorsFile) -> None:
        self.files.append(file)
        for name, entry in file.entries.items():
            if name in self.tensors:
                raise ModelLoadError(f"{file.path}: tensor {name!r:.200} is in {self.tensors[name][0].path} too")
            self.tensors[name] = (file, entry)

    def _check_index(self, weight_map: dict[str, str], index: Path) -> None:
        for name, file_name in weight_map.items():
            if name not in self.tensors or self.tensors[name][0].path.name != file_name:
                raise ModelLoadError(f"{index}: weight_map: tensor {name!r:.200} is not in {file_name}")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Returns the index's tensor name -> file name, or None where one file holds all."""
    if (folder / SINGLE_FILE).is_file():
        return None
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ModelLoadError(_no_weights(folder))
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: weight_map: must be an object of tensor name to file name")
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise ModelLoadError(
                f"{index}: weight_map: must name .safetensors files of its own folder (got {file_name!r:.100})"
            )
    if len(set(weight_map.values())) > MAX_FILES:
        raise ModelLoadError(f"{index}: weight_map: must name at most {MAX_FILES} files")
    return weight_map


def _is_plain_name(name: str) -> bool:
    separators = any(character in name for character in ("/", "\\", "\0"))
    return name.endswith(".safetensors") and not separators and not name.startswith(".")


def _no_weights(folder: Path) -> str:
    message = f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}"
    if any(path.suffix in _PICKLES for path in folder.iterdir()):
        message += "; pickled weights (.bin, .pt) can run code and are never read: convert them to safetensors"
    return message
