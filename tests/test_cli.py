"""The `inferflux` command as a shell sees it: exit codes, one-line errors, quick start."""

import functools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from inferflux import cli
from inferflux.errors import ConfigError, ModelLoadError, RequestError
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inferflux", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environ,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "inferflux: the following arguments are required: COMMAND (see inferflux --help)"),
        (("serv",), 'inferflux: no command "serv"; did you mean "serve"? (see inferflux --help)'),
        (
            ("xyz",),
            'inferflux: no command "xyz"; commands: serve, config, policy, audit, kernels, bench '
            "(see inferflux --help)",
        ),
        (("config", "show", "--jso"), "inferflux config: unrecognized arguments: --jso (see inferflux config --help)"),
        (("config", "check", "none.yaml"), "none.yaml: cannot be read: No such file or directory"),
    ],
)
def test_usage_and_config_errors_are_one_line_and_exit_2(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as exit_request:
        code = exit_request.code
    assert code == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module standing behind `inferflux serve`; tests give it `run`."""
    module = ModuleType("fake_command")
    module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setattr(cli, "COMMANDS", {"serve": cli.Command("fake", "fake_command")})
    return module


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("c.yaml: a: is wrong"), 2, "c.yaml: a: is wrong\n"),
        (RequestError("top_p: must be <= 1"), 2, "top_p: must be <= 1\n"),
        (ModelLoadError("no weights in /m"), 1, "inferflux: no weights in /m\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(
    fake_command: ModuleType, error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise error

    fake_command.run = fail  # type: ignore[attr-defined]
    assert cli.main(["serve"]) == code
    assert capsys.readouterr().err == line


def test_an_interrupt_that_a_library_turns_into_its_own_error_is_one(
    fake_command: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch does when it is hit while it imports numpy."""

    def import_badly(args: object) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None
        return 0

    fake_command.run = import_badly  # type: ignore[attr-defined]
    monkeypatch.setattr(cli, "COMMANDS", {"bench": cli.Command("fake", "fake_command")})
    assert cli.main(["bench"]) == 130


def test_our_own_mistakes_keep_their_traceback(fake_command: ModuleType) -> None:
    fake_command.run = lambda args: [][1]  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        cli.main(["serve"])


def test_an_interrupt_that_a_library_swallows_while_it_is_imported_ends_the_command(tmp_path: Path) -> None:
    """numpy does so within `import torch`: the command went on as if nothing had been."""
    (tmp_path / "deaf.py").write_text(
        "import signal\n\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n\n\n"
        "def add_arguments(parser): ...\n\n\ndef run(args):\n    return 0\n"
    )
    code = "from inferflux import cli; cli.COMMANDS = {'bench': cli.Command('', 'deaf')}; raise SystemExit(cli.main())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), *filter(None, sys.path)))}
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's is ignored
    done = subprocess.run([sys.executable, "-c", code, "bench"], env=environment, preexec_fn=restore, check=False)
    assert done.returncode == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_before_the_server_listens_to_signals_ends_it_quietly(number: signal.Signals, code: int) -> None:
    """The import of the server's module is held up, as by a slow disk."""
    program = (
        "import sys, time\nfrom inferflux import cli\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'inferflux.server.commands':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(600)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "sys.exit(cli.main(['serve']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (code, b"")


def test_a_command_leaves_the_signals_as_they_were(fake_command: ModuleType) -> None:
    fake_command.run = lambda args: 0  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["serve"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_module_and_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout.split()[0]) == (0, "inferflux")


def test_help_lists_every_command() -> None:
    out = run("--help").stdout
    for name, command in cli.COMMANDS.items():
        assert name in out
        assert command.help in out


def test_faulty_environment_stops_serve_before_it_starts() -> None:
    result = run("serve", INFERFLUX_PORT="x")
    assert result.returncode == 2
    assert result.stderr == 'INFERFLUX_PORT: server.http_port: must be an integer (got "x")\n'


def test_open_server_is_refused() -> None:
    result = run("serve", "--config", "config/server.yaml", "--host", "0.0.0.0")
    assert result.returncode == 2
    assert result.stderr.startswith("config/server.yaml: auth.allow_anonymous: must be false unless server.host is a")
    assert result.stderr.count("\n") == 1


def test_reader_that_leaves_is_no_error_message() -> None:
    command = f"{shlex.quote(sys.executable)} -m inferflux config show | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.stdout, result.stderr) == ("s", "")


def test_full_disk_under_the_output_is_told_on_one_line() -> None:
    command = f"{shlex.quote(sys.executable)} -m inferflux config show >/dev/full"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert result.stderr == "inferflux: the output cannot be written: No space left on device\n"


def test_closed_streams_do_not_lead_into_the_next_file(tmp_path: Path) -> None:
    """What a library prints must not come to stand in the audit log."""
    program = (
        "import os, sys\nfrom inferflux.command_line import open_streams\nopen_streams()\n"
        "file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "os.write(1, b'stray'), os.write(2, b'stray'), print('stray', flush=True)\n"
        "sys.exit(0 if file > 2 and sys.stdin.read() == '' else 3)\n"
    )
    words = shlex.join([sys.executable, "-c", program, str(tmp_path / "audit.log")])
    assert subprocess.run(f"{words} <&- >&- 2>&-", shell=True, cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "audit.log").read_bytes() == b""


def test_config_needs_no_torch() -> None:
    code = "import sys; from inferflux.cli import main; main(['config', 'show']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False).returncode == 0
