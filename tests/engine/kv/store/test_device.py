"""The pool's layout is what lets a page move between tiers in one copy."""

import pytest
import torch

from inferflux.engine.kv.store.device import PageShape, allocate_pool
from inferflux.errors import ModelLoadError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_contiguous_aligned_and_zero(dtype: torch.dtype):
    page = PageShape(num_layers=3, page_tokens=4, num_kv_heads=2, head_dim=8, dtype=dtype)
    pool = allocate_pool(5, page, CPU)
    assert pool.shape == (5, 3, 2, 4, 2, 8)
    assert pool.dtype == dtype
    assert pool.is_contiguous()
    assert pool[1].untyped_storage().nbytes() >= 5 * page.num_bytes
    assert pool[1].data_ptr() - pool[0].data_ptr() == page.num_bytes == 3 * 2 * 4 * 2 * 8 * dtype.itemsize
    assert pool.data_ptr() % 64 == 0
    assert not pool.any()
    pool[4, 2, 1, 3, 1, 7] = 2.0
    assert pool.sum() == 2.0


def test_too_little_memory_is_the_users_to_fix():
    page = PageShape(64, 256, 64, 256, torch.float32)
    with pytest.raises(ModelLoadError, match="device_pages"):
        allocate_pool(1 << 24, page, CPU)
