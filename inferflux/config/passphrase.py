"""The policy store's passphrase: from the environment only. It has no key, so no file and no listing ever shows it."""

import os
from collections.abc import Mapping
from typing import Final

PASSPHRASE_VARIABLE: Final = "INFERFLUX_POLICY_PASSPHRASE"


def policy_passphrase(environ: Mapping[str, str]) -> str | None:
    """Returns the passphrase; None when it is unset or empty."""
    return environ.get(PASSPHRASE_VARIABLE) or None


def passphrase_of_process() -> str | None:
    return policy_passphrase(os.environ)
