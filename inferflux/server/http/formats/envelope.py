"""What surrounds the choices of an answer: id, time, model, usage; whole or chunk by chunk.

A stream's chunks differ in their choice only, so the rest is encoded once.
"""

import hashlib
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from inferflux import __version__
from inferflux.engine.text import TextDelta
from inferflux.server.backends import Backend
from inferflux.server.generation import Choice
from inferflux.server.http.schemas.generate import PromptTokensDetails, Usage
from inferflux.server.http.sse import DONE, event

_encode = msgspec.json.Encoder().encode


class Format(Protocol):
    """One request's way of saying what its choices led to."""

    def answer(self, choices: Sequence[Choice]) -> bytes:
        """Returns the whole answer's JSON."""
        ...

    def events(self, choice: Choice, delta: TextDelta) -> bytes:
        """Returns the events that say what `delta` adds; nothing when there is nothing to say yet."""
        ...

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """Returns the events that follow the last choice's end."""
        ...

    def blocks(self, choice: Choice) -> bool:
        """Tells whether what was last said of the choice must not be: then that has not been said."""
        ...


class Envelope:
    """model: the id of the backend or of one of its adapters. n: choices per prompt. include_usage: a stream says null
    in each chunk and the figures in a last one."""

    def __init__(
        self, kind: str, chunk_object: str, backend: Backend, model: str, *, n: int, include_usage: bool
    ) -> None:
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.system_fingerprint = fingerprint(backend, model)
        self._n = n
        self._include_usage = include_usage
        head = {
            "id": self.id,
            "object": chunk_object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def chunk(self, choice: msgspec.Struct) -> bytes:
        """Returns the event that carries one choice's delta."""
        return b"".join((self._head, _encode(choice), self._tail))

    def ending(self, choices: Sequence[Choice]) -> bytes:
        """Returns the usage figures, if they were asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        data = self._head.removeprefix(b"data: ") + b'],"usage":' + _encode(self.usage(choices)) + b"}"
        return event(data) + DONE

    def fields(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Returns the whole answer's fields but the choices."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "usage": self.usage(choices),
        }

    def usage(self, choices: Sequence[Choice]) -> Usage:
        """Returns the figures; `choices` holds the `n` choices of one prompt next to each other."""
        firsts = choices[:: self._n]
        num_prompt = sum(len(choice.job.prompt_token_ids) for choice in firsts)
        num_output = sum(len(choice.stream.token_ids) for choice in choices)
        cached = sum(choice.num_cached_tokens for choice in firsts)
        return Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(cached))


def fingerprint(backend: Backend, model: str) -> str:
    """Returns a word that changes when what computes the answers does: version, model, its sizes and type."""
    parts = (__version__, model, backend.source.model.path, backend.info)
    return "fp_" + hashlib.sha256(_encode(parts)).hexdigest()[:10]
