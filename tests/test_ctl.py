"""inferctl against a live server: what it prints, how it fails, and the conversation at the terminal."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from inferflux.ctl import main
from inferflux.errors import EngineDeadError
from tests.support.fake_engine import EMBEDDING_SIZE, REPLY, WINDOW
from tests.support.http_server import KEY, KEYED, MODEL
from tests.support.live_server import Live
from tests.support.waiting import PATIENCE_S, wait_until


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with Live(KEYED) as server:
        monkeypatch.setenv("INFERCTL_URL", server.site.url)
        monkeypatch.setenv("INFERCTL_API_KEY", KEY)
        yield server


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_command


def test_status(live: Live, run: Run):
    code, out, _ = run("status")
    assert code == 0
    for word in (live.site.url, "ready", MODEL):
        assert word in out
    code, out, _ = run("status", "--json")
    answer = json.loads(out)
    assert (answer["ready"], answer["health"]["models"][0]["id"]) == ({"status": "ok"}, MODEL)
    live.site.admission.close()
    code, out, _ = run("status")
    assert (code, "not ready: draining" in out) == (0, True)


def test_common_options_stand_before_or_after_the_command(live: Live, run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("INFERCTL_URL", "http://127.0.0.1:1")
    url = ("--url", live.site.url)
    for argv in ((*url, "--json", "models"), ("--json", "models", *url), (*url, "models", "--json")):
        code, out, err = run(*argv)
        assert (code, err) == (0, "")
        assert json.loads(out)["data"][0]["id"] == MODEL


def test_models(live: Live, run: Run):
    code, out, _ = run("models")
    assert code == 0
    header, row = (line.split() for line in out.strip().splitlines())
    assert header == ["model", "state", "backend", "window", "default", "stub", "adapts"]
    assert row == [MODEL, "ready", "cpu", str(WINDOW), "yes", "yes"]
    assert json.loads(run("models", "--json")[1])["data"][0]["id"] == MODEL


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_completion_and_chat_print_the_text(live: Live, run: Run, stream: list[str]):
    assert run("completion", "Hi", "--max-tokens", "100", *stream) == (0, REPLY + "\n", "")
    assert run("chat", "Hi", "--model", MODEL, "--temperature", "0.5", *stream) == (0, REPLY + "\n", "")
    assert live.site.engine.submitted[1].sampling.temperature == 0.5


def test_json_of_answers_and_events(live: Live, run: Run):
    _, out, _ = run("chat", "Hi", "--json")
    assert json.loads(out)["choices"][0]["message"]["content"] == REPLY
    _, out, _ = run("completion", "Hi", "--json", "--stream", "--max-tokens", "100")
    assert "".join(json.loads(line)["choices"][0]["text"] for line in out.splitlines()) == REPLY


def test_embed_prints_a_vector_a_line(live: Live, run: Run):
    _, out, _ = run("embed", "one", "two")
    vectors = [[float(number) for number in line.split(" ")] for line in out.splitlines()]
    assert [len(vector) for vector in vectors] == [EMBEDDING_SIZE, EMBEDDING_SIZE]
    _, out, _ = run("embed", "one", "--dimensions", "2", "--json")
    assert len(json.loads(out)["data"][0]["embedding"]) == 2


def test_a_dash_reads_standard_input(live: Live, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "prompt").write_text("from a pipe")
    with (tmp_path / "prompt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run("completion", "-")[0] == 0
    assert len(live.site.engine.submitted[0].prompt_token_ids) > 3
    (tmp_path / "prompt").write_bytes(b"\xff")
    with (tmp_path / "prompt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, _, err = run("completion", "-")
    assert (code, err.count("\n")) == (2, 1)


def test_errors_go_to_stderr_with_the_request_id(live: Live, run: Run):
    code, out, err = run("completion", "Hi", "--temperature", "3")
    assert (code, out) == (1, "")
    assert err.startswith("inferctl: 400 temperature: must be >= 0.0 and <= 2.0")
    assert "(request req_" in err
    code, _, err = run("models", "--api-key", "wrong")
    assert (code, err[:14]) == (1, "inferctl: 401 ")
    assert "wrong" not in err
    live.site.engine.fail_at, live.site.engine.error = 3, EngineDeadError("died")
    code, out, err = run("completion", "Hi", "--stream")
    assert code == 1
    assert REPLY.startswith(out)
    assert "the engine was lost: died (request req_" in err


def test_a_server_that_is_not_there(run: Run):
    code, _, err = run("status", "--url", "http://127.0.0.1:9")
    assert (code, err) == (1, "inferctl: cannot reach http://127.0.0.1:9: Connection refused\n")
    code, _, err = run("status", "--url", "http://no-such-host.invalid")
    assert code == 1
    assert re.fullmatch(r"inferctl: cannot reach http://no-such-host\.invalid: [A-Z][a-z ]+\n", err), err


def test_https_to_a_server_of_plain_http(live: Live, run: Run):
    code, _, err = run("status", "--url", live.site.url.replace("http", "https"))
    assert (code, err.count("\n")) == (1, 1)
    assert "perhaps it serves plain http: " in err


def test_the_address_may_end_in_v1(live: Live, run: Run):
    assert run("models", "--url", live.site.url + "/v1/")[0] == 0


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["stats"],
        ["chat"],
        ["chat", "Hi", "--interactive"],
        ["completion"],
        ["completion", "Hi", "--max-tokens", "many"],
        ["models", "--url", "localhost:8080"],
        ["models", "--url", "http://user:secret@localhost:8080"],
        ["models", "--api-key", "one\ntwo"],
    ],
)
def test_usage_errors_exit_2_on_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(argv)
    err = capsys.readouterr().err
    assert (left.value.code, err.count("\n")) == (2, 1)


def test_control_characters_do_not_reach_the_terminal(live: Live, run: Run):
    live.site.engine.reply = "a\x1b[31mb\x07\tc\nd\x9b"
    assert run("chat", "Hi")[1] == "a\ufffd[31mb\ufffd\tc\nd\ufffd\n"


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_nor_do_those_in_an_error(live: Live, run: Run, stream: list[str]):
    live.site.engine.fail_at, live.site.engine.error = 1, EngineDeadError("bad config: \x1b]0;owned\x07")
    _, _, err = run("chat", "Hi", *stream)
    assert "owned" in err
    assert "\x1b" not in err


def talk(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> int:
    """Runs a conversation in which the user types these lines, or presses the keys that raise these."""
    typed = iter(lines)

    def read(_prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    return main(["chat", "--interactive", "--max-tokens", "50"])


def test_a_conversation_remembers(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    lines = ("one", "", KeyboardInterrupt, "two", "/help", "/reset", "three", EOFError)
    assert talk(monkeypatch, *lines) == 0
    assert capsys.readouterr().out.count(REPLY) == 3
    texts = [
        live.site.engine.text.tokenizer.decode(one.prompt_token_ids, skip_special_tokens=True)
        for one in live.site.engine.submitted
    ]
    assert texts[0] == "user\none\nassistant\n"
    assert texts[1] == f"user\none\nassistant\n{REPLY}\nuser\ntwo\nassistant\n"
    assert texts[2] == "user\nthree\nassistant\n"


def test_a_conversation_survives_an_error(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert talk(monkeypatch, "x" * 5000, "two", "/exit") == 0
    printed = capsys.readouterr()
    assert "inferctl: 400 messages: " in printed.err
    assert printed.out.count(REPLY) == 1
    assert len(live.site.engine.submitted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_program_holds_a_conversation_in_json(live: Live, stream: bool):
    """Line by line on both sides; what is for people goes to stderr."""
    code = "import sys; from inferflux.ctl import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "chat", "--interactive", "--json", *(["--stream"] if stream else [])]
    done = subprocess.run(
        command,
        input="one\n\n" + "x" * 5000 + "\ntwo\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0
    assert "inferctl: 400 messages: " in done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if stream:
        assert {answer["object"] for answer in answers} == {"chat.completion.chunk"}
        pieces = [choice["delta"].get("content", "") for answer in answers for choice in answer["choices"]]
        assert "".join(pieces) == 2 * REPLY
    else:
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == [REPLY, REPLY]
    ids = live.site.engine.submitted[1].prompt_token_ids
    assert REPLY in live.site.engine.text.tokenizer.decode(ids, skip_special_tokens=True)


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(live: Live):
    """On a real terminal, with real signals."""
    live.site.engine.pause_s = 0.01
    live.site.engine.reply = "word " * 100
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from inferflux.ctl import main; sys.exit(main(['chat', '--interactive']))"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + PATIENCE_S
        while text not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(ours, 65536).decode(errors="replace")
        seen = seen.split(text, 1)[1]

    wait_for("> ")
    os.write(ours, b"count\n")
    wait_for("word word")
    live.site.engine.gate.clear()
    process.send_signal(signal.SIGINT)
    wait_for("(stopped)")
    wait_for("> ")
    wait_until(lambda: live.site.engine.num_aborted)
    os.write(ours, b"\x04")
    assert process.wait(PATIENCE_S) == 0
    os.close(ours)


def test_ctrl_c_exits_130(live: Live):
    live.site.engine.gate.clear()
    code = "import sys; from inferflux.ctl import main; sys.exit(main(['completion', 'Hi']))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    wait_until(lambda: live.site.engine.num_running)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (130, b"")


def test_ctrl_c_before_anything_is_imported_exits_130():
    """The import of the program is held up, as by a slow disk."""
    code = (
        "import sys, time\nfrom inferflux.ctl import main\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'inferflux.ctl.program':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(600)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "sys.exit(main(['status']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (130, b"")


@contextlib.contextmanager
def canned(body: bytes) -> Iterator[str]:
    """The address of a server that is not ours: it answers everything with this."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "body", [b"<html>", b"null", b"[]", b'{"status":"UP"}', b"\xff", b"data: no\n\n", b'data: {"id":1}\n\n']
)
def test_the_answer_of_another_server_is_told_on_one_line(run: Run, body: bytes):
    """Port 8080 is many a server's."""
    with canned(body) as url:
        for argv in (("status",), ("models",), ("chat", "Hi"), ("admin", "pools")):
            code, _, err = run(*argv, "--url", url)
            assert (code, err.count("\n")) == (1, 1)
            assert err.startswith(f"inferctl: the answer of {url}/")
            assert err.endswith(": is it an InferFlux server?\n")
        assert run("chat", "Hi", "--stream", "--url", url)[0] == 1


