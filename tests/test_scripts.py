"""scripts/run_dev.sh around a pretended Python: when it installs, what it starts, from where. No network, no pip."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
RECORDER = '#!/bin/sh\nfor word in "$0" "$@"; do printf "%s|" "${word##*/}" >> "$CALLS"; done\necho >> "$CALLS"\n'


class Checkout:
    """A copy of the scripts in a folder with a space in its name, and a .venv whose programs only record calls."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "my checkout"
        self.calls = folder / "calls"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("lib.sh", "run_dev.sh"):
            (self.root / "scripts" / name).write_text((SCRIPTS / name).read_text())
        (self.root / "pyproject.toml").write_text("")
        (self.root / "constraints.txt").write_text("")
        self.make_venv()

    def make_venv(self) -> None:
        programs = self.root / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name in ("python", "inferflux"):
            (programs / name).write_text(RECORDER)
            (programs / name).chmod(0o755)

    def start(self, *arguments: str, **environ: str) -> list[list[str]]:
        """Runs run_dev.sh from another folder; returns the programs it called, with their arguments."""
        self.calls.write_text("")
        script = self.root / "scripts" / "run_dev.sh"
        environ = {**os.environ, "CALLS": str(self.calls), **environ}
        subprocess.run(["bash", str(script), *arguments], cwd="/", env=environ, check=True, capture_output=True)
        return [line.rstrip("|").split("|") for line in self.calls.read_text().splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def installs(calls: list[list[str]]) -> list[list[str]]:
    return [call for call in calls if call[:4] == ["python", "-m", "pip", "install"]]


def test_first_start_installs_with_constraints_then_serves(checkout: Checkout) -> None:
    calls = checkout.start("--port", "0")
    (install,) = installs(calls)
    assert install[install.index("--constraint") + 1] == "constraints.txt"
    assert install[install.index("--editable") + 1] == "my checkout"
    assert calls[-1] == ["inferflux", "serve", "--config", "server.yaml", "--port", "0"]


def test_second_start_only_serves(checkout: Checkout) -> None:
    checkout.start()
    assert checkout.start() == [["inferflux", "serve", "--config", "server.yaml"]]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_dependencies_are_installed(checkout: Checkout, name: str) -> None:
    checkout.start()
    (checkout.root / name).write_text("# changed")
    assert len(installs(checkout.start())) == 1
    assert installs(checkout.start()) == []


def test_moved_checkout_is_installed_again(checkout: Checkout, tmp_path: Path) -> None:
    checkout.start()
    checkout.root = checkout.root.rename(tmp_path / "elsewhere")
    assert len(installs(checkout.start())) == 1


def test_own_constraints(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("")
    (install,) = installs(checkout.start(INFERFLUX_CONSTRAINTS=str(tmp_path / "own.txt")))
    assert install[install.index("--constraint") + 1] == "own.txt"


@pytest.mark.parametrize("arguments", [("--config", "x.yaml"), ("--port", "1", "--config=x.yaml")])
def test_given_config_is_kept(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    assert checkout.start(*arguments)[-1] == ["inferflux", "serve", *arguments]


def test_failed_install_is_tried_again(checkout: Checkout) -> None:
    python = checkout.root / ".venv" / "bin" / "python"
    python.write_text(RECORDER + 'case "$*" in *pip\\ install*) exit 1 ;; esac\n')
    with pytest.raises(subprocess.CalledProcessError):
        checkout.start()
    python.write_text(RECORDER)
    assert len(installs(checkout.start())) == 1


def test_old_python_is_a_clear_error(checkout: Checkout, tmp_path: Path) -> None:
    (checkout.root / ".venv" / "bin" / "python").unlink()
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python"):
        (bin_folder / name).write_text("#!/bin/sh\nexit 1\n")
        (bin_folder / name).chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as info:
        checkout.start(PATH=f"{bin_folder}:/usr/bin:/bin")
    assert b"InferFlux needs Python 3.11 or newer" in info.value.stderr
