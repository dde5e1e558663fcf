"""The environment for the engine's process: this process's without its secrets.

The engine computes; it has no use for keys and passphrases, and must not be a place where they can be found.
"""

import os
from collections.abc import Mapping
from typing import Final

from inferflux.config.client_env import API_KEY
from inferflux.config.passphrase import PASSPHRASE_VARIABLE

_SECRETS: Final = ("INFERFLUX_API_KEYS", "INFERFLUX_AUTH__API_KEYS", PASSPHRASE_VARIABLE, API_KEY)


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that hold no secret; `INFERFLUX_AUTH__API_KEYS__0__KEY` and the like go too."""
    return {name: value for name, value in environ.items() if not name.startswith(_SECRETS)}


def child_environment() -> dict[str, str]:
    return without_secrets(os.environ)


def has_chosen_threads() -> bool:
    """Whether somebody has said how many threads PyTorch takes, which reads that by itself."""
    return "OMP_NUM_THREADS" in os.environ
