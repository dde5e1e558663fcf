"""`inferflux kernels tune` without a GPU: how it chooses, what becomes of processes that die or hang, what it keeps.

Times and processes are played; the whole way of one op under Triton's interpreter is in `test_triton`.
"""

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from inferflux.cli import main
from inferflux.kernels.backends import OPS
from inferflux.kernels.bench.shapes import SHAPES
from inferflux.kernels.cases import cases_of
from inferflux.kernels.check import Result
from inferflux.kernels.triton import size_table
from inferflux.kernels.triton.size_table import SizeTable
from inferflux.kernels.triton.sizes import AttentionTile, Block, Decode, ProductTile, RowBlock, Sizes, Split
from inferflux.kernels.tune import command, trial
from inferflux.kernels.tune.knobs import Knob, TuningTask, describe, tasks_of
from inferflux.kernels.tune.report import Found, is_decided, merged, outcome_table, remarks
from inferflux.kernels.tune.timing import Times, score_of
from inferflux.kernels.tune.trial_context import TrialContext
from inferflux.kernels.tune.workers import NO_TIME, Limits, Outcome, run_workers
from tests.support.waiting import PATIENCE_S

pytest.importorskip("triton")

CPU = torch.device("cpu")
ENTRIES = (Block(512, 2), Block(2048, 8))
KNOB = Knob("blocks", "activation", ENTRIES, (), cases_of("activation")[:1], cases_of("activation")[1:2])
PRESENT, FIRST, SECOND = "size 1024 w4", "size 512 w2", "size 2048 w8"


def shipped() -> Sizes:
    from inferflux.kernels.triton.tuning import SHIPPED

    return SHIPPED


class NoLock:
    shared = exclusive = contextlib.nullcontext


def context_until(check_until: float, told: list[tuple[str, Any]]) -> TrialContext:
    """Returns a context whose events are written to `told`."""
    return TrialContext(CPU, torch.float32, NoLock(), lambda event, **facts: told.append((event, facts)), check_until)


Play = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Plays a trial: runs are what the device takes for two workloads, each time it is asked; wrong has the entries
    that fail a check, with the case's name. Returns what is chosen, and all that was told."""

    def run(runs: list[Mapping[str, tuple[float, float]]], wrong: Mapping[str, str] = {}) -> Any:
        told: list[dict[str, Any]] = []
        following = iter(runs)

        def check(op: Any, case: Any, dtype: torch.dtype, device: torch.device) -> Result:
            block = op.keywords["sizes"].blocks["activation"]
            problem = wrong.get(f"size {block.size} w{block.num_warps}")
            known = problem is not None and (problem != "final" or case is KNOB.final_cases[0])
            return Result(case.op, case.name, dtype, 1.0, 0.0, problem if known else None)

        def take(knob: Knob, right: Mapping[str, Sizes], context: TrialContext) -> dict[str, Times]:
            seconds = next(following, {})
            return {f"workload {i}": {name: [seconds[name][i]] * 3 for name in right} for i in range(2) if seconds}

        monkeypatch.setattr(trial, "check_case", check)
        monkeypatch.setattr(trial, "time_entries", take)

        def emit(event: str, **facts: Any) -> None:
            told.append({"event": event, **facts})

        context = TrialContext(CPU, torch.float32, NoLock(), emit, time.time() + 60)
        sizes = trial.try_knob(KNOB, shipped(), {}, context)
        assert told[-1]["event"] == "chosen"
        assert KNOB.choices(shipped())[told[-1]["entry"]] == KNOB.current(sizes)
        return told[-1]["entry"], told

    return run


FASTER = {PRESENT: (1.0, 2.0), FIRST: (0.9, 1.8), SECOND: (0.8, 1.5)}


def test_the_fastest_is_kept(play: Play) -> None:
    chosen, told = play([FASTER, FASTER])
    assert chosen == SECOND
    assert told[-1]["gain"] == pytest.approx((1 / 0.8 * 2 / 1.5) ** 0.5)


@pytest.mark.parametrize(
    "second",
    [(1.1, 2.2), (0.99, 1.97), (0.7, 2.1)],
    ids=["slower", "no faster than the noise", "slower on one workload"],
)
def test_what_is_not_better_is_not_kept(second: tuple[float, float], play: Play) -> None:
    chosen, told = play([{PRESENT: (1.0, 2.0), FIRST: (1.0, 2.0), SECOND: second}])
    assert (chosen, told[-1]["gain"]) == (PRESENT, None)


