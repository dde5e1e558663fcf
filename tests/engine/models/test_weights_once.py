"""A loaded model holds each weight once, its output matrix too where that is the embeddings."""

from collections.abc import Callable

import pytest
import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine import large_pages
from inferflux.engine.models.load import load_model
from inferflux.kernels.kernel_set import select
from inferflux.kernels.quantized_weight import Scheme
from tests.support.models import TinyModel

CPU = torch.device("cpu")


def num_bytes(part: object) -> int:
    return sum(last - first for first, last in {large_pages._span(one) for one in large_pages._tensors(part, set())})


@pytest.mark.parametrize(("dtype", "scheme"), [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8")])
def test_tied_embeddings_are_in_memory_once(
    tiny_model: Callable[[str], TinyModel], dtype: torch.dtype, scheme: Scheme | None
) -> None:
    model = load_model(
        tiny_model("qwen2").folder,
        kernels=select(CPU, dtype), device=CPU, dtype=dtype, context=ParallelContext(0, 1, CPU), quantization=scheme,
    )  # fmt: skip
    spec = model.spec
    assert spec.tied_embeddings
    itemsize = dtype.itemsize if scheme is None else 1
    embedding, held = spec.vocab_size * spec.hidden_size * itemsize, num_bytes(model) - num_bytes(model._ropes)
    # With 8 bits there are scales, and norms and biases are floats.
    floats = 0 if scheme is None else 0.1 * spec.num_parameters
    assert spec.num_parameters * itemsize <= held < spec.num_parameters * itemsize + floats + 0.3 * embedding
