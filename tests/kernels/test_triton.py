"""The Triton kernels agree with the reference on every case, run by Triton's interpreter; and compile for an H100.

The interpreter takes the place of the compiler for a whole process, so what it runs runs in a process of its own; in
one of two, since each imports torch and Triton for seconds. It cannot multiply matrices in bfloat16: ops that do are
interpreted in the other types.
"""

import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.bench.workloads import workloads_of
from inferflux.kernels.cases import cases_of
from inferflux.kernels.cases.case import Draw, Inputs
from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.narrow_kv import SCALE_BYTES
from inferflux.kernels.quantized_weight import quantize

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

from inferflux.kernels.triton.sizes import HEAD_DIMS, AttentionTile, Decode, Sizes, Split
from inferflux.kernels.triton.tuning import SHIPPED

# Its splits are merged by the last program, the other row's by a launch.
split = Split(256, 16, 16, last_merges=4)
changed = Sizes(decode=dict.fromkeys(HEAD_DIMS, Decode(AttentionTile(16, 32, 4, 3), split))).over(SHIPPED)
ways = [(query, metadata), (query[:1], alone)]
both, one = (attention(q, pages, m, scale=0.125, window=None, soft_cap=None, sizes=changed) for q, m in ways)
assert torch.equal(one[0], both[0])
"""


# Attention with sizes that `tune` tries: page numbers read ahead, splits that double where a row has too many, rows
# that two turns of the merge or the last of their programs merge, beside each other.
OTHER_SIZES = """
import functools
import torch
from inferflux.kernels.backends import find_backend
from inferflux.kernels.cases import cases_of
from inferflux.kernels.check import check_case
from inferflux.kernels.triton.sizes import HEAD_DIMS, AttentionTile, Decode, Sizes, Split
from inferflux.kernels.triton.tuning import SHIPPED

tile = AttentionTile(16, 32, 4, 3, pages_ahead=1)
SOME = {
    Split(512, 2, 16): ("decode, long", "decode, long, window, soft cap", "decode, one key head", "decode, window"),
    Split(256, 32, 16): ("decode, long", "prefill after a long prefix", "mixed, window, soft cap"),
    Split(256, 32, 16, last_merges=8): ("decode, long", "decode, long, window, soft cap", "decode, 7 queries a key"),
    Split(512, 16, 16, last_merges=16): ("decode, long",),
}
for split, names in SOME.items():
    changed = Sizes(decode=dict.fromkeys(HEAD_DIMS, Decode(tile, split)), prefill=dict.fromkeys(HEAD_DIMS, tile))
    op = functools.partial(find_backend("triton").find("attention"), sizes=changed.over(SHIPPED))
    cases = [case for case in cases_of("attention") if case.name in names]
    assert len(cases) == len(names)
    for case in cases:
        result = check_case(op, case, torch.float32, torch.device("cpu"))
        assert result.ok, (split, result)

# Layer after layer of a step, and replay after replay of a recorded one: the counters are ready for the next.
(long,) = (case for case in cases_of("attention") if case.name == "decode, long")
inputs = long.inputs(torch.float32, torch.device("cpu"))
first = op(*inputs.positional, **inputs.keywords)
inputs.positional[2].kv_lengths[0] = 300
op(*inputs.positional, **inputs.keywords)
inputs.positional[2].kv_lengths[0] = 3000
assert torch.equal(op(*inputs.positional, **inputs.keywords), first)
(counters,) = inputs.positional[2].derived.values()
assert not counters.any()
"""


# The plain product, which serves no GPU before it was measured there: as `tune` checks it. In bfloat16 where no tensor
# core multiplies.
FEW_ROWS = """
import functools
from types import SimpleNamespace
import torch
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.check import check_case
from inferflux.kernels.triton import linear
from inferflux.kernels.triton.sizes import RowBlock
from inferflux.kernels.triton.tuning import SHIPPED
from inferflux.kernels.tune.knobs import subjects_of

blocks = {"one": (RowBlock(1, 64, 64, 4, 1), torch.bfloat16), "few": (RowBlock(8, 64, 64, 4, 4), torch.float16)}
knobs = [knob for subject in subjects_of(SHAPES["toy"]) for knob in subject.knobs if knob.table == "linear"]
assert len(knobs) == 4
for knob in knobs:
    block, dtype = blocks[knob.key.partition(" ")[0]]
    assert len(knob.cases) >= 2 and len(knob.proofs) >= 4
    for case in knob.cases + knob.proofs:
        run = functools.partial(linear.run, sizes=knob.changed(SHIPPED, block))
        result = check_case(SimpleNamespace(pack=linear.pack, run=run), case, dtype, torch.device("cpu"))
        assert result.ok, (block, result)
