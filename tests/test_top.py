"""`input-workers top`: the numbers of a running trainer in a terminal, or why there are none."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from metrics.http_client import source
from rich.console import Console

import input_workers as iw
from input_workers.cli import main
from input_workers.metrics import top
from input_workers.metrics.top import NoAnswer, frame, read_status, watch


@pytest.fixture
def server():
    coordinator = source(source(iw.GlobalCoordinator()), "te\x1b[31mst\n[bold]", 80)
    with coordinator, iw.serve_metrics(0, coordinator=coordinator, rank=5) as server:
        coordinator["train"].next_batch()
        server.coordinator = coordinator
        yield server


@pytest.fixture
def nobody():
    """An address at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


def text_of(picture):
    console = Console(file=io.StringIO(), width=120, highlight=False, markup=False)
    console.print(picture)
    return console.file.getvalue()


def test_once_prints_a_block_for_each_source(server, capsys):
    assert main(["top", server.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert f"process {os.getpid()}, rank 5" in shown
    for wanted in ("train", "running", "rows/s, 1 batches", "rows fetched = 8 delivered", "1 alive", "none", "trainer"):
        assert wanted in shown, wanted
    for what in ("state", "rate", "queues", "ledger", "waits", "copying", "workers", "errors", "verdict"):
        assert shown.count(f" {what} ") >= 2, what


def test_a_name_is_shown_and_not_obeyed(server, capsys):
    assert main(["top", server.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert "te\\x1b[31mst\\n[bold]" in shown
    assert "\x1b" not in shown


def test_once_as_json_is_the_status_for_scripts(server, capsys):
    assert main(["top", server.url, "--once", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sources"]["train"]["batches_delivered"] == 1
    assert told["rank"] == "5"


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/status.json", "127.0.0.1:{port}"])
def test_an_address_may_be_written_in_many_ways(server, form):
    assert read_status(form.format(server.url, port=server.port))[0]["pid"] == os.getpid()


@pytest.mark.parametrize("more", [["--once"], ["--once", "--json"]])
def test_once_without_a_server_says_so_and_exits_with_1(nobody, more, capsys):
    assert main(["top", nobody, *more]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"error: {nobody}/status.json: no answer: " in shown.err
    assert "refused" in shown.err


@pytest.mark.parametrize("url", ["", "ftp://a", "http://", "http://a:b", "http://[", "a b", "file:///etc/passwd"])
@pytest.mark.parametrize("more", [[], ["--once"]])
def test_what_is_no_address_is_an_error_with_exit_code_1(url, more, capsys):
    assert main(["top", url, *more]) == 1
    assert "error: URL: got" in capsys.readouterr().err


def test_json_without_once_is_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["top", "--json"])
    assert caught.value.code == 2
    assert "--json goes with --once" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.0 404 No\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n{", b"HTTP/1.0 200 OK\r\n\r\n[]", b"SSH-2.0-x\r\n",
               b'HTTP/1.0 200 OK\r\n\r\n{"sources": {"a": 1}}', b"HTTP/1.0 200 OK\r\n\r\n\xff"]
)  # fmt: skip
def test_who_is_no_metrics_server_is_found_out(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def once():
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=once)
        thread.start()
        with pytest.raises(NoAnswer, match=r"/status\.json: "):
            read_status(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_a_proxy_of_the_environment_is_not_asked(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert read_status(server.url)[0]["rank"] == "5"


def test_it_is_refreshed_and_asks_again_when_the_server_is_gone(server):
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True, color_system=None)
    steps = iter(["next", "close", "still", "end"])

    def pause(seconds):
        assert seconds == 1.0
        step = next(steps)
        if step == "next":
            server.coordinator["train"].next_batch()
        elif step == "close":
            server.close()
        elif step == "end":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(server.url, console, pause)
    shown = file.getvalue()
    assert shown.index("rows/s, 1 batches") < shown.index("rows/s, 2 batches") < shown.index("asking again every second")
    assert shown.count("asking again every second") >= 2


def test_waits_are_shares_of_the_time_between_two_frames(server):
    status = read_status(server.url)[0]
    later = json.loads(json.dumps(status))
    later["sources"]["train"]["consumer_wait_seconds"] += 1.5
    later["sources"]["train"]["fetcher_copying_seconds"] += 0.5
    shown = text_of(frame(later, status, 2.0))
    assert "trainer 75%, fetchers 0%" in shown
    assert "fetchers 25%" in shown
    assert "trainer 0.0 s" in text_of(frame({**status, "sources": {"x": {"state": "new"}}}))


def test_errors_failures_and_no_source_are_shown():
    source = {"state": "failed", "reason": "disk full", "fetch_errors": {"OSError": 3}, "verdict": "fetch"}
    shown = text_of(frame({"sources": {"a": source, "b": {"state": "new", "error": "cannot be read"}}}))
    for wanted in ("failed: disk full", "OSError 3", "fetch", "cannot be read"):
        assert wanted in shown
    assert "no source" in text_of(frame({"sources": {}}))


def test_ctrl_c_ends_it_cleanly(server):
    process = subprocess.Popen(
        [sys.executable, "-m", "input_workers", "top", server.url], stdout=-1, stderr=-1, text=True,
        env={**os.environ, "FORCE_COLOR": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert "input-workers" in first + out
    assert (process.returncode, err) == (0, "")


def test_the_pause_is_a_second():
    assert top.INTERVAL_SECONDS == 1.0
