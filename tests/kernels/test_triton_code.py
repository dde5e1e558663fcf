"""What the compiler makes of the Triton kernels for an H100 and for smaller GPUs, on a machine without one."""

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Iterator

import pytest
import torch

from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.bench.workloads import workloads_of
from inferflux.kernels.cases import cases_of
from inferflux.kernels.cases.case import Draw, Inputs
from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.quantized_kv import SCALE_BYTES
from inferflux.kernels.quantized_weight import quantize

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")

# What fits into an H100's or H200's multiprocessor.
MAX_SHARED_BYTES = 227 * 1024


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
            yield workload.name, _with_quantized_pages(op, _inputs_of(workload), torch.float8_e4m3fn)
    if op == "attention":
        for case in cases_of(op):
            if case.name in ("mixed, head size 256, soft cap", "decode, window"):
                for dtype in (torch.bfloat16, torch.float32):
                    yield case.name, case.inputs(dtype, torch.device("cpu"))


def _with_quantized_pages(op: str, inputs: Inputs, kind: torch.dtype) -> Inputs:
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


def test_a_greedy_row_is_read_several_blocks_at_a_time() -> None:
    """A meeting of all threads at every block of a thousand logits is a trip to memory for each of 126 blocks."""
    from tests.support.triton_compile import launches_of

    (inputs,) = (_inputs_of(each) for each in workloads_of("sampling", SHAPE) if each.name.startswith("greedy"))
    code = launches_of("sampling", [inputs])[0].compile().asm["ptx"]
    assert code.partition("bar.sync")[0].count("ld.global") >= 8


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


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_pages_of_8_bits_are_copied_at_least_four_bytes_at_a_time(kind: str) -> None:
    """A slot is a head's codes and 4 bytes of scale: a compiler that does not know the strides reads single bytes."""
    from tests.support.triton_compile import launches_of

    (inputs,) = (_inputs_of(each) for each in workloads_of("attention", SHAPE) if each.name.startswith(kind))
    code = launches_of("attention", [_with_quantized_pages("attention", inputs, torch.float8_e4m3fn)])[0].compile()
    assert "cp.async" in code.asm["ptx"]
    assert not re.findall(r"ld\.global\S*\.[bus]8", code.asm["ptx"])


def test_a_score_is_scaled_and_shifted_by_one_instruction_whatever_triton_fuses() -> None:
    """Triton 3.10 no longer fuses by default: one instruction more for each score is a tenth of prefill's loop."""
    from inferflux.kernels.triton.tuning import SHIPPED
    from tests.support.triton_compile import launches_of

    (inputs,) = (_inputs_of(each) for each in workloads_of("attention", SHAPE) if each.name.startswith("prefill"))
    (launch,) = launches_of("attention", [inputs])
    launch.arguments["enable_fp_fusion"] = False
    tile = SHIPPED.prefill[128]
    scores = tile.block_m * tile.block_n // (32 * tile.num_warps)
    # In two loops: that of whole tiles, and that of the last ones.
    assert launch.compile().asm["ptx"].count("fma.rn.f32") >= 2 * scores


def test_eight_programs_of_shipped_decode_share_a_multiprocessor() -> None:
    """Else a row of 65,536 tokens, which is cut for that, takes a second turn of a fifth of its programs."""
    from inferflux.kernels.triton.tuning import SHIPPED
    from tests.support.triton_compile import launches_of

    (inputs,) = (_inputs_of(each) for each in workloads_of("attention", SHAPE) if each.name.startswith("decode"))
    code = launches_of("attention", [inputs])[0].compile()
    (registers,) = (int(each) for each in re.findall(r"\.maxnreg (\d+)", code.asm["ptx"]))
    threads = 32 * SHIPPED.decode[128].tile.num_warps
    assert min(65536 // (registers * threads), MAX_SHARED_BYTES // (code.metadata.shared + 1024)) >= 8
    # What widens 8 bits needs more.
    quantised = _with_quantized_pages("attention", inputs, torch.float8_e4m3fn)
    assert ".maxnreg" not in launches_of("attention", [quantised])[0].compile().asm["ptx"]


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
    from inferflux.kernels.triton.sizes import RowBlock
    from inferflux.kernels.triton.tuning import SHIPPED
    from tests.support.triton_compile import catch_launches

    block = RowBlock(1, 4, 1024, 4, 1) if rows == 1 else RowBlock(8, 32, 256, 4, 4)
    sizes = dataclasses.replace(SHIPPED, linear={"one tall": block, "few tall": block})
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


EARLY_OPS = ("norm", "add_norm", "rope", "activation", "attention", "quantized_linear", "linear")


@pytest.mark.parametrize("op", EARLY_OPS)
def test_a_kernel_that_starts_early_reads_weights_alone_before_it_waits(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another kernel has written may not be there yet, and what it reads may not be overwritten."""
    from inferflux.kernels.triton import tuning
    from inferflux.kernels.triton.sizes import ROWS, Launch, RowBlock
    from tests.support.triton_compile import launches_of

    linear = dict.fromkeys(ROWS, RowBlock(1, 16, 64, 4, 1))
    sizes = dataclasses.replace(tuning.SHIPPED, launches={"all": Launch(early=1)}, linear=linear)
    monkeypatch.setattr(tuning, "sizes_for", lambda device, dtype: sizes)
    # Reads of sixteen bytes of each thread.
    weights = {"add_norm": 2, "linear": 1}.get(op, 0)
    calls = [inputs for _, inputs in launched(op)] if op != "linear" else []
    calls = calls or [_inputs_of(each) for each in workloads_of("linear", SHAPE) if each.name == "qkv 1"]
    early = [launch for launch in launches_of(op, calls) if launch.kernel.__name__ != "_chunk_kernel"]
    assert early
    for launch in early:
        assert launch.arguments["launch_pdl"]
        code = launch.compile().asm["ptx"]
        before, waits, _ = code.partition("griddepcontrol.wait")
        assert waits
        assert "griddepcontrol.launch_dependents" in before
        reads = len(re.findall(r"ld\.global|cp\.async\S+ +\[", before))
        assert 0 < reads <= weights or reads == weights == 0
        assert "st.global" not in before
        # No program returns, or goes on, by another way.
        assert "bra" not in before
        assert "ret;" not in before


def test_no_kernel_starts_early_where_it_was_not_measured_or_cannot_be() -> None:
    from inferflux.kernels.triton import tuning
    from inferflux.kernels.triton.sizes import Launch

    early = dataclasses.replace(tuning.SHIPPED, launches={"all": Launch(early=1)})
    assert tuning.start_of(tuning.SHIPPED, torch.device("cpu")) == {"EARLY": False}
    assert tuning.start_of(early, torch.device("cpu"))["EARLY"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "gpu_of", lambda device: tuning.Gpu(163 * 1024, has_float8=False))
        assert tuning.start_of(early, torch.device("cpu")) == {"EARLY": False}


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
        (case,) = (each for each in cases_of(op, quantized_kv=True) if each.name == f"float8_e4m3fn pages, {name}")
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
