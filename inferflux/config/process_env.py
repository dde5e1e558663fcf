"""Environment variables that have no configuration key: secrets, the client's variables, and those of other programs.

`env` has the variables that set keys. Reads this process's environment; decides nothing else.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

PASSPHRASE_VARIABLE: Final = "INFERFLUX_POLICY_PASSPHRASE"
AUDIT_DEBUG_VARIABLE: Final = "INFERFLUX_AUDIT_DEBUG"
URL: Final = "INFERCTL_URL"
API_KEY: Final = "INFERCTL_API_KEY"
DEFAULT_URL: Final = "http://127.0.0.1:8080"
# So often OpenMP's threads look for something to compute before they sleep. By default they do so for some 20 ms, hence
# for ever between an engine's steps, and keep other programs, and in turn the engine, from the cores. S, two cores of a
# Zen 5 EPYC, in turns, medians of 5; with the default and with this, tokens/s of one request and of 32: in bfloat16 267
# and 272, 1448 and 1443; in int4 688 and 675, 1493 and 1494; without tapes 122 and 120, 948 and 921. With one more
# program that computes: in bfloat16 113 and 156, 572 and 787; in int4 264 and 456, 525 and 815 (402 and 734 with 6000);
# without tapes 35 and 38, 299 and 379.
_SPIN_COUNT: Final = "2000"
_SECRETS: Final = ("INFERFLUX_API_KEYS", "INFERFLUX_AUTH__API_KEYS", PASSPHRASE_VARIABLE, API_KEY)


def policy_passphrase(environ: Mapping[str, str]) -> str | None:
    """Returns the policy store's passphrase, which has no key, so that no file or listing shows it; None if unset."""
    return without_line_end(environ.get(PASSPHRASE_VARIABLE, "")) or None


def without_line_end(text: str) -> str:
    """A passphrase from a file, such as a Kubernetes secret, may end with a line break that is not part of it."""
    return text.removesuffix("\n").removesuffix("\r")


def passphrase_of_process() -> str | None:
    return policy_passphrase(os.environ)


def audit_debug_of_process() -> bool:
    """Whether the audit log records texts; not a key, so that no configuration file turns this on for good."""
    return os.environ.get(AUDIT_DEBUG_VARIABLE, "").lower() in ("1", "true", "yes", "on")


class ClientEnvironment(NamedTuple):
    """Which server `inferctl` talks to, and with which key."""

    url: str
    api_key: str | None


def read_client_environment() -> ClientEnvironment:
    """Returns the variables of `inferctl`; an empty one counts as unset."""
    return ClientEnvironment(os.environ.get(URL) or DEFAULT_URL, os.environ.get(API_KEY) or None)


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that hold no secret; `INFERFLUX_AUTH__API_KEYS__0__KEY` and the like are left out too."""
    return {name: value for name, value in environ.items() if not name.startswith(_SECRETS)}


def child_environment() -> dict[str, str]:
    """Returns this process's environment without its secrets, for child processes: they have no use for these."""
    return without_secrets(os.environ)


def engine_environment() -> dict[str, str]:
    """Returns the same for an engine's process: its OpenMP threads do not spin for long, unless the user says how they
    are to wait."""
    environment = child_environment()
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    return environment


def has_chosen_threads() -> bool:
    """Whether the number of PyTorch's threads is set, by a variable that PyTorch reads itself."""
    return "OMP_NUM_THREADS" in os.environ


def asks_for_triton_interpreter() -> bool:
    """Whether the variable is set by which Triton interprets its kernels on a CPU, told without importing Triton."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


def cache_dir() -> Path:
    """Returns the user's cache folder, which may not exist and can be deleted at any time: `$XDG_CACHE_HOME/inferflux`,
    else `~/.cache/inferflux`.

    A user without a home folder has no cache: the path is one that cannot be created.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if root:
        return Path(root) / "inferflux"
    try:
        return Path.home() / ".cache" / "inferflux"
    except RuntimeError:
        return Path(os.devnull) / "inferflux"