"""


# Bit by bit, as GPUs without instructions for it do: all codes, what lies between them, what rounds to the largest.
FLOAT8 = """
import torch
from tests.support.float8_codec import both_ways

codes = torch.arange(256).to(torch.uint8)
true = codes.view(torch.float8_e4m3fn).float()
levels = true[:127]
between = torch.cat([levels[:-1].lerp(levels[1:], share) for share in (0.0, 0.25, 0.5, 0.75)])
edges = torch.tensor([448.0, 448.0001, 460.0, 1e-9, 2.0**-10, 1.6 * 2.0**-10])
values = torch.cat((between, -between, edges, -edges, torch.zeros(4)))
wide, rounded = both_ways(codes.repeat(4), values)
known = torch.arange(256) % 128 < 127
assert torch.equal(wide[:256][known], true[known])
assert torch.equal(rounded, values.to(torch.float8_e4m3fn).view(torch.uint8))
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


# Two sizes of one op, from the checks to the choice; one of them is told to be wrong.
TRIAL = """
import contextlib, dataclasses, time
import torch
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.triton.sizes import Block
from inferflux.kernels.triton.tuning import SHIPPED
from inferflux.kernels.tune.knobs import subjects_of
from inferflux.kernels.tune.setting import Setting
from inferflux.kernels.tune.trial import try_knob

class Turns:
    shared = alone = contextlib.nullcontext

events = []
setting = Setting(torch.device("cpu"), torch.float32, Turns(), lambda event, **facts: events.append((event, facts)),
                  time.time() + 60, toy=True)
(subject,) = (each for each in subjects_of(SHAPES["toy"]) if each.name == "activation")
(whole,) = subject.knobs
knob = dataclasses.replace(
    whole, entries=(Block(128, 1), Block(256, 1)), cases=whole.cases[:1], workloads=whole.workloads[:1]
)
sizes = try_knob(knob, SHIPPED, {"size 256 w1": "it is said to be wrong"}, setting)
checked = {facts["entry"]: facts["problem"] for event, facts in events if event == "checked"}
assert checked == {"size 1024 w4": None, "size 128 w1": None, "size 256 w1": "it is said to be wrong"}, checked
timed = [facts["us"] for event, facts in events if event == "timed"]
assert timed and all(set(each) == {"size 1024 w4", "size 128 w1"} for each in timed), timed
event, chosen = events[-1]
assert event == "chosen" and chosen["present"] == "size 1024 w4", events[-1]
assert sizes == (SHIPPED if chosen["entry"] == chosen["present"] else knob.changed(SHIPPED, Block(128, 1)))
"""


CHECK = """
from inferflux.cli import main

assert main(["kernels", "check", "--backend", "triton", "--dtype", "{dtype}", {ops}]) == 0
"""


def check(dtype: str, *ops: str) -> str:
    """Returns a program that checks these ops in one type."""
    return CHECK.format(dtype=dtype, ops=", ".join(f'"--op", "{op}"' for op in ops))


# What a narrower type changes is in each kernel once, whatever the sizes around it.
CHECK_IN_FLOAT16 = """
import torch
from inferflux.kernels.backends import find_backend
from inferflux.kernels.cases import cases_of
from inferflux.kernels.check import check_case

SOME = {
    "quantized_linear": ("1000x576, 3 rows", "1000x576, 40 rows", "outlier"),
    "moe": ("5 tokens", "some experts elsewhere", "gelu_tanh"),
}
for op, names in SOME.items():
    cases = [case for case in cases_of(op) if any(name in case.name for name in names)]
    assert len(cases) >= len(names)
    for case in cases:
        result = check_case(find_backend("triton").find(op), case, torch.float16, torch.device("cpu"))
        assert result.ok, result
"""


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
    ops = ("attention", "quantized_moe", "quantized_linear", "moe")
    interpret(check("float32", *ops), CHECK_IN_FLOAT16, ALONE_AND_BESIDE, OTHER_SIZES)