def test_what_was_lucky_once_is_not_kept(play: Play) -> None:
    chosen, _ = play([FASTER, FASTER | {SECOND: (1.0, 2.0)}, FASTER])
    assert chosen == FIRST


def test_a_wrong_one_is_refused_however_fast_it_is(play: Play) -> None:
    chosen, told = play([FASTER, FASTER], {SECOND: "error 0.3 exceeds 0.01"})
    assert chosen == FIRST
    assert {each["entry"]: each["problem"] for each in told if each["event"] == "checked"} == {
        PRESENT: None,
        FIRST: None,
        SECOND: f"{KNOB.cases[0].name}: error 0.3 exceeds 0.01",
    }


def test_one_that_fails_with_another_variant_of_the_kernel_is_refused(play: Play) -> None:
    assert play([FASTER, FASTER], {SECOND: "final"})[0] == FIRST


def test_where_the_shipped_one_fails_another_takes_its_place(play: Play) -> None:
    assert play([FASTER], {PRESENT: "OutOfResources: shared memory"})[0] == SECOND
    assert play([{}], {PRESENT: "OutOfResources", SECOND: "OutOfResources"})[0] == FIRST


def test_the_vendors_library_stays_however_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a shipped entry fails, another takes its place whatever its time; not in the place of a library."""
    knob, *_ = next(each for each in tasks_of(SHAPES["small"]) if each.name == "linear one").knobs
    told: list[tuple[str, Any]] = []
    context = context_until(time.time() + 60, told)
    monkeypatch.setattr(trial, "check_case", lambda op, case, dtype, _: Result(case.op, "", dtype, 1.0, "error 0.02"))
    assert trial.try_knob(knob, shipped(), {}, context) == shipped()
    assert [facts["problem"] is None for event, facts in told if event == "checked"][:2] == [True, False]


def test_a_case_that_finds_no_memory_says_nothing_of_an_entry(play: Play) -> None:
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        play([FASTER], {PRESENT: "OutOfMemoryError: CUDA out of memory"})


def test_what_is_not_reached_in_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []
    context = context_until(time.time() - 1, told)
    monkeypatch.setattr(trial, "check_case", lambda op, case, dtype, device: Result(case.op, "", dtype, 0.0, 0.0, None))
    assert trial.try_knob(KNOB, shipped(), {}, context) == shipped()
    left_out = {facts["entry"] for event, facts in told if event == "checked" and facts["problem"] == trial.NO_TIME}
    assert left_out == {FIRST, SECOND}


def test_a_score_goes_by_rounds_in_pairs() -> None:
    times = {"a": {"old": [1.0, 2.0, 4.0, 8.0], "new": [0.5, 1.0, 2.0, 4.0]}}
    assert score_of(times, "new", "old") == (pytest.approx(2.0),) * 3
    assert score_of({}, "new", "old") is None


# Entries "dies" and "hangs" do so the first time; all others are right, and the last one is the best.
WORKER = """
import json, os, sys, time
request = json.load(sys.stdin)
emit = lambda event, **facts: print(json.dumps({"event": event, **facts}), flush=True)
print("a library's chatter"), print("[1]"), print("{}"), print("." * 10**5)
knob, known = "blocks activation", request["problems"].get("blocks activation", {})
emit("waiting")
for entry in ("size 1024 w4", "size 512 w2", "size 2048 w8"):
    emit("started", knob=knob, entry=entry)
    if entry not in known:
        BEHAVIOUR
    emit("checked", knob=knob, entry=entry, problem=known.get(entry))
