"""Ports of this machine that nobody listens on."""

import random
import socket
from typing import Final

# Linux gives ports from 32768 to connections and to whoever asks for any: one of those could be another's before the
# process that is to listen on it has started.
_FIRST, _LAST = 20_000, 32_000
_random: Final = random.SystemRandom()


def free_port() -> int:
    while True:
        port = _random.randrange(_FIRST, _LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