def test_the_other_kernels_pass_their_checks_and_so_do_pages_of_8_bits() -> None:
    small = ("norm", "add_norm", "activation")
    programs = (FLOAT8, SMALL_NARROW_VALUES, TRIAL, FEW_ROWS)
    interpret(check("float32", "rope", *small, "sampling"), check("bfloat16", *small), *programs)


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
    from tests.support.triton_compile import launches_of

    for launch in launches_of(op, [inputs for _, inputs in launched(op)]):
        assert launch.compile().metadata.shared <= MAX_SHARED_BYTES, launch.kernel.__name__


def test_rows_are_read_sixteen_bytes_at_a_time_and_all_at_once() -> None:
    """The compiler reads two bytes at a time where it is not told that rows lie multiples of 16 apart."""
    from tests.support.triton_compile import launches_of

    x, weight = torch.ones(2, 4096, dtype=torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16)
    calls = {
        "norm": Inputs((x, weight, 1e-6)),
        "add_norm": Inputs((x, x, weight, 1e-6)),
        "activation": Inputs((torch.ones(2, 8192, dtype=torch.bfloat16), "silu")),
    }
    for op, inputs in calls.items():
        for launch in launches_of(op, [inputs]):
            code = launch.compile().asm["ptx"]
            loads = re.findall(r"ld\.global\S*", code)
            assert loads, op
            assert all(".v4." in load for load in loads), (op, loads)
            # None waits for what others of the program have read.
            assert "ld.global" not in code.partition("bar.sync")[2], op


def test_rope_writes_when_all_is_read() -> None:
    """A read behind a write, which might be of the same place, waits for all that is written: 32 times a step."""
    from tests.support.triton_compile import launches_of

    calls = [_inputs_of(workload) for workload in workloads_of("rope", SHAPE)]
    for launch in launches_of("rope", calls):
        code = launch.compile().asm["ptx"]
        assert "ld.global" in code
        assert "ld.global" not in code.partition("st.global")[2]


def test_page_numbers_read_ahead_leave_the_stages_to_keys_and_values() -> None:
    """Else one tile waits for the next one's page numbers, which is what the sizes are told to avoid."""
    from inferflux.kernels.triton.sizes import AttentionTile, Decode
    from inferflux.kernels.triton.tuning import SHIPPED
    from tests.support.triton_compile import launches_of

    (inputs,) = (_inputs_of(each) for each in workloads_of("attention", SHAPE) if each.name.startswith("decode"))
    waits = {}
    for ahead in (0, 1):
        entry = Decode(AttentionTile(16, 32, 2, 4, ahead), SHIPPED.decode[128].split)
        sizes = dataclasses.replace(SHIPPED, decode={128: entry})
        call = Inputs(inputs.positional, {**inputs.keywords, "sizes": sizes})
        code = launches_of("attention", [call])[0].compile().asm["ptx"]
        waits[ahead] = max(int(left) for left in re.findall(r"cp.async.wait_group\s+(\d+)", code))
    # Copies still under way when a tile is multiplied: of keys and of values, two tiles each.
    assert waits == {0: 0, 1: 4}


def test_the_last_program_of_a_row_counts_itself_after_all_its_threads_have_written() -> None:
    """Else another program might read what is not there yet; no interpreter shows that."""
    from inferflux.kernels.triton.tuning import SHIPPED
    from tests.support.triton_compile import launches_of

    (inputs,) = (_inputs_of(each) for each in workloads_of("attention", SHAPE) if each.name.startswith("decode"))
    shipped = SHIPPED.decode[128]
    entry = dataclasses.replace(shipped, split=dataclasses.replace(shipped.split, last_merges=16))
    call = Inputs(inputs.positional, {**inputs.keywords, "sizes": dataclasses.replace(SHIPPED, decode={128: entry})})
    code = launches_of("attention", [call])[0].compile().asm["ptx"]
    before, counted, after = code.partition("atom.global.gpu.acq_rel.add")
    assert counted
    assert "bar.sync" in before[before.rindex("st.global") :]
    assert "bar.sync" in after[: after.index("ld.global")]


