"""Backends: the built-in ones, those of entry points, and any module or file.

Knows how to find an op in a backend; `kernel_set` decides which backend to use.
"""

import difflib
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch

from inferflux.errors import ConfigError, did_you_mean
from inferflux.kernels.blame import describe_failure
from inferflux.kernels.reasons import missing

OPS: Final = (
    "attention",
    "linear",
    "quantized_linear",
    "norm",
    "add_norm",
    "rope",
    "activation",
    "moe",
    "quantized_moe",
    "sampling",
)

# Ends the message about a module that is not found.
LOOKED_FOR: Final = "modules are found if their package is installed or its folder is in PYTHONPATH"

# Best first; each is a package `inferflux.kernels.NAME`.
BUILT_IN: Final = ("triton", "native", "torch", "reference")
# Those that read or write cached keys and values.
KV_OPS: Final = frozenset({"attention", "rope"})
ENTRY_POINT_GROUP: Final = "inferflux.kernels"

# Ops that share a file with another.
_FILES: Final = {"add_norm": "norm"}
# Ops that own a layout: `pack` and `run`.
PACKED_OPS: Final = frozenset({"linear", "quantized_linear", "moe", "quantized_moe"})


class Backend(NamedTuple):
    """name: as in `runtime.kernels`. module: has the ops (see `ops`) and optionally `supports(op, device, dtype)`,
    which returns why it cannot serve the op, or None."""

    name: str
    module: ModuleType

    @property
    def device_lengths(self) -> bool:
        """Whether its attention reads rows' lengths from tensors alone, which it says by `DEVICE_LENGTHS = True`: then
        a recorded step may hold it, in which the lengths for the host are those of the longest row there could be."""
        return bool(getattr(self.module, "DEVICE_LENGTHS", False))

    @property
    def quantized_kv(self) -> bool:
        """Whether it reads and writes keys and values cached in 8 bits, which it says by `QUANTIZED_KV = True`."""
        return bool(getattr(self.module, "QUANTIZED_KV", False))

    def refusal(self, op: str, device: torch.device, dtype: torch.dtype, *, quantized_kv: bool = False) -> str | None:
        """Returns why this backend cannot serve `op` there, or None when it can. quantized_kv: keys and values are
        cached in 8 bits."""
        if quantized_kv and op in KV_OPS and not self.quantized_kv:
            return "it does not support keys and values of 8 bits"
        reason = self._own_refusal(op, device, dtype)
        if reason is not None:
            return reason
        try:
            return None if self.find(op) is not None else self._what_is_missing(op)
        except Exception as error:
            return f"cannot be imported: {describe_failure(error)}"

    def find(self, op: str) -> Any:
        """Returns the implementation of `op`, or None. Raises whatever its file does when it is imported."""
        holder = self._file(op)
        found = getattr(holder, op, None)
        if op in PACKED_OPS:
            # A whole module with `pack` and `run` is a linear; one of the op's own file is what the file is called.
            candidates = (found, holder if op == "linear" or holder is not self.module else None)
            return next((each for each in candidates if hasattr(each, "pack") and hasattr(each, "run")), None)
        return found if callable(found) else None

    def _own_refusal(self, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """What the module itself says. A stranger's `supports` may be wrong in any way."""
        supports = getattr(self.module, "supports", None)
        if supports is None:
            return None
        try:
            reason = supports(op, device, dtype)
        except Exception as error:
            return f"its supports() failed: {describe_failure(error)}"
        if reason is None or isinstance(reason, str):
            return reason
        return f"its supports() returned {reason!r}, neither a reason nor None"

    def _what_is_missing(self, op: str) -> str:
        """Of an op that is not there, or only in part, or under another name."""
        found = getattr(self.module, op, None)
        if found is not None and op in PACKED_OPS:
            return f"its {op} has no {' and no '.join(name for name in ('pack', 'run') if not hasattr(found, name))}"
        for name, value in vars(self.module).items():
            is_own = name not in OPS and getattr(value, "__module__", None) == self.module.__name__
            if is_own and difflib.get_close_matches(name, OPS, n=1) == [op]:
                return f"it has no {op}, unless its {name} is meant"
        return missing(op)

    def _file(self, op: str) -> ModuleType:
        """A package has a file per op, or all of them in itself."""
        if hasattr(self.module, "__path__"):
            name = f"{self.module.__name__}.{_FILES.get(op, op)}"
            if importlib.util.find_spec(name) is not None:
                return importlib.import_module(name)
        return self.module


def installed_names() -> list[str]:
    """Names that installed packages give their kernels, in order."""
    return sorted(entry_points(group=ENTRY_POINT_GROUP).names)


def find_backend(name: str, also: tuple[str, ...] = ()) -> Backend:
    """Returns the backend called `name`: built in, an entry point, a dotted module or a Python file.

    Raises ConfigError when there is none or it cannot be imported; the message lists what is accepted, and `also`:
    words that the caller understands besides.
    """
    if name in BUILT_IN:
        # First, since looking for entry points reads the metadata of everything that is installed: 70 ms.
        return Backend(name, _import_built_in(name))
    installed = entry_points(group=ENTRY_POINT_GROUP)
    names = (*also, *BUILT_IN, *installed_names())
    is_path = name.endswith(".py")
    is_module = "." in name or (name.isidentifier() and _is_installed(name))
    if name not in names and not is_path and not is_module:
        raise ConfigError(
            f"no kernels called {name!r}; accepted: {', '.join(names)}, a module (my_package.my_kernels) or a file "
            f"(path/to/kernels.py){did_you_mean(name, names)}"
        )
    try:
        if name in installed.names:
            module = installed[name].load()
        else:
            module = _load_file(Path(name)) if is_path else importlib.import_module(name)
    except (Exception, SystemExit) as error:
        # A program that is installed does not look where it is started, nor beside a file it is given.
        hint = f" ({LOOKED_FOR})" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"kernels {name!r} cannot be imported: {describe_failure(error)}{hint}") from error
    return Backend(name, module)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        return False  # what runs as a program has no spec


def _import_built_in(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"inferflux.kernels.{name}")
    except Exception as error:
        raise ConfigError(f"kernels {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    name = f"inferflux_kernels_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and decorators of the file look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
