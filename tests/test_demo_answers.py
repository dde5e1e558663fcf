"""What the demo model is taught is true: its answers name no key, default, variable, route, metric, command or file
that is not there.

Reads the questions as data; no model runs here.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferflux.cli import COMMANDS
from inferflux.config.env import SHORT_NAMES
from inferflux.config.schema import default_of, env_name, format_key, schema_leaves
from inferflux.ctl.admin.areas import AREAS
from inferflux.server.http.routes import ROUTES

ROOT = Path(__file__).parents[1]
QUESTIONS = ROOT / "scripts" / "demo_model" / "questions"
ENTRIES: list[dict[str, Any]] = [
    entry for path in sorted(QUESTIONS.glob("*.yaml")) for entry in yaml.safe_load(path.read_text())
]
ANSWERS = [entry["answer"] for entry in ENTRIES]
KEYS = {format_key(key): default_of(field) for key, field in schema_leaves()}
KEY = r"(?:server|models\[\]|runtime|auth|guardrails|policy|logging|registry|distributed)(?:\.[a-z]\w*)+"
FILES = ("server.yaml", "registry.yaml")


def named(pattern: str) -> set[str]:
    """Everything in the answers that the pattern finds."""
    return {found for answer in ANSWERS for found in re.findall(pattern, answer)}


def normal(wording: str) -> str:
    return wording.strip().lower().rstrip("?!.")


def test_keys_exist() -> None:
    keys = named(rf"(?<![\w/.])({KEY})") - set(FILES)
    sections = {name.rpartition(".")[0].removesuffix("[]") for name in KEYS}
    assert len(keys) > 40
    assert keys - KEYS.keys() - sections == set()


def test_defaults_are_as_told() -> None:
    told = re.compile(rf"({KEY})[^.]*?, (\d+)(?: GB)? by default|({KEY})[^.]*\. The default is (\d+)")
    found = [match for answer in ANSWERS for match in told.findall(answer)]
    assert len(found) >= 6
    for first, first_number, second, second_number in found:
        assert KEYS[first or second] == int(first_number or second_number), first or second
    (policies,) = (entry["answer"] for entry in ENTRIES if entry["ask"] == "Which scheduling policies are there?")
    assert f"{KEYS['runtime.scheduler.policy']}, the default" in policies


def test_variables_exist() -> None:
    others = ("INFERFLUX_MODEL_PATH", "INFERFLUX_POLICY_PASSPHRASE")
    known = {*SHORT_NAMES, *others, *(env_name(key) for key, _ in schema_leaves())}
    assert named(r"\bINFERFLUX_\w+\w") - known == set()


def test_routes_exist() -> None:
    paths = {route.path for route in ROUTES}
    routes = named(r"(?<![\w.])(/v1/[a-z_/]+[a-z]|/(?:livez|readyz|healthz|health|metrics|tokenize|detokenize|ui)\b)")
    assert len(routes) > 8
    assert {route for route in routes if not any(path.startswith(route) for path in paths)} == set()


def test_metrics_exist() -> None:
    assert (
        named(r"\binferflux_\w+") - set(re.findall(r"`(inferflux_\w+)`", (ROOT / "docs/Metrics.md").read_text()))
        == set()
    )


def test_commands_exist() -> None:
    assert named(r"\binferflux (serve|config|bench|kernels|policy|audit)\b") <= set(COMMANDS)
    assert named(r"\binferctl admin ([a-z-]+[a-z])") - {"changes"} <= set(AREAS)


def test_files_and_modules_exist() -> None:
    files = named(r"(?<![\w/.])(?:\./)?((?:docs|benchmarks|inferflux|scripts|deploy|charts|tests|config)/[\w./-]*\w)")
    modules = named(r"python -m ((?:benchmarks|inferflux)[\w.]*\w)")
    files |= {f"{module.replace('.', '/')}.py" for module in modules}
    assert len(files) > 10
    assert {file for file in files if not (ROOT / file).exists()} == set()


@pytest.mark.parametrize("which", ["also", "held_out"])
def test_a_wording_has_one_answer(which: str) -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    for entry in ENTRIES:
        for wording in (entry["ask"], *entry.get(which, "").splitlines()):
            answers[normal(wording)].add(entry["answer"])
    assert {wording for wording, several in answers.items() if len(several) > 1} == set()


def test_held_out_wordings_are_held_out() -> None:
    trained = {normal(wording) for entry in ENTRIES for wording in (entry["ask"], *entry["also"].splitlines())}
    held_out = {normal(wording) for entry in ENTRIES for wording in entry.get("held_out", "").splitlines()}
    assert len(held_out) > 50
    assert trained & held_out == set()
