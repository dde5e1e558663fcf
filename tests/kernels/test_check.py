"""The check catches kernels that are wrong in the ways kernels go wrong. Each is the reference with one mistake."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inferflux.kernels import reference
from inferflux.kernels.backends import Backend
from inferflux.kernels.cases import cases_of
from inferflux.kernels.check import Result, check_case, check_op

Tensor = torch.Tensor


def true_op(op: str) -> Any:
    return Backend("reference", reference).find(op)


def failures(implementation: Any, op: str, dtype: torch.dtype = torch.float32) -> list[Result]:
    return [result for result in check_op(implementation, op, dtype, torch.device("cpu")) if not result.ok]


def attention_that(change: Callable[[dict[str, Any]], None]) -> Callable[..., Tensor]:
    def attention(*tensors: Any, **settings: Any) -> Tensor:
        change(settings)
        result: Tensor = true_op("attention")(*tensors, **settings)
        return result

    return attention


def attention_multiplying_by_zero(query: Tensor, kv_pages: Tensor, metadata: Any, **settings: Any) -> Tensor:
    """What a masked value times a weight of zero does to the result when the value is NaN."""
    poison = kv_pages[metadata.page_table[0, -1].long()].mean() * 0
    result: Tensor = true_op("attention")(query, kv_pages, metadata, **settings) + poison
    return result


def rope_that_swaps_keys_and_values(*tensors: Any, num_heads: int) -> Tensor:
    query: Tensor = true_op("rope")(*tensors, num_heads=num_heads)
    tensors[3].copy_(tensors[3].flip(1))
    return query


def rope_that_writes_a_spare_page(*tensors: Any, num_heads: int) -> Tensor:
    query: Tensor = true_op("rope")(*tensors, num_heads=num_heads)
    spare = tensors[3][:, 0, 0, 0, 0].isnan().nonzero()[0]
    tensors[3][spare] = 0
    return query


def norm_without_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    result: Tensor = true_op("norm")(x, weight, 0.0)
    return result


def norm_squaring_in_half(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def norm_in_place(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.copy_(true_op("norm")(x, weight, eps))


def norm_in_wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return true_op("norm")(x.double(), weight.double(), eps).to(torch.float64)


def norm_transposed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    result: Tensor = true_op("norm")(x, weight, eps)
    return result.transpose(0, -1).contiguous().transpose(0, -1)


def norm_that_forgets_the_last_column(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    output = torch.empty(x.shape, dtype=x.dtype)
    output[..., :-1] = true_op("norm")(x, weight, eps)[..., :-1]
    return output


def norm_that_fails(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    raise RuntimeError("out of registers")


WRONG = [
    ("attention", attention_that(lambda settings: settings.update(window=None)), "window"),
    ("attention", attention_that(lambda settings: settings.update(soft_cap=None)), "soft cap"),
    ("attention", attention_multiplying_by_zero, "decode, window"),
    ("rope", rope_that_swaps_keys_and_values, "decode"),
    ("rope", rope_that_writes_a_spare_page, "no rotation"),
    ("norm", norm_without_eps, "tiny values"),
    ("norm", norm_in_place, "7x5"),
    ("norm", norm_in_wide, "7x5"),
    ("norm", norm_transposed, "7x5"),
    ("norm", norm_that_fails, "7x5"),
    ("norm", norm_that_forgets_the_last_column, "33x64"),
    ("add_norm", lambda x, residual, weight, eps: (true_op("norm")(residual, weight, eps), residual + x), "33x64"),
    ("activation", lambda gate_up, kind: true_op("activation")(gate_up, "gelu"), "gelu_tanh 33x7"),
    (
        "linear",
        SimpleNamespace(pack=lambda weight, bias: weight, run=lambda weight, x: x @ weight.T),
        "64x48, 17 rows",
    ),
    ("sampling", lambda logits, *settings: logits.argmax(dim=1), "every rule, 1000"),
]


@pytest.mark.parametrize(("op", "implementation", "case"), WRONG, ids=[f"{op}-{case}" for op, _, case in WRONG])
def test_a_wrong_kernel_fails(op: str, implementation: Any, case: str) -> None:
    """`case` is part of the name of the cases that show it."""
    telling = [each for each in cases_of(op) if case in each.name]
    assert telling
    assert all(not check_case(implementation, each, torch.float32, torch.device("cpu")).ok for each in telling)


def test_squares_that_overflow_half_precision_fail_there() -> None:
    assert failures(norm_squaring_in_half, "norm", torch.float32) == []
    assert any("overflow" in result.case for result in failures(norm_squaring_in_half, "norm", torch.float16))


def test_the_message_says_what_is_wrong() -> None:
    problems = {result.problem for result in failures(norm_that_fails, "norm")}
    assert problems == {"RuntimeError: out of registers"}
    assert "changed its argument 1" in {result.problem for result in failures(norm_in_place, "norm")}


def test_the_reference_passes_its_own_check() -> None:
    assert failures(true_op("norm"), "norm", torch.bfloat16) == []
    assert failures(true_op("sampling"), "sampling") == []