emit("started", knob=knob, entry=None)
emit("timed", knob=knob, workload="w", us={"size 1024 w4": 2.0, "size 2048 w8": 1.0})
emit("chosen", knob=knob, current="size 1024 w4", entry="size 2048 w8", gain=2.0)
"""


def tried(behaviour: str, seconds: float = PATIENCE_S, silence_s: float = PATIENCE_S) -> Outcome:
    command = [sys.executable, "-I", "-S", "-c", WORKER.replace("BEHAVIOUR", behaviour)]
    task = TuningTask("activation", ("activation",), (KNOB,))
    run = run_workers([task], "small", command, Limits(seconds, silence_s), lambda doing: None)
    return asyncio.run(run)[KNOB.name]


@pytest.mark.parametrize(
    ("behaviour", "silence_s", "reason"),
    [
        ("entry == 'size 512 w2' and os.kill(os.getpid(), 11)", PATIENCE_S, "its process ended with SIGSEGV"),
        ("entry == 'size 512 w2' and sys.exit('broken')", PATIENCE_S, "its process ended with 1: broken"),
        ("entry == 'size 512 w2' and time.sleep(60)", 0.5, "it came to no end within 0.5 s"),
    ],
    ids=["dies", "raises", "hangs"],
)
def test_an_entry_that_ends_the_process_is_left_out_and_the_others_are_tried(
    behaviour: str, silence_s: float, reason: str
) -> None:
    outcome = tried(behaviour, silence_s=silence_s)
    assert outcome.left_out == {FIRST: reason}
    assert (outcome.entry, outcome.gain, outcome.problem) == (SECOND, 2.0, None)
    assert outcome.us == {"w": {PRESENT: 2.0, SECOND: 1.0}}


def test_a_lost_device_is_the_blame_of_what_was_told_to_be_wrong() -> None:
    lost = f"if entry == '{FIRST}': emit('checked', knob=knob, entry=entry, problem='illegal address'), sys.exit(3)"
    outcome = tried(lost)
    assert outcome.left_out == {FIRST: "illegal address"}
    assert outcome.entry == SECOND


def test_processes_that_find_nothing_out_are_not_started_for_ever() -> None:
    outcome = tried("os._exit(7)")
    # Each entry is blamed in its turn.
    assert set(outcome.left_out) == {PRESENT, FIRST, SECOND}
    task = TuningTask("activation", ("activation",), (KNOB,))
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.exit('no torch')"]
    outcomes = asyncio.run(run_workers([task], "small", command, Limits(PATIENCE_S), lambda doing: None))
    assert outcomes[KNOB.name].problem == "its process ended with 1: no torch"
    assert not is_decided(outcomes[KNOB.name])
    outcomes = asyncio.run(run_workers([task], "small", ["/no/such/python"], Limits(PATIENCE_S), lambda doing: None))
    assert outcomes[KNOB.name].problem == "no process could be started: No such file or directory"


def test_time_that_is_up_ends_it() -> None:
    outcome = tried("time.sleep(60)", seconds=0.4)  # else it would choose an entry in the end
    assert (outcome.entry, outcome.problem) == (None, NO_TIME)


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_every_knob_has_several_entries_cases_and_workloads(size: str) -> None:
    tasks = tasks_of(SHAPES[size])
    knobs = [knob for task in tasks for knob in task.knobs]
    assert len({knob.name for knob in knobs}) == len(knobs)
    assert {op for task in tasks for op in task.ops} == set(OPS)
    for knob in knobs:
        choices = knob.choices(shipped())
        assert len(choices) > (1 if knob.table == "launches" else 3), knob.name
        assert knob.cases, knob.name
        assert knob.workloads, knob.name
        for entry in choices.values():
            assert knob.current(knob.changed(shipped(), entry)) == entry


def test_candidates_have_what_the_shipped_sizes_lack() -> None:
    (prefill,) = (knob for task in tasks_of(SHAPES["large"]) for knob in task.knobs if knob.table == "prefill")
    wanted = {(128, 64, 4, 4), (128, 32, 4, 5), (128, 32, 4, 7), (256, 32, 16, 5), (128, 128, 8, 3), (256, 64, 16, 3)}
    assert {AttentionTile(*each) for each in wanted} <= set(prefill.choices(shipped()).values())


def outcome_of(entry: str, current: str, **facts: Any) -> Outcome:
    return Outcome(entry=entry, current=current, us={"w": {entry: 1.0}}, gain=1.5, **facts)


def test_what_is_kept_is_what_differs_from_the_shipped_sizes() -> None:
    knobs = {knob.name: knob for task in tasks_of(SHAPES["small"]) for knob in task.knobs}
    shipped_decode = shipped().decode[64]
    earlier = Sizes(
        decode={64: Decode(shipped_decode.tile, Split(2048, 128, 64))},
        blocks={"rope": Block(4, 2), "norm": Block(1024, 16)},
    )
    few = ProductTile(16, 64, 128, 4, 4)
    tall = RowBlock(1, 4, 1024, 4, 1)
    earlier = dataclasses.replace(earlier, linear={"few wide": RowBlock(8, 32, 256, 4, 4)})
    outcomes = {
        "decode 64": outcome_of(describe(shipped_decode), describe(shipped_decode)),  # the shipped one again
        "blocks rope": Outcome(problem=NO_TIME),
        "linear one tall": outcome_of(describe(tall), describe(None)),
        "linear few wide": outcome_of(describe(None), describe(None)),  # no longer faster than the vendor's library
        "products int4, few rows": outcome_of("m16 n64 k128 w4 s4", "m16 n32 k128 w4 s4"),
    }
    kept = merged(earlier, [knobs[name] for name in outcomes], outcomes, shipped())
    assert (kept.decode, kept.blocks) == ({}, earlier.blocks)
    assert kept.linear == {"one tall": tall}
    assert kept.products["int4"].few == few
    assert kept.products["int4"].many == shipped().products["int4"].many
    assert set(kept.products) == {"int4"}
    assert kept.over(shipped()).over(shipped()) == kept.over(shipped())


GPU = "Some GPU"


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Found:
    """What the command finds, on a machine that seems to have a GPU."""
    table = SizeTable(size_table.VERSION, GPU, "3.6.0", "2026-11-26", "small", Sizes(blocks={"activation": ENTRIES[1]}))
    result = Found(table, {KNOB.name: outcome_of(SECOND, PRESENT, left_out={FIRST: "it came to no end within 40 s"})})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(command, "demand_gpu", lambda: None)
    monkeypatch.setattr(command, "tune", lambda *_: result)
    return result


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "tune"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "inferflux: kernels tune: there is no CUDA device here whose sizes could be measured\n"
    assert printed.out == ""


@pytest.mark.parametrize("argv", [["--op", "gather"], ["--size", "toy"], ["--seconds", "0"]])
def test_usage_errors_exit_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["kernels", "tune", *argv])


def test_the_table_is_written_where_a_start_looks_for_it(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "tune", "--size", "small"]) == 0
    assert size_table.read(GPU, "3.6.0") == found.table
    text = capsys.readouterr().out
    assert "50 %" in text
    assert f"blocks activation: {FIRST} is left out: it came to no end" in text


def test_json_and_a_file_of_ones_own(found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "there" / "sizes.json"
    assert main(["kernels", "tune", "--op", "activation", "--json", "--out", str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["written"] == str(path)
    assert report["knobs"][KNOB.name]["us"] == {"w": {SECOND: 1.0}}
    assert report["sizes"] == json.loads(path.read_text())["sizes"]
    assert size_table.read(GPU, "3.6.0") is None


def test_a_table_that_cannot_be_written_or_is_of_nothing_exits_1(
    found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["kernels", "tune", "--out", str(tmp_path / "file" / "sizes.json")]) == 1
    assert "cannot be written: " in capsys.readouterr().err
    nothing = Found(found.table, {KNOB.name: Outcome(problem="its process ended with 1: no device")})
    monkeypatch.setattr(command, "tune", lambda *_: nothing)
    assert main(["kernels", "tune"]) == 1
    printed = capsys.readouterr()
    assert "nothing could be measured" in printed.err
    assert "its process ended with 1: no device" in printed.out
    assert size_table.read(GPU, "3.6.0") is None


def test_list_says_where_sizes_come_from(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        @staticmethod
        def refusal(op: str, device: torch.device, dtype: torch.dtype) -> None: ...

    class Tuning:
        table: SizeTable | None = None

        @classmethod
        def measured_on(cls, device: torch.device) -> SizeTable | None:
            return cls.table

    assert command.origin_of_sizes(CPU) is None
    monkeypatch.setattr(command, "find_backend", lambda name: Backend)
    monkeypatch.setattr(command, "_tuning", lambda: Tuning)
    assert str(command.origin_of_sizes(torch.device("cuda"))).startswith("as shipped; ")
    Tuning.table = found.table
    assert "on 2026-11-26 (small): other than shipped are blocks activation; " in str(
        command.origin_of_sizes(torch.device("cuda"))
    )


def test_people_are_told_of_all_that_was_not_measured(found: Found) -> None:
    outcomes = {"a": Outcome(problem=NO_TIME), **found.outcomes}
    assert next(remarks(outcomes)) == "a: not measured completely: there was no time left"
    assert outcome_table(outcomes, GPU).row_count == 2


def test_an_early_start_is_checked_on_every_kernel_that_may_have_one_and_on_little_else() -> None:
    """It is tried after the products of one row: what compiles for half a minute is not reached within gpu_check."""
    (knob,) = (knob for task in tasks_of(SHAPES["large"]) for knob in task.knobs if knob.table == "launches")
    names = [case.name for case in knob.cases if case.op == "attention"]
    assert {case.op for case in knob.cases} == {
        "norm", "add_norm", "rope", "activation", "quantized_linear", "attention"
    }  # fmt: skip
    assert any("window" in name for name in names)
    assert any("window" not in name for name in names)
    assert len(knob.cases) <= 14
