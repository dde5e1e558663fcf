"""The Triton kernels agree with the reference on every case, run by Triton's interpreter; and compile for an H100.

The interpreter takes the place of the compiler for a whole process, so what it runs runs in a process of its own; in
one of two, since each imports torch and Triton for seconds. It cannot multiply matrices in bfloat16: ops that do are
interpreted in the other types.
"""

import dataclasses
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from inferflux.kernels.backends import PACKED_OPS, Backend, find_backend
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.bench.workloads import workloads_of
from inferflux.kernels.cases import cases_of
from inferflux.kernels.cases.case import Inputs
from inferflux.kernels.narrow_kv import SCALE_BYTES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")

# What fits into an H100's or H200's multiprocessor.
MAX_SHARED_BYTES = 227 * 1024

# A row of 700 cached tokens (two splits) alone and beside one of 1200 (three): the same bits.
ALONE_AND_BESIDE = """
import torch
from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import Paging
from inferflux.kernels.triton.attention import attention

draw = Draw(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
paging = Paging(((699, 700), (1199, 1200)))
metadata = paging.metadata(draw)
pages = paging.pool(draw, 2, 64)
paging.fill(pages, metadata, draw)
query = draw.normal(2, 4, 64)
both = attention(query, pages, metadata, scale=0.125, window=None, soft_cap=None)
alone = Paging(((699, 700),)).metadata(draw)
alone.page_table.copy_(metadata.page_table[:1, : alone.page_table.shape[1]])
one = attention(query[:1], pages, alone, scale=0.125, window=None, soft_cap=None)
assert torch.equal(one[0], both[0])
"""


# The interpreter loses the carry where rounding to float8 reaches the exponent: what it writes there is not looked at.
NARROW_PAGES = """
import torch
from benchmarks.gpu.narrow import EDGES, compare

for name, figures in compare(torch.device("cpu")):
    assert figures["error"] < 1e-4, (name, figures)
    assert figures["other_codes"] <= (0.05 if "float8" in name else EDGES), (name, figures)
"""


# Of float16 values of about a thousandth, whose scales have few bits left in 16.
SMALL_NARROW_VALUES = """
import torch
from inferflux.kernels.backends import find_backend
from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import Paging
from inferflux.kernels.narrow_kv import LARGEST_CODE, as_bytes, narrow

settings = {"scale": 0.125, "window": None, "soft_cap": None}
for kind in LARGEST_CODE:
    for span in ((39, 40), (30, 40)):
        draw = Draw(torch.float16, torch.device("cpu"), torch.Generator().manual_seed(0))
        paging = Paging((span,))
        metadata = paging.metadata(draw)
        pages = torch.zeros(paging.num_pages, 2, 16, 2, 68, dtype=torch.int8).view(kind)
        for which, scale in enumerate((1.0, 1e-3)):
            as_bytes(pages)[:, which] = narrow(draw.normal(paging.num_pages, 16, 2, 64, scale=scale), kind)
        query = draw.normal(paging.num_tokens, 4, 64)
        true = find_backend("reference").find("attention")(query.double(), pages, metadata, **settings)
        ours = find_backend("triton").find("attention")(query, pages, metadata, **settings).double()
        error = ((ours - true).abs().amax(-1) / true.abs().amax(-1)).max()
        assert error < 3e-3, (kind, span, error)
"""


CHECK = """
from inferflux.cli import main

assert main(["kernels", "check", "--backend", "triton", "--dtype", "{dtype}", {ops}]) == 0
"""


def check(dtype: str, *ops: str) -> str:
    """Returns a program that checks these ops in one type."""
    return CHECK.format(dtype=dtype, ops=", ".join(f'"--op", "{op}"' for op in ops))


