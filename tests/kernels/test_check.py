"""The check catches kernels that are wrong in the ways kernels go wrong. Each is the reference with one mistake."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inferflux.kernels import reference
from inferflux.kernels import torch as torch_backend
from inferflux.kernels.backends import Backend
from inferflux.kernels.cases import cases_of
from inferflux.kernels.check import Result, check_case, check_op, dtypes_of
from inferflux.kernels.quantized_kv import SCALE_BYTES, as_bytes, quantize

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


def rope_that_writes_another_layers_page(*tensors: Any, num_heads: int) -> Tensor:
    query: Tensor = true_op("rope")(*tensors, num_heads=num_heads)
    tensors[3]._base[:, 0] = 0
    return query


def rope_that_returns_heads_apart(*tensors: Any, num_heads: int) -> Tensor:
    query: Tensor = true_op("rope")(*tensors, num_heads=num_heads)
    return query.transpose(0, 1).contiguous().transpose(0, 1)


def without(name: str, replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference's attention with another function in the place of torch's of that name."""

    def attention(*tensors: Any, **settings: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, name, replacement)
            result: Tensor = true_op("attention")(*tensors, **settings)
        return result

    return attention


def softmax_from(least: float | None) -> Callable[..., Tensor]:
    """A softmax whose peak is at least so much; None: without one."""

    def softmax(scores: Tensor, dim: int) -> Tensor:
        peak = 0.0 if least is None else scores.amax(dim, keepdim=True).clamp(min=least)
        weights = (scores - peak).exp()
        return weights / weights.sum(dim, keepdim=True)

    return softmax


def tanh_that_overflows(x: Tensor) -> Tensor:
    return ((2 * x).exp() - 1) / ((2 * x).exp() + 1)