@pytest.mark.parametrize("rows", [1, 8])
def test_a_few_rows_are_multiplied_with_wide_reads_under_way(rows: int) -> None:
    """One row's weights are read sixteen bytes at a time; of several a tile is copied while another is multiplied."""
    from inferflux.kernels.triton import linear
    from inferflux.kernels.triton.sizes import RowBlock, Sizes
    from tests.support.triton_compile import catch_launches

    block = RowBlock(1, 4, 1024, 4, 1) if rows == 1 else RowBlock(8, 32, 256, 4, 4)
    sizes = Sizes(linear={"one tall": block, "few tall": block})
    packed = linear.pack(torch.ones(6144, 4096, dtype=torch.bfloat16), None)
    with catch_launches(linear) as launches:
        linear.run(packed, torch.ones(rows, 4096, dtype=torch.bfloat16), sizes)
    code = launches[0].compile().asm["ptx"]
    loads = re.findall(r"ld\.global\S*", code)
    if rows == 1:
        assert loads
        assert all(".v4." in load for load in loads), loads
    else:
        assert not loads
        assert max(int(left) for left in re.findall(r"cp.async.wait_group\s+(\d+)", code)) == 4


@pytest.mark.parametrize("group", [1, 4, 7, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_attention_fits_into_every_gpus_shared_memory(group: int, dtype: torch.dtype, kilobytes: int) -> None:
    """99 KiB: GeForce RTX 30, 40 and 50, A10, L4, L40. 163: A100. 227: H100 and newer, which gets what was measured."""
    from inferflux.kernels.triton import tuning

    gpu = tuning.Gpu(kilobytes * 1024, has_float8=True)
    shipped = tuning.SHIPPED
    for table in (shipped.prefill, {size: each.tile for size, each in shipped.decode.items()}):
        for size, listed in table.items():
            tile = tuning.attention_tile(listed, size, group, dtype, gpu)
            assert tuning.attention_bytes(tile, size, dtype) <= gpu.shared_bytes
            assert tile.block_m >= max(group, tuning.SMALLEST_BLOCK)
            assert tile.block_n >= tuning.SMALLEST_BLOCK
            if kilobytes == 227 and dtype == torch.bfloat16:
                assert tile == listed


def _for_smaller_gpus() -> Iterator[tuple[str, Inputs]]:
    """What takes most shared memory, and what reads or writes float8."""
    draw = Draw(torch.bfloat16, torch.device("cpu"), torch.Generator())
    (attention,) = (case for case in cases_of("attention") if case.name == "mixed, head size 256, soft cap")
    yield "attention", attention.inputs(torch.bfloat16, draw.device)
    for op, name in (("attention", "decode, long"), ("rope", "mixed")):
        (case,) = (each for each in cases_of(op, narrow_kv=True) if each.name == f"float8_e4m3fn pages, {name}")
        yield op, case.inputs(torch.bfloat16, draw.device)
    weight = quantize(torch.ones(64, 128), "fp8")
    yield "quantized_linear", Inputs((weight, None, draw.normal(70, 128)))
    for scheme in SCHEMES:
        yield "quantized_linear", Inputs((quantize(torch.ones(64, 128), scheme), None, torch.ones(70, 128)))
    settings = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), "silu"
    yield "quantized_moe", Inputs(([weight], [quantize(torch.ones(128, 32), "fp8")], draw.normal(2, 128), *settings))


def test_kernels_compile_for_gpus_with_less_shared_memory_and_without_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As A10 and RTX 30; Triton does not compile float8 for them, nor for the A100."""
    from triton.backends.compiler import GPUTarget

    from inferflux.kernels.triton import tuning
    from tests.support.triton_compile import launches_of

    gpu = tuning.Gpu(99 * 1024, has_float8=False)
    monkeypatch.setattr(tuning, "gpu_of", lambda device: gpu)
    for op, inputs in _for_smaller_gpus():
        for launch in launches_of(op, [inputs]):
            assert launch.compile(GPUTarget("cuda", 86, 32)).metadata.shared <= gpu.shared_bytes, launch.kernel.__name__


def test_no_length_specialises_a_compile() -> None:
    """What counts requests, tokens or pages, or strides over them, is one type to the compiler, whatever its value."""
    from triton.runtime.jit import JITFunction

    lengths = {"num_pairs", "num_rows", "num_splits", "window", "stride_table", "vocab_size"}
    for name in (
        "attention",
        "linear",
        "quantized_linear",
        "moe",
        "quantized_moe",
        "sampling",
        "norm",
        "rope",
        "activation",
    ):
        module = importlib.import_module(f"inferflux.kernels.triton.{name}")
        for kernel in (value for value in vars(module).values() if isinstance(value, JITFunction)):
            if kernel.__name__.endswith("_kernel"):
                specialised = {each.name for each in kernel.params if not each.do_not_specialize}
                assert not specialised & lengths, kernel.__name__
