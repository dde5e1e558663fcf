"""The two environment variables of the client, `inferctl`: which server to talk to, and with which key."""

import os
from typing import Final, NamedTuple

URL: Final = "INFERCTL_URL"
API_KEY: Final = "INFERCTL_API_KEY"
DEFAULT_URL: Final = "http://127.0.0.1:8080"


class ClientEnvironment(NamedTuple):
    url: str
    api_key: str | None


def read_client_environment() -> ClientEnvironment:
    """Returns what this process's environment says; an empty variable counts as unset."""
    return ClientEnvironment(os.environ.get(URL) or DEFAULT_URL, os.environ.get(API_KEY) or None)
