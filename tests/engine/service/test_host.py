"""The engine's own loop, at the edges of its stream."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.service import host
from inferflux.engine.service.host import serve
from inferflux.engine.service.protocol import (
    MAX_FRAME_BYTES,
    FrameReader,
    FromEngine,
    Outputs,
    Ready,
    Start,
    Submit,
    encode,
)
from inferflux.sampling_params import SamplingParams
from tests.support.encoders import SIZES, write_encoder
from tests.support.waiting import PATIENCE_S


@pytest.mark.parametrize(
    "words",
    [b"", b"\x01\x00\x00\x00\xc1", (MAX_FRAME_BYTES + 1).to_bytes(4, "little")],
    ids=["an end", "no frame", "too large a frame"],
)
def test_a_stream_that_ends_or_makes_no_sense_is_left(words: bytes) -> None:
    """An engine that goes on without hearing anything would have to be killed."""
    ours, theirs = socket.socketpair()
    with ours:
        loop = threading.Thread(target=serve, args=(theirs,), kwargs={"exit_when_orphaned": False}, daemon=True)
        loop.start()
        ours.sendall(words)
        if not words:
            ours.shutdown(socket.SHUT_WR)
        loop.join(PATIENCE_S)
        assert not loop.is_alive()


def test_a_text_that_takes_long_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder computes a text as a whole: one of thousands of tokens takes minutes on few cores, and an engine that
    says nothing for one is killed."""
    monkeypatch.setattr(host, "PROGRESS_INTERVAL_S", 0.0)
    write_encoder(tmp_path)
    ours, theirs = socket.socketpair()
    with ours:
        loop = threading.Thread(target=serve, args=(theirs,), kwargs={"exit_when_orphaned": False}, daemon=True)
        loop.start()
        ours.settimeout(PATIENCE_S)
        frames = _frames(ours)
        ours.sendall(encode(Start(ModelConfig(id="encoder", path=str(tmp_path)), RuntimeConfig())))
        assert isinstance(next(frames), Ready)
        ours.sendall(encode(Submit(7, [5, 6, 7], SamplingParams(pooling="mean"))))
        told = []
        while not told or not told[-1].outputs:
            frame = next(frames)
            assert isinstance(frame, Outputs)
            told.append(frame)
        assert len(told) == 1 + SIZES["num_hidden_layers"]
        assert [frame.stats.running for frame in told] == [1] * SIZES["num_hidden_layers"] + [0]


def _frames(sock: socket.socket) -> Iterator[FromEngine]:
    reader: FrameReader[FromEngine] = FrameReader(FromEngine)
    while data := sock.recv(1 << 16):
        yield from reader.feed(data)
