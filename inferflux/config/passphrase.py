"""The policy store's passphrase: from the environment only. It has no key, so no file and no listing ever shows it."""

import os
from collections.abc import Mapping
from typing import Final

PASSPHRASE_VARIABLE: Final = "INFERFLUX_POLICY_PASSPHRASE"


def policy_passphrase(environ: Mapping[str, str]) -> str | None:
    """Returns the passphrase; None when it is unset or empty."""
    return without_line_end(environ.get(PASSPHRASE_VARIABLE, "")) or None


def without_line_end(text: str) -> str:
    """A passphrase that comes out of a file, as Kubernetes has secrets, ends where its line does."""
    return text.removesuffix("\n").removesuffix("\r")


def passphrase_of_process() -> str | None:
    return policy_passphrase(os.environ)