def silu_that_overflows(gate_up: Tensor, kind: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * gate.exp() / (1 + gate.exp()) * up


def attention_that_changes_the_metadata(query: Tensor, kv_pages: Tensor, metadata: Any, **settings: Any) -> Tensor:
    result: Tensor = true_op("attention")(query, kv_pages, metadata, **settings)
    metadata.kv_lengths.sub_(1)
    return result


def attention_that_keeps_the_first_layers_window(
    query: Tensor, kv_pages: Tensor, metadata: Any, **settings: Any
) -> Tensor:
    window = metadata.derived.setdefault("window", settings["window"])
    result: Tensor = true_op("attention")(query, kv_pages, metadata, **{**settings, "window": window})
    return result


def attention_that_keeps(key_of: Callable[[Any], Any], kept: Callable[[Any], dict[Any, Any]]) -> Callable[..., Tensor]:
    """kept: where the page table of the first call with the same key is found again, of the metadata."""

    def attention(query: Tensor, kv_pages: Tensor, metadata: Any, **settings: Any) -> Tensor:
        table = kept(metadata).setdefault(key_of(metadata), metadata.page_table.clone())
        result: Tensor = true_op("attention")(
            query, kv_pages, dataclasses.replace(metadata, page_table=table), **settings
        )
        return result

    return attention


def in_a_dict() -> Callable[[Any], dict[Any, Any]]:
    kept: dict[Any, Any] = {}
    return lambda _step: kept


def attention_that_keeps_the_first_layers_keys(query: Tensor, kv_pages: Tensor, metadata: Any, **settings: Any) -> Any:
    kept = metadata.derived.setdefault(settings["window"], kv_pages.clone())
    return true_op("attention")(query, kept, metadata, **settings)


def attention_whose_pages_have_one_owner(query: Tensor, kv_pages: Tensor, metadata: Any, **settings: Any) -> Any:
    """What a list of pages, each with its row, makes of a prefix that two rows have in common."""
    seen = torch.isin(metadata.page_table[1:], metadata.page_table[:1])
    table = torch.cat((metadata.page_table[:1], metadata.page_table[1:].masked_fill(seen, 0)))
    return true_op("attention")(query, kv_pages, dataclasses.replace(metadata, page_table=table), **settings)


def attention_into_a_buffer_of_its_own() -> Callable[..., Tensor]:
    buffers: dict[torch.Size, Tensor] = {}

    def attention(query: Tensor, *others: Any, **settings: Any) -> Tensor:
        return buffers.setdefault(query.shape, torch.empty(query.shape)).copy_(
            true_op("attention")(query, *others, **settings)
        )

    return attention


def attention_wrong_where(condition: Callable[[Tensor, Tensor, Any, dict[str, Any]], bool]) -> Callable[..., Tensor]:
    """As a kernel is that has a way of its own for some shapes."""

    def attention(query: Tensor, kv_pages: Tensor, metadata: Any, **settings: Any) -> Tensor:
        result: Tensor = true_op("attention")(query, kv_pages, metadata, **settings)
        return result * 1.05 if condition(query, kv_pages, metadata, settings) else result

    return attention


def wrong_where(op: str, condition: Callable[..., bool]) -> Any:
    """condition: of the arguments, or of those of `run`."""

    def call(function: Any, *arguments: Any, **settings: Any) -> Any:
        results = function(*arguments, **settings)
        if not condition(*arguments):
            return results
        return tuple(each * 1.05 for each in results) if isinstance(results, tuple) else results * 1.05

    true = true_op(op)
    if hasattr(true, "pack"):
        return SimpleNamespace(pack=true.pack, run=partial(call, true.run))
    return partial(call, true)


def packed_in_one_place(op: str) -> Any:
    """All layers' weights, that is: the last one's."""
    place: list[Any] = []

    def pack(*weights: Any) -> None:
        place[:] = [true_op(op).pack(*weights)]

    return SimpleNamespace(pack=pack, run=lambda _packed, *arguments: true_op(op).run(*place, *arguments))


def rope_with_the_first_angles() -> Callable[..., Tensor]:
    tables: dict[Any, Any] = {}

    def rope(qkv: Tensor, cos: Any, sin: Any, kv_pages: Tensor, slots: Tensor, *, num_heads: int) -> Any:
        if cos is not None:
            cos, sin = tables.setdefault(cos.data_ptr(), (cos.clone(), sin.clone()))
        return true_op("rope")(qkv, cos, sin, kv_pages, slots, num_heads=num_heads)

    return rope


def norm_of_other_bits_each_time(x: Tensor, weight: Tensor, eps: float) -> Any:
    return true_op("norm")(x, weight, eps) * (1 + 1e-6 * torch.rand(()))


def ignoring_strides(values: Tensor) -> Tensor:
    """What a kernel reads that takes rows for neighbours."""
    return torch.as_strided(values, values.shape, torch.empty(values.shape).stride(), values.storage_offset())


def quantized_attention_that(change: Callable[[Tensor], object]) -> Callable[..., Tensor]:
    """change: of the pages' bytes, [P, 2, N, K, D + 4]."""

    def attention(query: Tensor, kv_pages: Tensor, metadata: Any, **settings: Any) -> Tensor:
        rows = as_bytes(kv_pages).clone()
        change(rows)
        result: Tensor = true_op("attention")(query, rows.view(kv_pages.dtype), metadata, **settings)
        return result

    return attention


def coarse_scales(rows: Tensor) -> None:
    scales = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    rows[..., -SCALE_BYTES:] = scales.bfloat16().float().view(torch.int8)


def quantized_rope_that(rounds: Callable[[Tensor, torch.dtype], Tensor]) -> Callable[..., Tensor]:
    """rounds: keys and values, in place of `quantize`."""

    def rope(qkv: Tensor, cos: Any, sin: Any, kv_pages: Tensor, slots: Tensor, *, num_heads: int) -> Tensor:
        wide = torch.full((*kv_pages.shape[:-1], qkv.shape[-1]), torch.nan)
        query: Tensor = true_op("rope")(qkv, cos, sin, wide, slots, num_heads=num_heads)
        place = slots // kv_pages.shape[2], slice(None), slots % kv_pages.shape[2]
        as_bytes(kv_pages)[place] = rounds(wide[place], kv_pages.dtype)
        return query

    return rope


def rounded_towards_zero(values: Tensor, kind: torch.dtype) -> Tensor:
    rows = quantize(values, kind)
    codes, scales = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    too_large = codes.view(kind).float().abs() * scales > values.abs()
    # The code before, of float8 too: its bits are in the order of its size.
    codes -= too_large * (codes.sign() if kind == torch.int8 else 1)
    return rows


def with_half_the_codes(values: Tensor, kind: torch.dtype) -> Tensor:
    """A scale twice as large as need be, as of another head that has a number twice as large."""
    rows = quantize(torch.cat((values, 2 * values.abs().amax(-1, keepdim=True)), dim=-1), kind)
    return torch.cat((rows[..., : values.shape[-1]], rows[..., -SCALE_BYTES:]), dim=-1)


def with_one_scale_for_all_heads(values: Tensor, kind: torch.dtype) -> Tensor:
    rows = quantize(values.flatten(2), kind)
    codes = rows[..., :-SCALE_BYTES].view(values.shape)
    return torch.cat((codes, rows[..., None, -SCALE_BYTES:].expand(*values.shape[:-1], -1)), dim=-1)


def norm_into_a_buffer_of_its_own() -> Callable[..., Tensor]:
    buffers: dict[torch.Size, Tensor] = {}

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return buffers.setdefault(x.shape, torch.empty(x.shape)).copy_(true_op("norm")(x, weight, eps))

    return norm


def pack_that_loses_the_weights(weight: Any, bias: Tensor | None) -> Any:
    packed = true_op("quantized_linear").pack(dataclasses.replace(weight, scales=weight.scales.clone()), bias)
    weight.scales.zero_()
    return packed


def moe_of(kind_of: Callable[[str], str]) -> Any:
    def run(packed: Any, x: Tensor, ids: Tensor, weights: Tensor, kind: str) -> Any:
        return true_op("moe").run(packed, x, ids, weights, kind_of(kind))

    return SimpleNamespace(pack=true_op("moe").pack, run=run)


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


def add_norm_of_some_rows(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    assert len(x), "a grid of no programs"
    return true_op("add_norm")(x, residual, weight, eps)


def norm_that_fails(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    raise RuntimeError("out of registers")


def many(limit: int) -> Callable[..., bool]:
    """Whether the first argument has so many rows."""
    return lambda x, *_others: len(x) >= limit


def long(limit: int) -> Callable[..., bool]:
    return lambda x, *_others: x.shape[-1] >= limit


WRONG = [
    ("attention", attention_that_keeps(lambda step: step.page_table.data_ptr(), in_a_dict()), "decode, soft cap"),
    ("attention", attention_that_keeps(lambda step: step.kv_lengths_host, in_a_dict()), "decode, soft cap"),
    ("attention", attention_that_keeps_the_first_layers_keys, "prefill after a cached prefix"),
    ("attention", attention_whose_pages_have_one_owner, "a prefix in common"),
    ("attention", attention_into_a_buffer_of_its_own(), "decode, equal lengths"),
    ("attention", attention_wrong_where(lambda q, kv, step, _: step.num_rows >= 32), "many rows"),
    ("attention", attention_wrong_where(lambda q, kv, step, _: step.max_query_length > 512), "prefill, many queries"),
    ("attention", attention_wrong_where(lambda q, kv, _, __: q.shape[1] == kv.shape[3]), "4 queries to 4 keys of 80"),
    ("attention", attention_wrong_where(lambda q, kv, _, __: kv.shape[3] >= 8), "32 queries to 8 keys of 64"),
    ("norm", wrong_where("norm", many(256)), "300x20"),
    ("norm", wrong_where("norm", long(8192)), "2x9001"),
    ("add_norm", wrong_where("add_norm", many(256)), "300x1"),
    ("add_norm", wrong_where("add_norm", long(8192)), "2x9001"),
    ("activation", wrong_where("activation", many(256)), "many rows"),
    ("activation", wrong_where("activation", long(2 * 8192)), "long rows"),
    ("rope", wrong_where("rope", many(256)), "many tokens"),
    ("rope", rope_with_the_first_angles(), "mixed"),
    ("linear", wrong_where("linear", lambda packed, x: x.shape[1] >= 4096), "40x4100"),
    ("linear", wrong_where("linear", lambda packed, x: len(x) > 512), "64x48, 600 rows"),
    ("quantized_linear", wrong_where("quantized_linear", lambda packed, x: x.shape[1] >= 4096), "40x4100"),
    ("moe", wrong_where("moe", lambda packed, x, ids, *_: x.shape[1] > 128), "wide"),
    ("moe", wrong_where("moe", lambda packed, x, ids, *_: ids.shape[1] >= 8), "8 of 66"),
    ("quantized_moe", wrong_where("quantized_moe", lambda packed, x, *_: len(x) > 256), "many tokens"),
    ("linear", packed_in_one_place("linear"), "64x48, 17 rows"),
    ("quantized_linear", packed_in_one_place("quantized_linear"), "an outlier"),
    ("moe", packed_in_one_place("moe"), "wide"),
    ("norm", norm_of_other_bits_each_time, "7x5"),
    ("sampling", wrong_where("sampling", many(32)), "many rows"),
    ("sampling", lambda x, t, k, *rest: true_op("sampling")(x, t, k.clamp(max=1024), *rest), "a large top_k"),
    ("attention", attention_that(lambda settings: settings.update(window=None)), "window"),
    ("attention", attention_that(lambda settings: settings.update(soft_cap=None)), "soft cap"),
    ("attention", attention_multiplying_by_zero, "decode, window"),
    ("attention", without("softmax", softmax_from(None)), "decode, large scores"),
    ("attention", without("softmax", softmax_from(0.0)), "prefill, large scores"),
    ("attention", without("tanh", tanh_that_overflows), "soft cap of large scores"),
    ("activation", silu_that_overflows, "silu 3x40 of 60"),
    ("rope", rope_that_swaps_keys_and_values, "decode"),
    ("rope", rope_that_writes_a_spare_page, "no rotation"),
    ("rope", rope_that_writes_another_layers_page, "one token"),
    ("rope", rope_that_returns_heads_apart, "mixed"),
    ("attention", attention_that_changes_the_metadata, "decode one row"),
    ("attention", attention_that_keeps_the_first_layers_window, "decode, window"),
    ("norm", lambda x, weight, eps: true_op("norm")(ignoring_strides(x), weight, eps), "rows apart"),
    ("add_norm", lambda x, r, weight, eps: true_op("add_norm")(ignoring_strides(x), r, weight, eps), "rows apart"),
    ("activation", lambda x, kind: true_op("activation")(ignoring_strides(x), kind), "rows apart"),
    ("sampling", lambda x, *settings: true_op("sampling")(ignoring_strides(x), *settings), "rows apart"),
    ("norm", norm_into_a_buffer_of_its_own(), "33x64"),
    ("norm", lambda x, weight, eps: torch.empty(x.shape, dtype=x.dtype, device="meta"), "33x64"),
    (
        "quantized_linear",
        SimpleNamespace(pack=pack_that_loses_the_weights, run=true_op("quantized_linear").run),
        "int8",
    ),
    ("moe", moe_of(lambda kind: "silu"), "gelu"),
    (
        "moe",
        SimpleNamespace(pack=lambda gate_up, down: [(gate_up[0], down[0])], run=true_op("moe").run),
        "one expert for all",
    ),
    ("norm", norm_without_eps, "tiny values"),
    ("norm", norm_in_place, "7x5"),
    ("norm", norm_in_wide, "7x5"),
    ("norm", norm_transposed, "7x5"),
    ("norm", norm_that_fails, "7x5"),
    ("norm", norm_that_forgets_the_last_column, "33x64"),
    ("add_norm", lambda x, residual, weight, eps: (true_op("norm")(residual, weight, eps), residual + x), "33x64"),
    ("add_norm", add_norm_of_some_rows, "no rows"),
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


BOTH_KINDS = ("int8", "float8_e4m3fn")
# Codes of float8 that are not all used lose nothing.
QUANTIZED_WRONG = [
    ("attention", quantized_attention_that(coarse_scales), BOTH_KINDS),
    ("attention", quantized_attention_that(lambda rows: rows[:, 1, ..., -4:].copy_(rows[:, 0, ..., -4:])), BOTH_KINDS),
    ("attention", quantized_attention_that(lambda rows: rows[..., -4:].copy_(rows[..., -4:].roll(1, 3))), BOTH_KINDS),
    ("rope", quantized_rope_that(rounded_towards_zero), BOTH_KINDS),
    ("rope", quantized_rope_that(with_half_the_codes), ("int8",)),
    ("rope", quantized_rope_that(with_one_scale_for_all_heads), ("int8",)),
    ("rope", quantized_rope_that(lambda values, kind: quantize(values.flip(2), kind)), BOTH_KINDS),
]


@pytest.mark.parametrize(("op", "implementation", "kinds"), QUANTIZED_WRONG)
def test_a_kernel_that_is_wrong_on_pages_of_8_bits_fails(op: str, implementation: Any, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        telling = [each for each in cases_of(op, quantized_kv=True) if f"{kind} pages, mixed" in each.name]
        assert telling
        assert all(not check_case(implementation, each, torch.float32, torch.device("cpu")).ok for each in telling)


@pytest.mark.parametrize("op", ["attention", "rope"])
def test_backends_that_say_they_know_pages_of_8_bits_do(op: str) -> None:
    for backend in (Backend("reference", reference), Backend("torch", torch_backend)):
        assert backend.quantized_kv
        for dtype in dtypes_of(op):
            checked = list(check_op(backend.find(op), op, dtype, torch.device("cpu"), quantized_kv=True))
            assert checked
            assert [result for result in checked if not result.ok] == []


def test_squares_that_overflow_half_precision_fail_there() -> None:
    assert failures(norm_squaring_in_half, "norm", torch.float32) == []
    assert any("overflow" in result.case for result in failures(norm_squaring_in_half, "norm", torch.float16))


def test_the_message_says_what_is_wrong() -> None:
    problems = {result.problem for result in failures(norm_that_fails, "norm")}
    assert {str(problem).partition(", line ")[0] for problem in problems} == {
        "RuntimeError: out of registers (test_check.py"
    }
    assert "changed its argument 1" in {result.problem for result in failures(norm_in_place, "norm")}
    poisoned = {result.problem for result in failures(norm_that_forgets_the_last_column, "norm")}
    assert any(str(problem).startswith("error inf exceeds 5e-06 at [0, 63]: nan, not ") for problem in poisoned)
    assert all("what is allocated and not written" in str(problem) for problem in poisoned)
    (drawn, *_) = failures(lambda logits, *settings: logits.argmax(dim=1), "sampling")
    assert re.search(r"row \d+ \(temperature .*, top_k .*\) drew \d+, not \d+$", str(drawn.problem))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("decodes", [True, False], ids=["decode", "prefill"])
def test_a_size_of_head_that_is_computed_wrongly_fails(head_dim: int, decodes: bool) -> None:
    """With several key heads, and neither window nor soft cap, which take other ways through a kernel."""

    def is_wrong(query: Tensor, kv_pages: Tensor, step: Any, settings: dict[str, Any]) -> bool:
        plain = settings["window"] is None and settings["soft_cap"] is None
        return plain and query.shape[2] == head_dim and decodes == (step.max_query_length == 1)

    assert failures(attention_wrong_where(is_wrong), "attention")


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("decodes", [True, False], ids=["decode", "prefill"])
def test_a_number_of_queries_to_a_key_that_is_computed_wrongly_fails(group: int, decodes: bool) -> None:
    """With more than one key head: with one, any mapping of heads is right."""

    def is_wrong(query: Tensor, kv_pages: Tensor, step: Any, _settings: dict[str, Any]) -> bool:
        grouped = kv_pages.shape[3] > 1 and query.shape[1] == group * kv_pages.shape[3]
        return grouped and decodes == (step.max_query_length == 1)

    assert failures(attention_wrong_where(is_wrong), "attention")


def test_the_reference_passes_its_own_check() -> None:
    assert failures(true_op("norm"), "norm", torch.bfloat16) == []
    assert failures(true_op("sampling"), "sampling") == []
