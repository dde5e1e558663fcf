"""The benchmarks run at toy size: so that a renamed method breaks here and not on the day of a measurement."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import admin, churn, kv_tiers, offline, op_shares, paged_attention, serving, structured
from benchmarks.shapes import SHAPES, write_model
from inferflux import LLM
from inferflux.engine.kv.rates import Rates
from inferflux.engine.kv.store.mover import Mover, Report
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("models")
    write_model(cache / "toy-float32", SHAPES["toy"], torch.float32)
    return cache


def test_both_systems_answer_the_same_workload(cache: Path) -> None:
    for system in offline.SYSTEMS.values():
        run = system(cache / "toy-float32", "float32", None)
        assert offline.measure(run, "single", seed=0)["decode_tok_s"] > 0
        assert offline.measure(run, "prefill", seed=0)["prefill_tok_s"] > 0


def test_offline_runs_quantised_variants_beside_the_float_ones(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "offline.json"
    arguments = ["offline", "--shapes", "toy", "--systems", "inferflux", "--quantization", "none", "int8"]
    arguments += ["--workloads", "single", "--rounds", "1", "--cache", str(cache), "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    offline.main()
    runs = json.loads(out.read_text())["results"]["toy"]
    assert set(runs) == {"inferflux float32", "inferflux int8 float32"}
    assert all(figures["single.decode_tok_s"][0] > 0 for figures in runs.values())


def test_shares_of_a_step_add_up(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "op_shares.json"
    arguments = ["op_shares", "--shapes", "toy", "--quantization", "none", "int8", "--steps", "32"]
    monkeypatch.setattr("sys.argv", [*arguments, "--cache", str(cache), "--out", str(out)])
    op_shares.main()
    results = json.loads(out.read_text())["results"]
    for name in ("toy float32", "toy int8 float32"):
        for figures in results[name].values():
            assert sum(figures["shares"].values()) == pytest.approx(1, abs=0.01)
            assert figures["shares"]["products"] > 0
            assert figures["shares"]["attention"] > 0


def test_admin_measures_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "admin.json"
    monkeypatch.setattr("sys.argv", ["admin", "--requests", "20", "--rounds", "1", "--out", str(out)])
    admin.main()
    measured = json.loads(out.read_text())["results"]["cpu"]
    assert set(measured) == {"whole", "authenticate", "limit", "blocklist", "audit", "blocklist_long"}
    assert all(part["min_us"] > 0 for part in measured.values())


def test_paged_attention_is_measured_beside_contiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "attention.json"
    monkeypatch.setattr(paged_attention, "BATCHES", ((1, 20), (3, 33)))
    monkeypatch.setattr("sys.argv", ["paged_attention", "--shapes", "toy", "--rounds", "1", "--out", str(out)])
    paged_attention.main()
    lines = json.loads(out.read_text())["results"]["lines"]
    assert [(line["rows"], line["tokens"]) for line in lines] == [(1, 20), (3, 33)]
    assert all(line["contiguous_us"] > 0 and line["torch_us"] > 0 for line in lines)


def test_serving_streams_every_answer(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "serving.json"
    arguments = ["serving", "--shape", "toy", "--mode", "closed", "--concurrency", "4", "--requests", "6"]
    arguments += ["--rounds", "1", "--cache", str(cache), "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    serving.main()
    written = json.loads(out.read_text())
    (first,) = written["results"]["rounds"]
    assert first["requests"] == 6
    assert first["num_errors"] == 0
    assert first["output_tok_s"] > 0
    assert set(first["ttft_s"]) == {"p50", "p90", "p99"}
    assert written["environment"]["versions"]["torch"] == torch.__version__


def test_churn_fails_no_request_and_gets_the_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real engine processes: what an unloaded model held is the system's again."""
    out = tmp_path / "churn.json"
    arguments = ["churn", "--edits", "1", "--clients", "2", "--max-tokens", "8", "--pause-s", "0", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    churn.main()
    results = json.loads(out.read_text())["results"]
    assert results["num_failures"] == 0
    assert min(results["answers"].values()) > 0
    before, loaded, after = (results["unload"][stage] for stage in ("before", "loaded", "after"))
    assert (before["processes"], loaded["processes"], after["processes"]) == (2, 3, 2)
    model = loaded["bytes"] - before["bytes"]
    assert model > 50e6, "an engine is not that small"
    assert loaded["bytes"] - after["bytes"] > 0.8 * model


def test_structured_answers_are_judged(cache: Path) -> None:
    results = structured.measure(LLM(cache / "toy-float32", dtype="float32"), num_schemas=4, max_tokens=150)
    assert results["schemas"] == 4
    assert results["valid"] == results["finished"] > 0
    assert structured.judge('{"a": 1}', {"required": ["b"]})
    assert structured.judge("{", {})


def test_kv_tiers_measures_prefixes_from_every_tier_and_the_books(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rates, "prefers_load", lambda *_args: True)
    poll = Mover.poll

    def poll_when_all_is_done(mover: Mover, *, wait: bool) -> Report:
        """On a busy machine pages may come faster than the file takes them: then they give way."""
        wait_until(lambda: mover._ended.qsize() >= mover._num_file_moves)
        return poll(mover, wait=wait)

    monkeypatch.setattr(Mover, "poll", poll_when_all_is_done)
    found = kv_tiers.ttft(cache / "toy-float32", 1280, 1, tmp_path)
    assert found["samples"] == {"recomputed": 2, "cpu": 1, "nvme": 1}
    lost = kv_tiers.loss(cache / "toy-float32", 64, 1, tmp_path)
    assert lost["demoted_mb"] > 0
    assert kv_tiers.books(500, 3)["median_us"] > 0
