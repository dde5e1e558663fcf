"""Every op of every backend under pytest-benchmark, at toy size: `python -m pytest benchmarks`.

The figures mean nothing at this size; that each op still runs as the bench calls it does. Figures worth having come
from `inferflux kernels bench`.
"""

from typing import Any

import pytest
import torch

from inferflux.kernels.backends import BUILT_IN, OPS, find_backend
from inferflux.kernels.bench.measure import make_contender
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workloads import workloads_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", BUILT_IN)
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: Any, op: str, backend: str) -> None:
    found = find_backend(backend)
    reason = found.refusal(op, CPU, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    workload = workloads_of(op, SHAPES["toy"])[0]
    contender = make_contender(backend, found.find(op), workload, torch.float32, CPU)
    benchmark.pedantic(contender.call, setup=contender.restore, rounds=5, iterations=1)
