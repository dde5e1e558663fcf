"""Sizes of the Triton kernels: what a table measured here changes, and that no file can do more than that.

No kernel runs: launches are caught, as a GPU of some name would get them.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workloads import workloads_of
from inferflux.kernels.triton import size_table
from inferflux.kernels.triton.size_table import SizeTable
from inferflux.kernels.triton.sizes import (
    AttentionTile,
    Block,
    Decode,
    ProductTile,
    ProductTiles,
    RowBlock,
    Sizes,
    Split,
)

pytest.importorskip("triton")

CPU = torch.device("cpu")
GPU_NAME = "Some GPU (80 GB)"
MEASURED = Sizes(
    prefill={64: AttentionTile(64, 32, 8, 2)},
    decode={64: Decode(AttentionTile(16, 128, 8, 3, pages_ahead=1), Split(256, 16, 32))},
    linear={"one tall": RowBlock(1, 4, 128, 2, 1), "few wide": RowBlock(8, 16, 64, 2, 3)},
    blocks={"activation": Block(256, 2), "sampling": Block(512, 8)},
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a table is looked for, on a machine that seems to have a GPU."""
    from triton import __version__

    from inferflux.kernels.triton import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "gpu_of", lambda device: tuning.H100._replace(name=GPU_NAME))
    forgets: list[Callable[[], None]] = [tuning.measured_on.cache_clear, tuning.sizes_on.cache_clear]
    for forget in forgets:
        forget()
    yield size_table.path_of(GPU_NAME, __version__)
    for forget in forgets:
        forget()


def table(**changes: Any) -> SizeTable:
    from triton import __version__

    facts = {"version": size_table.VERSION, "gpu": GPU_NAME, "triton": __version__, "date": "2026-11-26"}
    return SizeTable(**facts | {"model_size": "small", "sizes": MEASURED} | changes)


