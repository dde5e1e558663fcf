"""inferctl admin against a live server: tables, JSON, confirmation, and refusals in the server's words."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferflux.ctl import main
from inferflux.engine.stats import EngineStats, TierStats
from tests.support.http_server import KEY, MODEL
from tests.support.live_server import Live

CONFIG: dict[str, Any] = {
    "models": [{"id": MODEL, "path": "stub"}],
    "auth": {"api_keys": [{"key": KEY, "name": "root", "scopes": ["admin", "read"]}]},
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with Live(CONFIG) as server:
        monkeypatch.setenv("INFERCTL_URL", server.site.url)
        monkeypatch.setenv("INFERCTL_API_KEY", KEY)
        yield server


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(*argv: str) -> tuple[int, str, str]:
        code = main(["admin", *argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_command


def test_a_key_from_making_to_revoking(live: Live, run: Run, monkeypatch: pytest.MonkeyPatch):
    code, key, err = run("api-keys", "create", "chat-app", "--scopes", "generate,read", "--rate-limit", "60")
    assert code == 0
    key_id = err.partition(";")[0]
    assert key.strip().startswith("iflx_"), "standard output is the key alone, fit for a pipe"
    _, table, _ = run("api-keys")
    assert "chat-app" in table
    assert "generate,read" in table
    assert key.strip() not in table
    monkeypatch.setenv("INFERCTL_API_KEY", key.strip())
    assert main(["models"]) == 0
    code, _, err = run("api-keys", "list")
    assert (code, err[:14]) == (1, "inferctl: 403 ")
    monkeypatch.setenv("INFERCTL_API_KEY", KEY)
    assert run("api-keys", "revoke", key_id, "--yes")[:2] == (0, f"revoked {key_id}\n")
    assert key_id not in run("api-keys", "--json")[1]


def test_revoking_asks(live: Live, run: Run):
    """Standard input is no terminal here, so there is nobody to ask."""
    key_id = live.site.policy.document.api_keys[0].id
    code, _, err = run("api-keys", "revoke", key_id)
    assert (code, err) == (2, "inferctl: cannot ask for confirmation without a terminal; pass --yes\n")
    code, _, err = run("api-keys", "revoke", key_id, "--yes")
    assert code == 1
    assert "409" in err
    assert "last key with the scope admin" in err
    assert len(live.site.policy.document.api_keys) == 1


def test_rate_limit(live: Live, run: Run):
    assert run("rate-limit")[1].split()[:5] == ["requests", "a", "minute", "no", "limit"]
    assert run("rate-limit", "set", "90")[1].split()[3] == "90"
    assert json.loads(run("rate-limit", "--json")[1]) == {"requests_per_minute": 90}
    assert json.loads(run("rate-limit", "show", "--json")[1]) == {"requests_per_minute": 90}
    code, _, err = run("rate-limit", "set", "-1")
    assert (code, "requests_per_minute: expected int >= 0" in err) == (1, True)


def test_fairness(live: Live, run: Run):
    assert run("fairness")[1].split()[:2] == ["policy", "priority_age"]
    code, out, _ = run("fairness", "set", "--policy", "fair", "--timeslice", "64", "--preemption", "off")
    assert code == 0
    assert {"fair", "off", "64"} <= set(out.split())
    assert json.loads(run("fairness", "set", "--high-priority", "3", "--json")[1]) == {
        "policy": "fair",
        "enable_preemption": False,
        "high_priority_threshold": 3,
        "max_timeslice_tokens": 64,
    }
    code, _, err = run("fairness", "set", "--timeslice", "-1")
    assert (code, "max_timeslice_tokens: expected int >= 0" in err) == (1, True)
    assert run("fairness", "set")[:2] == (2, "")


def test_pools(live: Live, run: Run):
    live.site.engine.stats = EngineStats(
        running=3, waiting=2, batch_tokens=40, device_pages_total=64, device_pages_in_use=9, device_pages_cached=5
    )
    live.site.engine.stats.tiers["cpu"] = TierStats(pages_total=100, pages_in_use=7)
    live.site.engine.num_restarts = 1
    code, out, _ = run("pools")
    assert code == 0
    for word in ("ready", "priority_age", "0 of 1024", "3/128", "40/2048", "device 9/64, cpu 7/100"):
        assert word in out
    answer = json.loads(run("pools", "--json")[1])
    assert (answer["ready"], answer["server"]["max_queue"]) == (True, 1024)
    (pool,) = answer["pools"]
    assert pool["queue"] == {"server": 0, "engine": 2}
    assert pool["kv"]["device"] == {
        "pages_total": 64,
        "pages_in_use": 9,
        "pages_cached": 5,
        "state": "on",
    }
    assert (pool["model"], pool["state"], pool["default"], pool["restarts"]) == (MODEL, "ready", True, 1)
    live.site.admission.close()
    assert "not ready: draining" in run("pools")[1]


def test_guardrails(live: Live, run: Run, tmp_path: Path):
    (tmp_path / "terms").write_text("first term\n\nsecond\n")
    argv = ("guardrails", "set", "--blocklist", str(tmp_path / "terms"), "--check-output", "yes")
    code, _, err = run(*argv)
    assert (code, "pass --yes" in err) == (2, True)
    code, out, _ = run(*argv, "--yes")
    assert code == 0
    for word in ("first term", "second", "deny"):
        assert word in out
    answer = json.loads(run("guardrails", "--json")[1])
    assert (answer["blocklist"], answer["check_output"]) == (["first term", "second"], True)
    code, _, err = run("guardrails", "set", "--yes")
    assert (code, err) == (2, "inferctl: nothing to change: give at least one option\n")


def test_a_change_may_be_bound_to_what_was_shown(live: Live, run: Run, tmp_path: Path):
    (tmp_path / "terms").write_text("falcon")
    sets = {
        "guardrails": ("--blocklist", str(tmp_path / "terms"), "--yes"),
        "rate-limit": ("90",),
        "fairness": ("--policy", "fair"),
    }
    for area, change in sets.items():
        tag = run(area)[1].partition("tag")[2].split()[0]
        code, out, _ = run(area, "set", *change, "--if-match", tag)
        assert (code, tag in out) == (0, False), "what is shown after a change has a tag of its own"
        code, _, err = run(area, "set", *change, "--if-match", tag)
        assert (code, "412 this has changed since it was read" in err) == (1, True)


def test_policy(live: Live, run: Run):
    answer = json.loads(run("policy", "--json")[1])
    assert (answer["persistent"], answer["encrypted"], answer["api_keys"], answer["admin_keys"]) == (False, False, 1, 1)
    assert run("api-keys", "create", "reader", "--scopes", "read")[0] == 0
    after = json.loads(run("policy", "show", "--json")[1])
    assert (after["generation"], after["api_keys"]) == (answer["generation"] + 1, 2)
    _, table, _ = run("policy")
    assert "until the server stops" in table
    assert "2, 1 of them with the scope admin" in table


def test_options_may_stand_before_and_after_the_action(live: Live, run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("INFERCTL_URL")
    monkeypatch.delenv("INFERCTL_API_KEY")
    options = ["--url", live.site.url, "--api-key", KEY, "--json"]
    for argv in (["rate-limit", *options, "show"], ["rate-limit", "show", *options], ["rate-limit", *options]):
        assert json.loads(run(*argv)[1]) == {"requests_per_minute": 0}


def test_models(live: Live, run: Run):
    code, table, _ = run("models")
    assert code == 0
    assert table.split()[:2] == ["id", "state"]
    assert f"{MODEL}  ready  yes" in table
    assert run("models", "load", "other", "stub", "--idle-unload-s", "60")[:2] == (0, "other is ready\n")
    card = json.loads(run("models", "--json")[1])["data"][1]
    assert (card["id"], card["idle_unload_s"], card["origin"]) == ("other", 60, "api")
    code, _, err = run("models", "load", "third", "/no/such")
    assert (code, "/no/such is not a folder" in err) == (1, True)
    assert run("models", "default", "other", "--yes")[1] == "the default is other\n"
    assert (
        run("models", "default", "--files", "--yes", "--json")[1]
        == json.dumps({"id": MODEL}, separators=(",", ":")) + "\n"
    )
    code, _, err = run("models", "unload", "other")
    assert (code, "pass --yes" in err) == (2, True)
    assert run("models", "unload", "other", "--yes")[1] == "other is unloaded\n"
    assert run("models", "unload", MODEL, "--yes")[1] == f"{MODEL} is unloaded\n"
    assert run("models", "forget", MODEL, "--yes")[1] == f"{MODEL} is ready\n"
    _, events, _ = run("models", "events")
    ended = [line.split()[2] for line in events.splitlines()[1:] if line.split()[3] == "other"]
    assert ended[-2:] == ["draining", "unloaded"]
    with pytest.raises(SystemExit, match="2"):
        run("models", "default")


def test_cache(live: Live, run: Run):
    code, table, _ = run("cache")
    assert code == 0
    assert [line.split()[1] for line in table.splitlines()] == ["tier", "device"]
    assert json.loads(run("cache", "warm", "Hello there", "--json")[1])["model"] == MODEL
    code, _, err = run("cache", "drop")
    assert (code, err) == (2, "inferctl: cannot ask for confirmation without a terminal; pass --yes\n")
    assert run("cache", "drop", "--yes")[1] == f"dropped: {MODEL}\n"
