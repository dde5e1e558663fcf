"""Building the native kernels: proven before they are kept, in the background by a process that nobody waits for."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inferflux.cli import main
from inferflux.kernels.cases import cases_of
from inferflux.kernels.native import background, build, loading, portable, self_test
from inferflux.kernels.native.loading import Library
from tests.support.waiting import wait_until

OPENMP = build.openmp_library()
FUNCTIONS = ("call", "replay")
FakeCompiler = Callable[[str], None]

pytestmark = pytest.mark.skipif(
    OPENMP is None or build.compiler() is None, reason="needs a torch with GNU OpenMP and a C++ compiler"
)


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeCompiler:
    """Makes `g++` a script that does `action` for $output, with the true one in $true; caches are in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(action: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        script = folder / "g++"
        script.write_text(f"#!/bin/sh\nset -e\ntrue={build.compiler()}\nfor output; do :; done\n{action}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


def stub(body: str, functions: tuple[str, ...] = FUNCTIONS) -> str:
    """A library whose functions do nothing but `body`."""
    source = " ".join(f'extern "C" int inferflux_{name}() {{ {body} return 1; }}' for name in functions)
    return f"printf '%s' '#include <unistd.h>\n{source}' | \"$true\" -x c++ -shared -fPIC -o \"$output\" -"


def kept() -> list[str]:
    """What is in the cache, but for locks."""
    folder = build.library_path(str(OPENMP)).parent
    return sorted(path.suffix for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (stub(""), "its self-test failed: norm in float32, 1x576: error"),
        (stub("__builtin_trap();"), "its self-test ended with SIGILL at norm in float32, 1x576"),
        (stub("", FUNCTIONS[1:]), "undefined symbol: inferflux_call"),
    ],
    ids=["wrong", "crashes", "lacks a kernel"],
)
def test_a_wrong_library_is_not_kept_but_the_reason_is(
    action: str, reason: str, fake_compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_compiler(action)
    assert main(["kernels", "build"]) == 1
    assert reason in capsys.readouterr().out
    assert kept() == [".refused"]
    again: Library = loading.library.__wrapped__()
    assert reason in str(again.reason)
    assert "`inferflux kernels build` tries again" in str(again.reason)
    assert again.call is None


def test_a_library_that_does_not_come_to_an_end_is_refused(
    fake_compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SELF_TEST_TIMEOUT_S", 3.0)
    fake_compiler(stub("pause();"))
    assert "did not end within 3 s" in str(loading.build_now()[1])
    assert kept() == [".refused"]


def test_one_wrong_sign_is_found(fake_compiler: FakeCompiler) -> None:
    """The true sources but for a sign in the rotation, compiled without -O to save time."""
    fake_compiler(
        rf"""
        case "$*" in *-shared*) exec "$true" "$@";; esac
        copy=$(dirname "$output")
        cp "{build.SOURCES}"/*.cpp "{build.SOURCES}"/*.h "$copy"
        grep -q 'b \* co + a \* si' "$copy/kernels.cpp"
        sed -i 's/b \* co + a \* si/b * co - a * si/' "$copy/kernels.cpp"
        exec "$true" -std=c++17 -march=native -fPIC -fopenmp -c "$copy/kernels.cpp" -o "$output"
        """
    )
    assert str(loading.build_now()[1]).startswith("its self-test failed: rope in float32, one token: error")
    assert kept() == [".refused"]


def test_a_right_library_is_kept_and_a_reason_against_it_is_not(
    fake_compiler: FakeCompiler, true_library: Path
) -> None:
    fake_compiler(f'cp {true_library} "$output"')
    path = build.library_path(str(OPENMP))
    path.parent.mkdir(parents=True)
    path.with_suffix(".refused").write_text("it was wrong once")
    assert build.refusal(path) == "it was wrong once"
    assert loading.build_now() == (path, None)
    assert kept() == [".so"]


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: b"",
        lambda whole: b"not a library",
        lambda whole: whole[:4096],
        lambda whole: whole[: len(whole) // 2].ljust(len(whole), b"\0"),
        lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
    ],
    ids=["empty", "text", "cut short", "a lost end", "one bit"],
)
def test_a_damaged_library_is_built_again_and_never_loaded(
    damaged: Callable[[bytes], bytes], fake_compiler: FakeCompiler, true_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a crash of the machine may leave it: it would end each process that loads it, an engine again and again."""
    fake_compiler(f'cp {true_library} "$output"')
    path = build.library_path(str(OPENMP))
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged(true_library.read_bytes()))
    started: list[Path] = []
    monkeypatch.setattr(loading, "start_build", started.append)
    assert loading.library.__wrapped__().reason == "not built yet: it is being built for the next start"
    assert started == [path.parent]
    assert loading.build_now() == (path, None)
    assert build.is_whole(path)
    assert loading.library.__wrapped__().reason is None


def test_a_script_that_ends_at_once_leaves_the_build_going(
    fake_compiler: FakeCompiler, true_library: Path, tmp_path: Path
) -> None:
    """The process that builds is not its child, holds none of its files, and cleans up."""
    may_go_on = tmp_path / "may go on"
    fake_compiler(f'while ! [ -e "{may_go_on}" ]; do sleep 0.05; done; cp {true_library} "$output"')
    # The machine may be too busy for what is low in priority.
    undone = '#!/bin/sh\n{ echo 0 >/proc/self/autogroup; } 2>/dev/null\n[ "$1 $2" = "-n 15" ]\nshift 2\nexec "$@"\n'
    (tmp_path / "bin" / "nice").write_text(undone)
    (tmp_path / "bin" / "nice").chmod(0o755)
    script = """
import os
from inferflux.kernels.native.loading import library
print(library().reason)
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no child")
"""
    # Would wait for whoever holds its output.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["not built yet: it is being built for the next start", "no child"]
    path = build.library_path(str(OPENMP))
    assert not path.exists()
    may_go_on.touch()
    wait_until(path.exists)
    wait_until(lambda: kept() == [".so"])
    wait_until(lambda: not is_held(path.parent / background.LOCK))


def test_a_library_is_found_whatever_its_folder_is_called() -> None:
    """The checkout may lie below a folder with a space in its name: then nothing could be linked."""
    maps = (
        "7f00-7f10 r--p 00000000 08:01 17   /home/me/my checkout/.venv/torch/lib/libgomp.so.1\n"
        "7f10-7f20 rw-p 00000000 00:00 0 \n"
        "7f20-7f30 r-xp 00000000 08:01 18   /usr/lib/libm.so.6\n"
    )
    found = [build.mapped_file(maps, address) for address in (0x7F0F, 0x7F10, 0x7F20, 0x7F30)]
    assert found == ["/home/me/my checkout/.venv/torch/lib/libgomp.so.1", None, "/usr/lib/libm.so.6", None]


def test_while_one_process_builds_no_other_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(subprocess, "run", lambda *args, **_: started.append(args))
    with (tmp_path / background.LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert background.start_build(tmp_path) is None
    assert started == []
    assert background.start_build(tmp_path) is None
    assert len(started) == 1


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in str(background.start_build(tmp_path / "file"))


def test_a_package_brings_libraries_for_machines_without_a_compiler(
    fake_compiler: FakeCompiler,
    true_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_compiler(f'cp {true_library} "$output"')
    monkeypatch.setattr(portable, "FOLDER", tmp_path / "portable")
    assert portable.portable_library() is None
    assert main(["kernels", "build", "--portable"]) == 0
    levels = [level for level in portable.LEVELS if level.is_of_this_machine()]
    assert [line.split(":")[0].split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        level.name for level in levels
    ]
    assert all(level.path().exists() for level in levels)
    assert (tmp_path / "portable").stat().st_mode & 0o055 == 0o055
    best = next((level for level in levels if level.runs_here()), None)
    if best is None:
        pytest.skip("this CPU is of no level")
    monkeypatch.setattr(loading, "compiler", lambda: None)
    assert portable.portable_library() == best.path()
    assert loading.library.__wrapped__().reason is None
    # One made from other sources or damaged is left alone, and so are those of better CPUs.
    best.path().rename(best.path().with_stem(f"{best.name}-0"))
    best.path().write_bytes(b"")
    lesser = [level.path() for level in levels if level.runs_here() and level is not best]
    assert portable.portable_library() == (lesser[0] if lesser else None)


def test_a_level_that_computes_wrongly_here_is_not_kept(
    fake_compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_compiler(stub(""))
    monkeypatch.setattr(portable, "FOLDER", tmp_path / "portable")
    reasons = portable.build_portable()
    for level in portable.LEVELS:
        if level.runs_here():
            assert str(reasons[level.name]).startswith("its self-test failed")
            assert not level.path().exists()


@pytest.mark.parametrize("level", portable.LEVELS, ids=lambda level: level.name)
def test_the_compiler_knows_every_level(level: portable.Level) -> None:
    if not level.is_of_this_machine():
        pytest.skip("for another kind of machine")
    command = [str(build.compiler()), *build.FLAGS, *level.flags, "-fsyntax-only", str(build.SOURCES / "kernels.cpp")]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def test_the_self_test_leaves_out_only_cases_that_are_there() -> None:
    names = [case.name for op in {subject.op for subject in self_test.subjects()} for case in cases_of(op)]
    assert all(any(words in name for name in names) for words in self_test.TOO_LARGE)


def is_held(path: Path) -> bool:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
