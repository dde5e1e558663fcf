"""What an engine's memory grows by while it serves: less than what the prefix cache would like to keep."""

from collections.abc import Callable

import psutil
import pytest

from inferflux.engine.runner import memory
from inferflux.sampling_params import SamplingParams
from tests.support.engines import run_requests, start_engine
from tests.support.models import TinyModel

MIB = 2**20
NUM_TOKENS = 480


def test_prompts_that_nobody_repeats_do_not_fill_the_pool(
    tiny_model: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LEAST_CACHE_BYTES", 8 * MIB)
    engine = start_engine(tiny_model("llama").folder, scheduler={"max_batch_size": 256}, paged_kv={"page_tokens": 16})
    info = engine.info
    page_bytes, pages_each = info.page_bytes, -(-NUM_TOKENS // info.page_tokens)
    before = psutil.Process().memory_info().rss
    num_prompts = 80 * MIB // (page_bytes * pages_each)
    assert info.device_pages > num_prompts * pages_each, "the pool would hold them all"
    for number in range(num_prompts):
        prompt = [3 + (number + index * index) % 300 for index in range(NUM_TOKENS)]
        prompt[:3] = (number // 300, number % 300, 5)
        (result,) = run_requests(engine, [prompt], SamplingParams(max_tokens=1, temperature=0), first_id=number)
        assert result.num_cached_tokens == 0
    assert psutil.Process().memory_info().rss - before < 40 * MIB
    assert engine.stats().device_pages_cached * page_bytes <= 8 * MIB
