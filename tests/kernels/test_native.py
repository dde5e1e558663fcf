"""The native kernels: right on every case, built once, and out of the way where they cannot be built."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inferflux.kernels import native
from inferflux.kernels.backends import KV_OPS, find_backend
from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import MIXED, Paging
from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.check import check_op
from inferflux.kernels.native import build, loading, low_rank, panels, self_test
from inferflux.kernels.native.loading import Library
from inferflux.kernels.quantized_weight import Scheme, quantize
from tests.support.paged import PAGE_TOKENS, step_metadata

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
OPENMP = build.openmp_library()
CHECKS = [
    (op, dtype, quantized_kv)
    for op in ("attention", "norm", "add_norm", "rope", "activation")
    for dtype in native.DTYPES
    for quantized_kv in (False, True)
    if op in KV_OPS or not quantized_kv
]


@pytest.fixture(scope="module")
def built(true_library: Path) -> None:
    assert true_library.exists()
    assert loading.library().reason is None


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("op", "dtype", "quantized_kv"), CHECKS, ids=lambda value: str(value).removeprefix("torch."))
def test_agrees_with_the_reference(op: str, dtype: torch.dtype, quantized_kv: bool) -> None:
    backend = find_backend("native")
    assert backend.refusal(op, CPU, dtype, quantized_kv=quantized_kv) is None
    results = list(check_op(backend.find(op), op, dtype, CPU, quantized_kv=quantized_kv))
    assert results
    assert [result for result in results if not result.ok] == []


@pytest.mark.usefixtures("built")
def test_extreme_gates_are_torchs() -> None:
    """The exponential must neither overflow nor lose small numbers; a NaN must show."""
    values = [
        -1e4,
        -100.0,
        -88.0,
        -87.0,
        -20.0,
        -1e-4,
        0.0,
        1e-4,
        0.1,
        0.2,
        20.0,
        88.0,
        1e4,
        float("nan"),
        float("inf"),
    ]
    gate = torch.tensor([values])
    both = torch.cat((gate, torch.ones_like(gate)), dim=1)
    for kind, curve in (
        ("silu", torch.nn.functional.silu),
        ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ):
        ours = find_backend("native").find("activation")(both, kind)
        torch.testing.assert_close(ours, curve(gate), rtol=1e-5, atol=1e-30, equal_nan=True)


def _paged(num_tokens: int, num_queries: int) -> None:
    metadata = step_metadata([(0, num_tokens)], torch.tensor([[0]], dtype=torch.int32))
    query, pages = torch.ones(num_queries, 2, 16), torch.ones(1, 2, PAGE_TOKENS, 1, 16)
    find_backend("native").find("attention")(query, pages, metadata, scale=1.0, window=None, soft_cap=None)


def _rotated(num_tokens: int, num_slots: int, num_heads: int) -> None:
    qkv, pages = torch.ones(num_tokens, 4, 16), torch.ones(1, 2, PAGE_TOKENS, 1, 16)
    find_backend("native").find("rope")(qkv, None, None, pages, torch.arange(num_slots), num_heads=num_heads)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("compute", "problem"),
    [
        (lambda: _paged(5, 2), "tokens of the queries: 2, not 5"),
        (lambda: _rotated(5, 2, 2), r"tokens and key heads of qkv: \(5, 1\), not \(2, 1\)"),
        (lambda: _rotated(2, 2, 0), r"tokens and key heads of qkv: \(2, 2\), not \(2, 1\)"),
        (
            lambda: find_backend("native").find("add_norm")(torch.ones(5, 8), torch.ones(2, 8), torch.ones(8), 1e-5),
            "shape of what is added",
        ),
        (
            lambda: panels.multiply(panels.arrange_floats(torch.ones(8, 64)), torch.ones(1, 4), None),
            "columns of x: 4, not 64",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_an_error_and_no_damage(compute: Callable[[], object], problem: str) -> None:
    """As where a stranger's norm returns too few rows: the library would write past what there is."""
    with pytest.raises(ValueError, match=problem):
        compute()


# What attention makes for so many threads, 30 MB with AVX2 and more with AVX-512, is the first for which there is no
# memory: there are 16 left.
OUT_OF_MEMORY = """
import resource, torch
from inferflux.kernels.backends import find_backend
from tests.support.paged import PAGE_TOKENS, step_metadata

metadata = step_metadata([(0, 2), (0, 2)], torch.tensor([[0], [1]], dtype=torch.int32))
query, pages = torch.ones(4, 1, 256), torch.ones(2, 2, PAGE_TOKENS, 1, 256)
attention = find_backend("native").find("attention")

def attend(): attention(query, pages, metadata, scale=1.0, window=None, soft_cap=None)

attend()
torch.set_num_threads(256)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**24, mapped + 2**24))
try:
    attend()
except MemoryError as error:
    print(error)
"""


