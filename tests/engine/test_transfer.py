"""The device path packs many arrays into one buffer; what comes out must be what went in, aligned."""

import numpy as np
import torch

from inferflux.engine.transfer import ALIGNMENT, join, pack, split, start_to_host, to_device, unpack

ARRAYS = [
    np.arange(5, dtype=np.int64) - 2,
    np.arange(3, dtype=np.int32),
    np.empty(0, np.int64),
    np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    np.array([2**62], np.int64),
]


def test_pack_and_unpack_round_trip_on_aligned_offsets():
    buffer = torch.zeros(256, dtype=torch.uint8)
    pack(ARRAYS, buffer.numpy())
    tensors = unpack(buffer, ARRAYS)
    for array, tensor in zip(ARRAYS, tensors, strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
        assert (tensor.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0 or not array.size


def test_join_and_split_round_trip_exactly():
    tensors = [torch.tensor([2**52 + 1, -3]), torch.rand(2, 3), torch.empty(2, 0), torch.tensor([float("nan")])]
    for tensor, array in zip(tensors, split(join(tensors).numpy(), tensors), strict=True):
        assert torch.equal(tensor.nan_to_num(), torch.from_numpy(array).nan_to_num())
        assert tensor.dtype == torch.from_numpy(array).dtype


def test_the_cpu_shares_memory():
    array = np.zeros(3, np.int64)
    (tensor,) = to_device([array], torch.device("cpu"))
    array[1] = 7
    assert tensor.tolist() == [0, 7, 0]
    assert start_to_host([tensor])()[0][1] == 7