def launch(op: str, place: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments of the first kernel that the op launches on its workload of that place."""
    from tests.support.triton_compile import launches_of

    inputs = workloads_of(op, SHAPES["toy"])[place].build(dtype, CPU)
    return launches_of(op, [inputs])[0].arguments


def test_kernels_take_the_sizes_that_were_measured_here(place: Path) -> None:
    usual = launch("attention", 1, torch.bfloat16)
    size_table.write(table(), place)
    from inferflux.kernels.triton import tuning

    tuning.measured_on.cache_clear()
    tuning.sizes_on.cache_clear()
    tuned = launch("attention", 1, torch.bfloat16)
    assert (usual["BLOCK_M"], usual["BLOCK_N"], usual["num_warps"]) == (128, 128, 4)
    assert (tuned["BLOCK_M"], tuned["BLOCK_N"], tuned["num_warps"], tuned["num_stages"]) == (64, 32, 8, 2)
    decode = launch("attention", 0, torch.bfloat16)
    assert (decode["BLOCK_N"], decode["PAGES_AHEAD"], tuned["PAGES_AHEAD"]) == (128, 1, 0)
    assert (decode["SPLIT_TOKENS"], decode["MOST_SPLITS"]) == (256, 16)
    assert launch("activation", 0, torch.bfloat16)["BLOCK"] == 256
    assert launch("sampling", 0, torch.float32)["BLOCK"] == 512
    # What the table does not have is as shipped; so is all of float32, in which nothing was measured.
    assert launch("rope", 0, torch.bfloat16)["BLOCK_HEADS"] == tuning.SHIPPED.blocks["rope"].size
    assert launch("activation", 0, torch.float32)["BLOCK"] == tuning.SHIPPED.blocks["activation"].size


def test_the_plain_product_is_ours_where_it_was_measured_to_be_faster(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inferflux.kernels import triton
    from inferflux.kernels.triton import linear, supports, tuning
    from tests.support.triton_compile import catch_launches

    monkeypatch.setattr(triton, "_is_interpreted", lambda: True)  # stands for a GPU
    assert "not measured to be faster" in str(supports("linear", CPU, torch.bfloat16))
    size_table.write(table(), place)
    tuning.measured_on.cache_clear()
    tuning.sizes_on.cache_clear()
    assert supports("linear", CPU, torch.bfloat16) is None
    assert "not measured to be faster" in str(supports("linear", CPU, torch.float32))

    def launched(num_rows: int, num_outputs: int, num_inputs: int) -> list[int]:
        packed = linear.pack(torch.ones(num_outputs, num_inputs, dtype=torch.bfloat16), None)
        with catch_launches(linear) as launches:
            linear.run(packed, torch.ones(num_rows, num_inputs, dtype=torch.bfloat16))
        return [launch.arguments["BLOCK_K"] for launch in launches]

    assert launched(1, 48, 32) == [128]
    assert launched(8, 32, 32) == [64]
    # Not in the table, too many rows, none.
    assert [launched(*size) for size in ((1, 32, 32), (2, 48, 32), (9, 32, 32), (0, 48, 32))] == [[]] * 4


def without(text: str) -> bytes:
    return json.dumps(json.loads(text) | {"sizes": None}).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda text: text[: len(text) // 2].encode(), "truncated"),
        (lambda text: b"", "truncated"),
        (lambda text: b"\x00\xff" * 50, "malformed"),
        (lambda text: b'{"sizes":' * 20000, "object"),
        (lambda text: b"[]", "Expected `object`"),
        (without, "Expected `object`"),
        (lambda text: text.replace('"block_m": 64', '"block_m": 48').encode(), "block_m must be a power of two"),
        (lambda text: text.replace('"block_m": 64', '"block_m": 65536').encode(), "from 16 to 256 (got 65536)"),
        (lambda text: text.replace('"block_m": 64', '"block_m": "64"').encode(), "Expected `int`"),
        (lambda text: text.replace('"num_stages": 2', '"num_stages": 0').encode(), "num_stages must be a number"),
        (lambda text: text.replace('"pages_ahead": 1', '"pages_ahead": 2').encode(), "pages_ahead must be"),
        (lambda text: text.replace('"most": 16', '"most": 0').encode(), "most must be"),
        (lambda text: text.replace('"tokens": 256', '"tokens": -256').encode(), "tokens must be"),
        (lambda text: text.replace('"size": 512', '"size": 2').encode(), "sampling's size must be"),
        (lambda text: text.replace('"64"', '"80"').encode(), "80; accepted: 64, 128, 256"),
        (lambda text: text.replace(GPU_NAME, "Another GPU").encode(), "measured on Another GPU"),
        (lambda text: text.replace('"version": 2', '"version": 1').encode(), "of version 1, not 2"),
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_and_told_of_once(
    content: Callable[[str], bytes], reason: str, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from inferflux.kernels.triton import tuning

    size_table.write(table(), place)
    place.write_bytes(content(place.read_text()))
    with caplog.at_level(logging.WARNING):
        assert tuning.sizes_on(CPU) == tuning.SHIPPED
        assert tuning.sizes_on(CPU) == tuning.SHIPPED
    (record,) = caplog.records
    assert str(place) in record.getMessage()
    assert reason in record.getMessage()


def test_a_folder_in_its_place_is_ignored_and_a_missing_file_is_no_news(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert size_table.read(GPU_NAME, "0.0") is None
    assert not caplog.records
    place.mkdir(parents=True)
    from inferflux.kernels.triton import tuning

    assert tuning.sizes_on(CPU) == tuning.SHIPPED
    assert "Is a directory" in caplog.text


def test_what_cuts_sums_over_inputs_is_one_for_all_rows() -> None:
    tile = ProductTile(16, 32, 128, 4, 4)
    with pytest.raises(ValueError, match="block_k must be the same"):
        ProductTiles(tile, tile, ProductTile(128, 128, 64, 8, 2))


def test_a_table_says_what_it_has() -> None:
    assert list(table().entries()) == [
        "prefill 64",
        "decode 64",
        "linear one tall",
        "linear few wide",
        "blocks activation",
        "blocks sampling",
    ]
