"""The header of a safetensors file is hostile until proven sound: every damage is a ModelLoadError, none a crash."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferflux.engine.weights.safetensors_file import SafetensorsFile
from inferflux.errors import ModelLoadError
from tests.support.checkpoints import entry, file_bytes

SOUND = {"a": entry(), "b": entry("BF16", (3, 2), 8, 20)}
SOUND_BYTES = file_bytes(SOUND, bytes(range(20)))


def open_bytes(path: Path, content: bytes) -> SafetensorsFile:
    file = path / "model.safetensors"
    file.write_bytes(content)
    return SafetensorsFile(file)


def test_reads_what_the_library_writes(tmp_path):
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.arange(3, dtype=np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert {name: (e.dtype, e.shape) for name, e in file.entries.items()} == {"x": ("F32", (2, 3)), "y": ("F16", (3,))}
    data = bytearray(24)
    file.read_into(memoryview(data), file.entries["x"].start)
    assert bytes(data) == arrays["x"].tobytes()
    file.close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        SOUND_BYTES[:30],
        SOUND_BYTES[:-1],
        SOUND_BYTES + b"\x00",
        file_bytes(SOUND, bytes(20), length=2**63),
        file_bytes(SOUND, bytes(20), length=2**64 - 1),
        file_bytes(b"\xff\xfe", b""),
        file_bytes(b"[" * 200_000),
        file_bytes([]),
        file_bytes({"a": 3}),
        file_bytes({"a": entry("F8_NOPE")}, bytes(8)),
        file_bytes({"a": entry(["F32"])}, bytes(8)),
        file_bytes({"a": entry(shape=[-2])}, bytes(8)),
        file_bytes({"a": entry(shape=[2.0])}, bytes(8)),
        file_bytes({"a": entry(shape=[True, 2])}, bytes(8)),
        file_bytes({"a": entry(shape="ab")}, bytes(8)),
        file_bytes({"a": entry(shape=[2**62, 2**62])}, bytes(8)),
        file_bytes({"a": entry(shape=[1] * 9)}, bytes(8)),
        file_bytes({"a": entry(start=8, stop=0)}, bytes(8)),
        file_bytes({"a": entry(start=-8, stop=0)}, bytes(8)),
        file_bytes({"a": entry(start=0, stop=2**70)}, bytes(8)),
        file_bytes({"a": entry(start=0, stop=4)}, bytes(8)),
        file_bytes({"a": entry(), "b": entry()}, bytes(8)),
        file_bytes({"a": entry(), "b": entry(start=4, stop=12)}, bytes(12)),
        file_bytes({"a": entry(start=4, stop=12)}, bytes(12)),
        file_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        file_bytes(b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {}}', bytes(8)),
        file_bytes({"\ud800": 3}),
    ],
)
def test_damage_is_a_clear_error(tmp_path, content):
    with pytest.raises(ModelLoadError) as caught:
        open_bytes(tmp_path, content)
    str(caught.value).encode()  # can be logged and sent, whatever the names in the file


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(SOUND_BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_read_or_refused_but_never_crash(tmp_path, flips):
    content = bytearray(SOUND_BYTES)
    for position, value in flips:
        content[position] = value
    try:
        file = open_bytes(tmp_path, bytes(content))
    except ModelLoadError:
        return
    for tensor in file.entries.values():
        file.read_into(memoryview(bytearray(tensor.stop - tensor.start)), tensor.start)
    file.close()


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path):
    file = open_bytes(tmp_path, SOUND_BYTES)
    (tmp_path / "model.safetensors").write_bytes(SOUND_BYTES[:-4])
    with pytest.raises(ModelLoadError, match="before its data does"):
        file.read_into(memoryview(bytearray(12)), file.entries["b"].start)
    file.close()


def test_not_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelLoadError, match="is not a file"):
            SafetensorsFile(path)
