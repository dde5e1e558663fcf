"""Which environment variable and which flag sets which key.

Turns an environment into settings; decides nothing about precedence between sources (that is `load`).
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from inferflux.config.schema import ANY_INDEX, Key, element_section, env_name, fields, find, root, schema_leaves
from inferflux.config.values import InvalidValueError, check, parse
from inferflux.errors import ConfigError

MODEL_PATH: Final = "INFERFLUX_MODEL_PATH"
"""The path of the default model."""

_API_KEYS: Final = "INFERFLUX_API_KEYS"

TORCHRUN_NAMES: Final[Mapping[str, Key]] = MappingProxyType(
    {
        "RANK": ("distributed", "rank"),
        "WORLD_SIZE": ("distributed", "world_size"),
        "LOCAL_RANK": ("distributed", "local_rank"),
        "MASTER_ADDR": ("distributed", "master_addr"),
        "MASTER_PORT": ("distributed", "master_port"),
    }
)
SHORT_NAMES: Final[Mapping[str, Key]] = MappingProxyType(
    {
        "INFERFLUX_HOST": ("server", "host"),
        "INFERFLUX_PORT": ("server", "http_port"),
        "INFERFLUX_DIST_RANK": ("distributed", "rank"),
        "INFERFLUX_DIST_WORLD_SIZE": ("distributed", "world_size"),
        "INFERFLUX_DIST_BACKEND": ("distributed", "backend"),
        "INFERFLUX_POLICY_STORE": ("policy", "store"),
        "INFERFLUX_NVME_OFFLOAD_PATH": ("runtime", "nvme_offload", "path"),
        "INFERFLUX_KV_CPU_PAGES": ("runtime", "paged_kv", "cpu_pages"),
        "INFERFLUX_KV_EVICTION": ("runtime", "paged_kv", "eviction"),
        "INFERFLUX_REGISTRY_PATH": ("registry", "path"),
        "INFERFLUX_AUDIT_LOG": ("logging", "audit_log"),
        "INFERFLUX_OPA_ENDPOINT": ("guardrails", "opa_endpoint"),
        "INFERFLUX_OIDC_ISSUER": ("auth", "oidc_issuer"),
        "INFERFLUX_OIDC_AUDIENCE": ("auth", "oidc_audience"),
        "INFERFLUX_RATE_LIMIT_PER_MINUTE": ("auth", "rate_limit_per_minute"),
        _API_KEYS: ("auth", "api_keys"),
    }
)
FLAGS: Final[Mapping[str, Key]] = MappingProxyType({"--host": ("server", "host"), "--port": ("server", "http_port")})

# Other variables of ours: secrets that have no configuration key, and what scripts read.
_OTHER_NAMES: Final = frozenset(
    {
        MODEL_PATH,
        "INFERFLUX_POLICY_PASSPHRASE",
        "INFERFLUX_AUDIT_DEBUG",
        "INFERFLUX_COMMIT",
        "INFERFLUX_CONSTRAINTS",
        "INFERFLUX_DEFAULT_CONFIG",
        "INFERFLUX_STATE",
    }
)
_SERVICE_LINK: Final = re.compile(r"INFERFLUX(_[A-Z0-9_]+)?_(SERVICE_(HOST|PORT)(_.*)?|PORT_[0-9]+_(TCP|UDP)(_.*)?)")


class Setting(NamedTuple):
    """One value from one source. `origin` is the variable's or the flag's name."""

    key: Key
    value: Any
    origin: str


def settings_from_env(environ: Mapping[str, str]) -> Iterator[Setting]:
    """Yields what the environment sets, weakest first: torchrun's names, short names, full names. Empty means unset.

    Raises ConfigError for a value that its key does not accept and for an unknown full name.
    """
    for names in (TORCHRUN_NAMES, SHORT_NAMES):
        for name, key in names.items():
            if environ.get(name) and not _is_service_link(name, environ[name]):
                yield read_setting(name, key, environ[name])
    for name in sorted(environ):
        if environ[name] and not _is_service_link(name, environ[name]):
            full_key = key_of_name(name)
            if full_key is not None:
                yield read_setting(name, full_key, environ[name])


def read_setting(origin: str, key: Key, text: str) -> Setting:
    """One flag's or variable's setting. Raises ConfigError."""
    kind = find(key)
    assert kind is not None
    try:
        value = _parse_api_keys(text, key) if origin == _API_KEYS else parse(kind, text, key)
    except InvalidValueError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return Setting(key, value, origin)


def key_of_name(name: str) -> Key | None:
    """Returns the key of INFERFLUX_A__B; None for a name of another form. Raises ConfigError for an unknown key."""
    if not name.startswith("INFERFLUX_"):
        return None
    words = name.removeprefix("INFERFLUX_").split("__")
    key = tuple(int(word) if re.fullmatch("[0-9]{1,4}", word) else word.lower() for word in words)
    kind = find(key)
    if name == env_name(key) and kind is not None and (len(words) > 1 or element_section(kind)):
        return key
    if len(words) > 1:
        hint = _nearest(name, _full_names(key)) or f"; known sections: {', '.join(fields(root().cls))}"
        raise ConfigError(f"{name}: unknown key{hint}")
    return None


def warnings_of(environ: Mapping[str, str]) -> list[str]:
    """Returns warnings about variables that start with INFERFLUX_ but are not known: probably typing errors."""
    known = {*SHORT_NAMES, *_OTHER_NAMES}
    candidates = [name for name in sorted(environ) if name.startswith("INFERFLUX_") and name not in known]
    return [
        f"{name}: unknown variable, ignored{_nearest(name, known)}"
        for name in candidates
        if not _is_service_link(name, environ[name]) and key_of_name(name) is None
    ]


def _is_service_link(name: str, value: str) -> bool:
    """Kubernetes sets such variables (INFERFLUX_PORT=tcp://10.0.0.7:80) in pods beside a Service called inferflux."""
    is_link = name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://"))
    return is_link or _SERVICE_LINK.fullmatch(name) is not None


def _full_names(key: Key) -> list[str]:
    indices = [part for part in key if isinstance(part, int)] or [0]
    return [env_name(tuple(indices[0] if part == ANY_INDEX else part for part in leaf)) for leaf, _ in schema_leaves()]


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name.upper(), sorted(known), n=1, cutoff=0.8)
    return f'; did you mean "{close[0]}"?' if close else ""


def _parse_api_keys(text: str, key: Key) -> list[dict[str, Any]]:
    """`key:scope+scope,key2:scope`; a key without scopes gets the default ones. Never repeats a key in an error."""
    kind = find(key)
    assert kind is not None
    entries: list[dict[str, Any]] = []
    for index, word in enumerate(part.strip() for part in text.strip(", \r\n").split(",")):
        secret, colon, scopes = word.rpartition(":")
        entry: dict[str, Any] = {"key": secret, "scopes": scopes.split("+")} if colon else {"key": word}
        try:
            entries += check(kind, [entry], key)
        except InvalidValueError as error:
            accepted = "must be key:scope+scope,key2:scope with scopes of admin, generate, read"
            raise InvalidValueError((*key, index, *error.key[len(key) + 1 :]), accepted) from None
    return entries
