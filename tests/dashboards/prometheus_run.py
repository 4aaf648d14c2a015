"""A real Prometheus, with the configuration and rules of `dashboards/`, beside a real trainer that it scrapes each second."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import psutil

__all__ = ["DASHBOARDS", "Prometheus", "running"]

DASHBOARDS = pathlib.Path(__file__).parents[2] / "dashboards"
HANG_SECONDS = 180.0
LOOK_SECONDS = 0.2  # between two looks at another process

# What the run must have shown before it is looked at. It takes about 25 s.
SHOWN = (
    'input_workers_state{source="failing", state="failed"} == 1',
    'input_workers_fetcher_restarts_total{source="healthy"} >= 1',
    'input_workers_verdict{source="slow", verdict="fetch"} == 1',
    'input_workers_verdict{source="healthy", verdict="trainer"} == 1',
    'input_workers_batches_total{source="slow"} >= 50',
)


def wait_for(condition: Callable[[], Any], what: str, process: subprocess.Popen[str]) -> Any:
    """Return what a condition on another process returns, once that is true."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        found = condition()
        if found:
            return found
        assert process.poll() is None, f"it ended with {process.returncode} before {what}"
        assert time.monotonic() < deadline, f"never came true: {what}"
        threading.Event().wait(LOOK_SECONDS)


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.begun = self.ended = 0.0  # Unix time

    def ask(self, path: str, **arguments: Any) -> Any:
        """Return the data of an answer."""
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}", timeout=60) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def now(self, expression: str) -> list[tuple[dict[str, str], list[float]]]:
        """Return (labels, one value) of the series of an expression: at this moment, or the last one of the run."""
        at = {"time": self.ended} if self.ended else {}
        return [(each["metric"], [float(each["value"][1])]) for each in self.ask("query", query=expression, **at)["result"]]

    def over(self, expression: str) -> list[tuple[dict[str, str], list[float]]]:
        """Return (labels, values a second apart) of the series of an expression, over the whole run."""
        data = self.ask("query_range", query=expression, start=self.begun, end=self.ended, step=1)
        return [(each["metric"], [float(value) for _, value in each["values"]]) for each in data["result"]]


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _port(pid: int) -> int | None:
    listens = [each.laddr.port for each in psutil.Process(pid).net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return listens[0] if listens else None


@contextlib.contextmanager
def _trainer(folder: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", str(pathlib.Path(__file__).with_name("small_trainer.py")), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
            process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()


@contextlib.contextmanager
def _prometheus(program: str, target: str, folder: pathlib.Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    for name in ("rules.yml", "alerts.yml"):
        shutil.copy(DASHBOARDS / name, folder)
    config = (DASHBOARDS / "prometheus.yml").read_text()
    for ours, here in (("127.0.0.1:9108", target), ("_interval: 15s", "_interval: 1s")):
        assert ours in config
        config = config.replace(ours, here)
    (folder / "prometheus.yml").write_text(config)
    data = f"--storage.tsdb.path={folder / 'data'}"
    command = [program, f"--config.file={folder / 'prometheus.yml'}", data, "--web.listen-address=127.0.0.1:0"]
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log, text=True) as process:
        try:
            port = wait_for(lambda: _port(process.pid), "Prometheus listens", process)
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: _is_ready(url), "Prometheus is ready", process)
            yield process, url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def running(program: str, folder: pathlib.Path) -> Iterator[Prometheus]:
    """Run both until everything that is looked for was shown; then the numbers stand."""
    with _trainer(folder) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        target = trainer.stdout.readline().strip().removeprefix("http://")
        with _prometheus(program, target, folder) as (process, url):
            prometheus = Prometheus(url)
            wait_for(lambda: prometheus.now("up == 1"), "the trainer was scraped", process)
            prometheus.begun = time.time()
            trainer.stdin.write("go\n")
            trainer.stdin.flush()
            for shown in SHOWN:
                wait_for(lambda shown=shown: prometheus.now(shown), shown, process)
            prometheus.ended = time.time()
            yield prometheus
