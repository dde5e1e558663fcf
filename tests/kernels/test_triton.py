"""The Triton kernels agree with the reference on every case, run by Triton's interpreter.

It takes the place of the compiler for a whole process, so what it runs runs in a process of its own; in one of two,
since each imports torch and Triton for seconds. It cannot multiply matrices in bfloat16: ops that do are interpreted in
the other types. What the compiler makes of them is in `test_triton_code`.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")

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
from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import Paging
from inferflux.kernels.check import check_case
from inferflux.kernels.triton.attention import attention
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

# Splits that begin in the middle of a page, of which a tile holds whole ones.
draw = Draw(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
paging = Paging(((499, 500), (99, 100)), page_tokens=256)
metadata = paging.metadata(draw)
pages = paging.pool(draw, 2, 32)
paging.fill(pages, metadata, draw)
query, settings = draw.normal(2, 4, 32), {"scale": 0.125, "window": None, "soft_cap": None}
short = Sizes(decode=dict.fromkeys(HEAD_DIMS, Decode(AttentionTile(16, 256, 4, 3), Split(128, 16, 16)))).over(SHIPPED)
true = find_backend("reference").find("attention")(query, pages, metadata, **settings)
assert torch.allclose(attention(query, pages, metadata, sizes=short, **settings), true, atol=1e-5)

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
from inferflux.kernels.tune.knobs import tasks_of

# A table may have any of them anywhere.
blocks = {RowBlock(1, 64, 64, 4, 1): torch.bfloat16, RowBlock(8, 64, 64, 4, 4): torch.float16}
knobs = [knob for task in tasks_of(SHAPES["toy"]) for knob in task.knobs if knob.table == "linear"]
assert len(knobs) == 4
for knob in knobs:
    assert len(knob.cases) >= 2 and len(knob.final_cases) >= 4
    for block, dtype in blocks.items():
        for case in knob.cases + knob.final_cases:
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
SMALL_QUANTIZED_VALUES = """
import torch
from inferflux.kernels.backends import find_backend
from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import Paging
from inferflux.kernels.quantized_kv import LARGEST_CODE, as_bytes, quantize

settings = {"scale": 0.125, "window": None, "soft_cap": None}
for kind in LARGEST_CODE:
    for span in ((39, 40), (30, 40)):
        draw = Draw(torch.float16, torch.device("cpu"), torch.Generator().manual_seed(0))
        paging = Paging((span,))
        metadata = paging.metadata(draw)
        pages = torch.zeros(paging.num_pages, 2, 16, 2, 68, dtype=torch.int8).view(kind)
        for which, scale in enumerate((1.0, 1e-3)):
            as_bytes(pages)[:, which] = quantize(draw.normal(paging.num_pages, 16, 2, 64, scale=scale), kind)
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
from inferflux.kernels.tune.knobs import tasks_of
from inferflux.kernels.tune.trial_context import TrialContext
from inferflux.kernels.tune.trial import try_knob

class NoLock:
    shared = exclusive = contextlib.nullcontext

events = []
emit = lambda event, **facts: events.append((event, facts))
context = TrialContext(torch.device("cpu"), torch.float32, NoLock(), emit, time.time() + 60, toy=True)
(task,) = (each for each in tasks_of(SHAPES["toy"]) if each.name == "activation")
(whole,) = task.knobs
knob = dataclasses.replace(
    whole, entries=(Block(128, 1), Block(256, 1)), cases=whole.cases[:1], workloads=whole.workloads[:1]
)
sizes = try_knob(knob, SHIPPED, {"size 256 w1": "it is said to be wrong"}, context)
checked = {facts["entry"]: facts["problem"] for event, facts in events if event == "checked"}
assert checked == {"size 1024 w4": None, "size 128 w1": None, "size 256 w1": "it is said to be wrong"}, checked
timed = [facts["us"] for event, facts in events if event == "timed"]
assert timed and all(set(each) == {"size 1024 w4", "size 128 w1"} for each in timed), timed
event, chosen = events[-1]
assert event == "chosen" and chosen["current"] == "size 1024 w4", events[-1]
assert sizes == (SHIPPED if chosen["entry"] == chosen["current"] else knob.changed(SHIPPED, Block(128, 1)))
"""


# What `tune` measures early starts on, by the interpreter and by the reference.
CHAIN = """
import torch
from inferflux.kernels.backends import find_backend
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.triton.tuning import SHIPPED
from inferflux.kernels.tune.chain import LAYERS, Chain, chain_workload, run_chain

arguments = chain_workload(SHAPES["toy"]).build(torch.float32, torch.device("cpu")).positional
ours = run_chain(SHIPPED, *arguments)
Chain(SHIPPED)(*arguments)
x, residual, weight, matrices, eps = arguments
reference = find_backend("reference")
add_norm, activation = reference.find("add_norm"), reference.find("activation")
for _ in range(LAYERS):
    x, residual = add_norm(x, residual, weight, eps)
    x, residual = add_norm((x @ matrices["qkv"].T)[:, :64] @ matrices["out"].T, residual, weight, eps)
    x = activation(x @ matrices["gate_up"].T, "silu") @ matrices["down"].T
assert torch.allclose(ours, x + residual, rtol=1e-4, atol=1e-4)
"""


# Rows of many blocks, as GPUs have them; the interpreter's own are as large as most vocabularies here. The largest
# logit comes three times, and draws fall into all parts of a row.
SMALL_SAMPLING_BLOCKS = """
import torch
from inferflux.kernels.backends import find_backend
from inferflux.kernels.triton import tuning

tuning.INTERPRETED_SAMPLING_BLOCK = 16
logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
logits[0, [37, 53, 250]] = 4.0
uniform = torch.tensor([0.5, 0.02, 0.4, 0.6, 0.8, 0.97, 0.9999, 0.9, 0.95], dtype=torch.float64)
count = len(uniform)
temperature = torch.tensor([0.0] + [2.0] * (count - 1))
top_k = torch.tensor([0] * (count - 2) + [60, 0])
top_p = torch.tensor([1.0] * (count - 1) + [0.8])
drawn = [
    find_backend(name).find("sampling")(
        logits.repeat(count, 1), temperature, top_k, top_p, torch.zeros(count), uniform
    ).tolist()
    for name in ("reference", "triton")
]
assert drawn[0] == drawn[1], drawn
assert drawn[0][0] == 37 and max(drawn[0]) > 256 and len(set(drawn[0])) > 5, drawn
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
    programs = (FLOAT8, SMALL_QUANTIZED_VALUES, TRIAL, FEW_ROWS, CHAIN, SMALL_SAMPLING_BLOCKS)
    interpret(check("float32", "rope", *small, "sampling"), check("bfloat16", *small), *programs)