def interpret(*programs: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(programs)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_that_multiply_matrices_pass_their_checks() -> None:
    products = ("quantized_linear", "moe")
    interpret(check("float32", "attention", "quantized_moe", *products), check("float16", *products), ALONE_AND_BESIDE)


def test_the_other_kernels_pass_their_checks_and_so_do_pages_of_8_bits() -> None:
    small = ("norm", "add_norm", "activation")
    interpret(
        check("float32", "rope", *small, "sampling"), check("bfloat16", *small), NARROW_PAGES, SMALL_NARROW_VALUES
    )


# moe uses that op between its own kernels.
ACTIVATION = "inferflux.kernels.triton.activation"
SHAPE = dataclasses.replace(
    SHAPES["large"],
    decodes=((2, 1100),),
    prefills=((0, 40),),
    batches=(1, 70),
    vocab=2000,
    hidden=512,
    intermediate=256,
)


# Which of an op's arguments is the pages.
PAGES = {"attention": 1, "rope": 3}


def launched(op: str) -> Iterator[tuple[str, Inputs]]:
    """Calls that between them launch every kernel of the op, in every variant that differs much."""
    seen = {
        "sampling": ("greedy",),
        "quantized_linear": ("int4 gate_up 1", "fp8 gate_up 70"),
        "quantized_moe": ("int8 2 of 8, 1", "int4 2 of 8, 70"),
    }
    for workload in workloads_of(op, SHAPE):
        if workload.name.startswith(seen.get(op, "")):
            yield workload.name, _inputs_of(workload)
        if op in PAGES:
            yield workload.name, _with_narrow_pages(op, _inputs_of(workload), torch.float8_e4m3fn)
    if op == "attention":
        for case in cases_of(op):
            if case.name in ("mixed, head size 256, soft cap", "decode, window"):
                for dtype in (torch.bfloat16, torch.float32):
                    yield case.name, case.inputs(dtype, torch.device("cpu"))


def _with_narrow_pages(op: str, inputs: Inputs, kind: torch.dtype) -> Inputs:
    arguments = list(inputs.positional)
    shape = arguments[PAGES[op]].shape
    arguments[PAGES[op]] = torch.zeros(*shape[:-1], shape[-1] + SCALE_BYTES, dtype=torch.int8).view(kind)
    return Inputs(tuple(arguments), inputs.keywords)


def _inputs_of(workload: Workload) -> Inputs:
    return workload.build(torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(
    "op",
    ["attention", "rope", "norm", "add_norm", "activation", "quantized_linear", "moe", "quantized_moe", "sampling"],
)
def test_kernels_compile_for_an_h100(op: str) -> None:
    from tests.support.triton_compile import catch_launches

    backend: Backend = find_backend("triton")
    found = backend.find(op)
    module = importlib.import_module(found.__name__ if op in PACKED_OPS else found.__module__)
    with catch_launches(module) as launches, catch_launches(importlib.import_module(ACTIVATION)):
        for _, (positional, keywords) in launched(op):
            if op in PACKED_OPS:
                found.run(found.pack(*positional[:2]), *positional[2:])
            else:
                found(*positional, **keywords)
    assert launches
    for launch in launches:
        assert launch.compile().metadata.shared <= MAX_SHARED_BYTES, launch.kernel.__name__


def test_no_length_specialises_a_compile() -> None:
    """What counts requests, tokens or pages, or strides over them, is one type to the compiler, whatever its value."""
    from triton.runtime.jit import JITFunction

    lengths = {"num_pairs", "num_rows", "num_splits", "window", "stride_table", "vocab_size"}
    for name in ("attention", "quantized_linear", "moe", "quantized_moe", "sampling", "norm", "rope", "activation"):
        module = importlib.import_module(f"inferflux.kernels.triton.{name}")
        for kernel in (value for value in vars(module).values() if isinstance(value, JITFunction)):
            if kernel.__name__.endswith("_kernel"):
                specialised = {each.name for each in kernel.params if not each.do_not_specialize}
                assert not specialised & lengths, kernel.__name__
