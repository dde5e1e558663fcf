"""The frames between the server's process and the engine's.

Each frame is a 4-byte little-endian length, then one msgpack-encoded tagged struct. Both sides bound the length.
Knows no socket, no torch and no HTTP.
"""

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar, cast

import msgspec

from inferflux.config import FairnessConfig, ModelConfig, RuntimeConfig
from inferflux.config.tree import AdapterConfig, DistributedConfig
from inferflux.engine.interface import ModelInfo, Output, Submit
from inferflux.engine.stats import EngineStats
from inferflux.sampling_params import Grammar

MAX_FRAME_BYTES = 64 * 1024 * 1024
_HEADER = struct.Struct("<I")


class Start(msgspec.Struct, tag="start", frozen=True):
    """The first frame: load this model and its adapters. Answered by Ready or Failed."""

    model: ModelConfig
    runtime: RuntimeConfig
    distributed: DistributedConfig = DistributedConfig()
    adapters: tuple[AdapterConfig, ...] = ()


class Share(msgspec.Struct, tag="share", frozen=True):
    """Parts of `sampling` that later Submits leave out and refer to by `share_id`."""

    share_id: int
    grammar: Grammar | None = None
    logit_bias: dict[int, float] | None = None


class Unshare(msgspec.Struct, tag="unshare", frozen=True):
    """No later Submit refers to it."""

    share_id: int


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Stop these requests and give their pages back; ids that are not running are ignored. No output follows."""

    request_ids: list[int]


class SetFairness(msgspec.Struct, tag="set_fairness", frozen=True):
    """Schedule by this policy from now on: `runtime.scheduler.policy` and `runtime.fairness`."""

    policy: str
    fairness: FairnessConfig


class DropCache(msgspec.Struct, tag="drop_cache", frozen=True):
    """Forget every cached page in every tier. Answered by CacheDropped."""


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Answered by Pong between two steps: a late answer means a stuck engine."""


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Exit at once; running requests are dropped."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded. `phases` are the start's steps with their seconds."""

    info: ModelInfo
    phases: list[tuple[str, float]]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine cannot start, or stops; `message` is fit for a user. No frame follows."""

    kind: str
    message: str


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """One step's outputs."""

    outputs: list[Output]
    stats: EngineStats


class CacheDropped(msgspec.Struct, tag="cache_dropped", frozen=True):
    """stats: with nothing cached any more."""

    stats: EngineStats


class Pong(msgspec.Struct, tag="pong", frozen=True):
    stats: EngineStats


ToEngine = Start | Share | Unshare | Submit | Abort | SetFairness | DropCache | Ping | Shutdown
FromEngine = Ready | Failed | Outputs | CacheDropped | Pong

_encoder = msgspec.msgpack.Encoder()
Frame = TypeVar("Frame")


def encode(frame: ToEngine | FromEngine) -> bytes:
    """Returns the frame with its length header. Raises ValueError when it exceeds MAX_FRAME_BYTES."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


class FrameReader(Generic[Frame]):
    """Cuts a byte stream into frames of one union type. Raises ValueError on an oversize or undecodable frame."""

    def __init__(self, frame_type: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(cast(type[Frame], frame_type))
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            frame = self._decoder.decode(bytes(memoryview(self._buffer)[_HEADER.size : end]))
            del self._buffer[:end]
            yield frame
