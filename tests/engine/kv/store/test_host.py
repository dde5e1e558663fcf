"""The host pool is as large as was asked for where it is pinned, too, which torch does in powers of two."""

from typing import Any

import pytest
import torch

from inferflux.engine.kv.store import host
from inferflux.engine.kv.store.host import allocate_host_pool
from inferflux.errors import ConfigError

GPU = torch.device("cuda")


class Pinning:
    """Plays torch's pinned memory, of which there are num_bytes. pinned: bytes taken so far."""

    def __init__(self, num_bytes: int) -> None:
        self.pinned = 0
        self._num_bytes = num_bytes

    def empty(self, shape: tuple[int, int], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        self.pinned += 1 << (shape[0] * shape[1] - 1).bit_length()
        if self.pinned > self._num_bytes:
            raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")
        return torch.zeros(shape, dtype=dtype)


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> Any:
    played = Pinning(600_000)
    monkeypatch.setattr(host, "PIECE_BYTES", 2**14)
    monkeypatch.setattr(torch, "empty", played.empty)
    return played


def test_a_pinned_pool_takes_hardly_more_than_its_rows(pinning: Pinning) -> None:
    num_pages, page_bytes = 700, 768
    pool = allocate_host_pool(num_pages, page_bytes, GPU, 600_000)
    # In one piece it would take 1048576.
    assert num_pages * page_bytes <= pinning.pinned <= num_pages * page_bytes * 1.03
    for slot in range(num_pages):
        pool[slot][:] = slot % 251
    assert [int(pool[slot].sum()) for slot in range(num_pages)] == [
        slot % 251 * page_bytes for slot in range(num_pages)
    ]


def test_a_page_larger_than_a_piece_is_one_of_its_own(pinning: Pinning) -> None:
    pool = allocate_host_pool(3, 2**15, GPU, 600_000)
    assert [pool[slot].shape for slot in range(3)] == [(2**15,)] * 3
    assert len({pool[slot].data_ptr() for slot in range(3)}) == 3


def test_what_cannot_be_pinned_is_the_users_to_lower(pinning: Pinning) -> None:
    with pytest.raises(ConfigError, match=r"cpu_pages: 1000 pages of .* cannot be pinned: CUDA error: out of memory$"):
        allocate_host_pool(1000, 768, GPU, 10**6)
