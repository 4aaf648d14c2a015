"""Every example runs as it is, ends by itself, says one line, and warns of nothing."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import input_workers as iw

EXAMPLES = sorted((pathlib.Path(iw.__file__).parent.parent / "docs" / "examples").glob("*.py"))
# What an example must say, where that shows that it did what it promises.
SAYS = {
    "background_generator": "200 frames, each once: True",
    "dataflow": "1000 rows in batches of 64, each once, in order: True",
}


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= set(SAYS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[pathlib.Path, subprocess.CompletedProcess[str]]:
    """Every example in an interpreter of its own, two at a time."""
    folder = tmp_path_factory.mktemp("examples")

    def run(path: pathlib.Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(EXAMPLES, pool.map(run, EXAMPLES), strict=True))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_is(runs: dict[pathlib.Path, subprocess.CompletedProcess[str]], path: pathlib.Path) -> None:
    done = runs[path]
    assert done.returncode == 0, done.stderr
    # TensorFlow greets on stderr, whatever it is told.
    assert not [line for line in done.stderr.splitlines() if "Warning:" in line or "Traceback" in line], done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert SAYS.get(path.stem, "") in done.stdout
