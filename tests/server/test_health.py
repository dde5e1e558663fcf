"""`python -m inferflux.server.health`: what it makes of a server that answers, that is stuck, and that is not there."""

import socket
from pathlib import Path

import pytest
import yaml

from inferflux.server.health import main
from tests.support.http_server import OPEN
from tests.support.live_server import Live


def check(folder: Path, port: int, host: str) -> int:
    path = folder / "server.yaml"
    path.write_text(yaml.safe_dump({"server": {"host": host, "http_port": port}}))
    return main(["--config", str(path)])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_it_says_whether_the_server_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str) -> None:
    with Live(OPEN) as live:
        port = int(live.site.url.rpartition(":")[2])
        assert check(tmp_path, port, host) == 0
        live.site.engine.stuck = True
        assert check(tmp_path, port, host) == 1
        assert capsys.readouterr().err.endswith("answers /livez with 503\n")


def test_what_cannot_be_asked_is_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert check(tmp_path, free.getsockname()[1], "127.0.0.1") == 1
    assert "does not answer" in capsys.readouterr().err
    assert main(["--config", str(tmp_path / "missing.yaml")]) == 1
    assert "missing.yaml" in capsys.readouterr().err
