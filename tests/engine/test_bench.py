"""`inferflux bench` measures real steps of the requested size, real ranks, and prints what it says."""

import argparse
import json

import pytest

from inferflux.engine import bench, bench_dist
from inferflux.sampling_params import SamplingParams


def test_every_step_is_measured_by_phase() -> None:
    times = bench.measure_step(4, 20, 33, SamplingParams(max_tokens=80, temperature=0, ignore_eos=True))
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys((*bench.PHASES, "total"), 20)
    assert all(value > 0 for values in times.values() for value in values)


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["step", "--rows", "2", "--steps", "5", "--json"])) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == 2
    assert set(printed["phases"]) == {*bench.PHASES, "total"}


def test_sizes_must_be_positive() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["step", "--rows", "0"])


def test_dist_measures_every_plan_and_collective() -> None:
    results = bench_dist.measure(2, 3)
    assert [plan["plan"] for plan in results["plans"]][-1] == "512 of a prompt"
    assert all(0 < plan["send_us"] <= plan["round_us"] and plan["bytes"] > 20 for plan in results["plans"])
    assert {one["collective"] for one in results["collectives"]} == {"all_reduce", "all_gather", "gather"}