def test_a_stream_that_is_cut_short_is_no_success(run: Run):
    with canned(b'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n') as url:
        code, out, err = run("chat", "Hi", "--stream", "--url", url)
    assert (code, out, err) == (1, "half", "inferctl: the answer ended before it was complete\n")


def test_what_the_terminals_encoding_lacks_is_a_question_mark(live: Live):
    """And JSON is UTF-8 all the same: it is for programs."""
    code = "import sys; from inferflux.ctl import main; sys.exit(main(['chat', 'Hi', *sys.argv[1:]]))"
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    for options in ([], ["--stream"]):
        done = subprocess.run([sys.executable, "-c", code, *options], env=environ, capture_output=True)
        assert (done.returncode, done.stdout.decode("latin-1")) == (0, REPLY.replace("😀", "?") + "\n")
    done = subprocess.run([sys.executable, "-c", code, "--json"], env=environ, capture_output=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == REPLY


def test_a_password_in_the_servers_address_is_not_repeated(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_request:
        main(["status", "--url", "http://root:sekret@127.0.0.1:1"])
    said = capsys.readouterr().err
    assert (exit_request.value.code, "sekret" in said) == (2, False)
    assert "@127.0.0.1:1" in said


def test_a_full_disk_under_the_output_is_told_on_one_line(live: Live):
    code = "import sys; from inferflux.ctl import main; sys.exit(main(['models', *sys.argv[1:]]))"
    for options in ([], ["--json"]):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run([sys.executable, "-c", code, *options], stdout=full, stderr=subprocess.PIPE)
        told = b"inferctl: the output cannot be written: No space left on device\n"
        assert (done.returncode, done.stderr) == (1, told)
