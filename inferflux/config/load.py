"""Reads the configuration: flag over environment over YAML over default, each value with its origin.

`load_config` is the only entry point; it takes the environment and the flags as arguments and returns a frozen tree. A
fault is a ConfigError of one line: `origin: key.path: what is accepted (got ...)`. Rules between keys are in `checks`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec

from inferflux.config import checks
from inferflux.config.env import FLAGS, MODEL_PATH, read_setting, settings_from_env, warnings_of
from inferflux.config.layers import DEFAULT_ORIGIN, Layers, find_origin
from inferflux.config.process_env import PASSPHRASE_VARIABLE, policy_passphrase
from inferflux.config.schema import ANY_INDEX, Key, format_key
from inferflux.config.tree import Config
from inferflux.errors import ConfigError
from inferflux.log import escape


@dataclass(frozen=True)
class LoadedConfig:
    """The effective configuration and the file it was read from. `origins` names the source of every value that is
    not a default; `warnings` are lines for the log."""

    config: Config
    path: Path | None
    origins: Mapping[Key, str]
    warnings: tuple[str, ...] = ()

    def origin(self, key: Key) -> str:
        """Where the value at `key` (or something in it) comes from: a file, a variable, a flag, or "default"."""
        return find_origin(self.origins, key)


def load_config(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, str | int]) -> LoadedConfig:
    """Reads `path` (None: no file), the environment and the flags (`{"--port": 8081}`; see env.FLAGS).

    Raises ConfigError.
    """
    try:
        return _load(path, environ, flags)
    except ConfigError as error:
        raise ConfigError(escape(str(error))) from None


def _load(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, str | int]) -> LoadedConfig:
    layers = Layers()
    if path is not None:
        layers.add_file(path)
    layers.add_settings(settings_from_env(environ))
    layers.add_settings(read_setting(flag, FLAGS[flag], str(value)) for flag, value in flags.items())
    if environ.get(MODEL_PATH):
        layers.set_model_path(environ[MODEL_PATH])
    layers.check_required()
    config = msgspec.convert(layers.values, Config)
    for fault in checks.faults(config):
        raise ConfigError(_render(fault, path, layers.origins))
    warnings = (*warnings_of(environ), *_passphrase_warnings(config, environ), *checks.warnings(config))
    return LoadedConfig(config, path, MappingProxyType(layers.origins), warnings)


def check_servable(loaded: LoadedConfig) -> None:
    """Refuses to serve without any authentication, unless that is configured and only for this machine.

    Raises ConfigError.
    """
    for fault in checks.serving_faults(loaded.config):
        raise ConfigError(escape(_render(fault, loaded.path, loaded.origins)))


def located(loaded: LoadedConfig, error: ConfigError) -> ConfigError:
    """Returns an error found after loading, with the origin of the key that its message begins with. Where that key
    is of one of a list, `models[].path`, no matter which, it has an origin if all of them have the same."""
    origins: dict[str, list[str]] = {}
    for key, origin in loaded.origins.items():
        for length in range(1, len(key) + 1):
            origins.setdefault(format_key(key[:length]), [origin])
            of_any = tuple(ANY_INDEX if isinstance(part, int) else part for part in key[:length])
            if of_any != key[:length]:
                origins.setdefault(format_key(of_any), []).append(origin)
    found = set(origins.get(str(error).partition(": ")[0], ()))
    return ConfigError(f"{found.pop()}: {error}") if len(found) == 1 else error


def _passphrase_warnings(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    has_secrets = config.policy.store is not None or config.logging.audit_log is not None
    if policy_passphrase(environ) is not None and not has_secrets:
        yield f"{PASSPHRASE_VARIABLE}: is set, but policy.store is not: there is nothing to encrypt"


def _render(fault: checks.Fault, path: Path | None, origins: Mapping[Key, str]) -> str:
    """Names the first of the fault's keys that any source set, else the file that lacks it."""
    key = next((key for key in fault.keys if find_origin(origins, key) != DEFAULT_ORIGIN), fault.keys[0])
    origin = find_origin(origins, key)
    if origin == DEFAULT_ORIGIN:
        origin = str(path or "configuration")
    return f"{origin}: {format_key(key)}: {fault.message}"