@pytest.mark.usefixtures("built")
def test_running_out_of_memory_fails_the_step_and_not_the_process() -> None:
    """An exception inside a thread of OpenMP's could only end it."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert (ended.returncode, ended.stdout) == (0, "no scratch memory for a CPU kernel\n"), ended.stderr


def test_other_devices_and_types_are_refused() -> None:
    assert native.supports("norm", torch.device("cuda"), torch.float32) == "for CPUs only"
    assert native.supports("norm", CPU, torch.float16) == "not written for float16"


def test_without_a_compiler_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert "no C++ compiler" in str(build.build(tmp_path / "native.so", "libgomp.so"))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_compiler_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "compiler", lambda: "false")
    assert str(build.build(tmp_path / "native.so", "libgomp.so")).startswith("false failed")
    assert [path.name for path in tmp_path.iterdir()] == [build.LOCK]


def test_only_one_process_builds_and_one_that_was_killed_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: "false")
    (tmp_path / f"{build.WORK}left-behind").mkdir()
    with (tmp_path / build.LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert build.build(tmp_path / "native.so", "libgomp.so") == "another process is building it"
    assert str(build.build(tmp_path / "native.so", "libgomp.so")).startswith("false failed")
    assert [path.name for path in tmp_path.iterdir()] == [build.LOCK]


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_a_rows_product_has_the_same_bits_beside_any_number_of_rows(dtype: torch.dtype, scheme: Scheme | None) -> None:
    """A bias that takes all digits away but the last shows where tiles of some rows round once and others twice."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((999, 512), (1, 512)))
    arranged = panels.arrange_floats(weight.to(dtype)) if scheme is None else panels.arrange(quantize(weight, scheme))
    x = x.to(dtype)
    bias = -panels.multiply(arranged, x, None)[0]
    alone = panels.multiply(arranged, x, bias)
    for num_rows in (2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 300):
        together = panels.multiply(arranged, x.expand(num_rows, -1), bias)
        assert torch.equal(together, alone.expand(num_rows, -1)), num_rows


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("quantized_as", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_a_rows_attention_has_the_same_bits_beside_any_others(
    dtype: torch.dtype, quantized_as: torch.dtype | None
) -> None:
    """And none of it is torch's, whose bits depend on them: pages of 8 bits were once left to it."""
    paging, draw = Paging(MIXED), Draw(dtype, CPU, torch.Generator().manual_seed(0))
    metadata, pages = paging.metadata(draw), paging.pool(draw, 3, 64, quantized_as)
    paging.fill(pages, metadata, draw)
    query, attention = draw.normal(paging.num_tokens, 9, 64), find_backend("native").find("attention")

    def attend(first: int, last: int) -> torch.Tensor:
        start, stop = (int(metadata.query_starts[row]) for row in (first, last))
        rows = step_metadata(list(MIXED[first:last]), metadata.page_table[first:last])
        result: torch.Tensor = attention(query[start:stop], pages, rows, scale=0.2, window=None, soft_cap=None)
        return result

    together = attend(0, len(MIXED))
    alone = torch.cat([attend(row, row + 1) for row in range(len(MIXED))])
    assert torch.equal(together, alone)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_low_ranks_are_added_to_the_rows_of_their_adapters(dtype: torch.dtype) -> None:
    assert self_test.adds_low_ranks(dtype)


@pytest.mark.usefixtures("built")
def test_what_low_ranks_add_to_a_row_is_the_same_beside_any_others() -> None:
    generator = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(shape, generator=generator) for shape in ((40, 96), (16, 96), (200, 16)))
    ranks, numbers = low_rank.arrange({2: (down, up)}), torch.full((40,), 2, dtype=torch.int32)
    together, alone = torch.zeros(40, 200), torch.zeros(40, 200)
    low_rank.add(ranks, together, x, numbers)
    for row in range(40):
        low_rank.add(ranks, alone[row : row + 1], x[row : row + 1], numbers[:1])
    assert torch.equal(together, alone)
    low_rank.add(ranks, alone, x, numbers * 0)
    assert torch.equal(together, alone), "rows of no adapter"
    with pytest.raises(ValueError, match="columns of x: 95, not 96"):
        low_rank.add(ranks, alone, x[:, :95], numbers)


@pytest.mark.skipif(OPENMP is None, reason="torch without GNU OpenMP")
@pytest.mark.parametrize("imports", ["import sentencepiece, torch", "import torch, sentencepiece"])
def test_another_openmp_that_a_wheel_brings_along_is_not_mistaken_for_torchs(imports: str) -> None:
    # Threads of a second one would wait for work on the cores that torch's compute on.
    ask = "from inferflux.kernels.native.build import openmp_library; print(openmp_library())"
    found = subprocess.run([sys.executable, "-c", f"{imports}; {ask}"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == OPENMP


@pytest.mark.skipif(OPENMP is None, reason="torch without GNU OpenMP")
def test_a_start_does_not_wait_for_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Path] = []
    monkeypatch.setattr(loading, "library_path", lambda _: tmp_path / "native.so")
    monkeypatch.setattr(loading, "compiler", lambda: "c++")
    monkeypatch.setattr(loading, "start_build", started.append)
    first: Library = loading.library.__wrapped__()
    assert first.reason == "not built yet: it is being built for the next start"
    assert started == [tmp_path]
