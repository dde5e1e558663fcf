"""Frames: what goes in comes out, however the stream is cut; what is too large or broken is refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.interface import Output, Submit
from inferflux.engine.service.mailbox import merge
from inferflux.engine.service.protocol import (
    MAX_FRAME_BYTES,
    Abort,
    FrameReader,
    Outputs,
    Ping,
    Share,
    Start,
    ToEngine,
    Unshare,
    encode,
)
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import TokenLogprobs
from inferflux.sampling_params import Grammar, SamplingParams

FRAMES: list[ToEngine] = [
    Start(ModelConfig(id="a", path="/x"), RuntimeConfig()),
    Submit(1, [1, 2, 3], SamplingParams(stop=("a", "b"), logit_bias={5: 1.5}, seed=-(2**63)), priority=-2, salt=b"\0x"),
    Share(3, Grammar("regex", "a+"), {5: 1.5}),
    Submit(2, [1], SamplingParams(), share_id=3),
    Unshare(3),
    Abort([1, 2**40]),
    Ping(),
]


@given(st.lists(st.integers(1, 60), min_size=1))
def test_frames_survive_any_cut(cuts: list[int]) -> None:
    data = b"".join(encode(frame) for frame in FRAMES)
    reader: FrameReader[ToEngine] = FrameReader(ToEngine)
    received: list[ToEngine] = []
    for cut in cuts:
        received += reader.feed(data[:cut])
        data = data[cut:]
    received += reader.feed(data)
    assert received == FRAMES


def test_outputs_keep_every_field() -> None:
    logprobs = [TokenLogprobs(5, -0.5, 1, [(5, -0.5), (6, -1.5)])]
    frame = Outputs([Output(3, [5], logprobs, logprobs, "stop", 5, None, None, None, 2, 0.25)], EngineStats(running=4))
    reader: FrameReader[Outputs] = FrameReader(Outputs)
    assert list(reader.feed(encode(frame))) == [frame]


def test_an_oversize_or_broken_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        list(FrameReader(ToEngine).feed(struct.pack("<I", MAX_FRAME_BYTES + 1)))
    with pytest.raises(ValueError, match=r"."):
        list(FrameReader(ToEngine).feed(struct.pack("<I", 3) + b"\xc1\xc1\xc1"))


def test_merging_outputs_loses_nothing() -> None:
    first = Output(1, [1, 2], num_cached_tokens=16, queue_s=0.5)
    second = Output(1, [3], finish_reason="length")
    assert merge(first, second) == Output(1, [1, 2, 3], finish_reason="length", num_cached_tokens=16, queue_s=0.5)
