"""Another version of the package is really the one that runs, in turn with this one, and what fails is an error."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import input_workers as iw
from input_workers import cli
from input_workers.bench import core, processes, versions
from input_workers.bench.versions import Figure, Workload

ROOT = Path(iw.__file__).resolve().parents[1]


@pytest.fixture
def other(tmp_path):
    """Return a folder with another version, whose benchmarks lack the workloads of this one."""
    ignore = shutil.ignore_patterns("__pycache__", "bench")
    shutil.copytree(ROOT / "input_workers", tmp_path / "input_workers", ignore=ignore)
    (tmp_path / "input_workers" / "bench").mkdir()
    (tmp_path / "input_workers" / "bench" / "__init__.py").touch()
    return tmp_path


def test_lower_may_be_better():
    assert Figure("rate", 6.0, "rows/s").times(Figure("rate", 3.0, "rows/s")) == 2.0
    assert Figure("time", 6.0, "us", lower_is_better=True).times(Figure("time", 3.0, "us", lower_is_better=True)) == 0.5


def test_versions_take_turns_and_each_is_first(monkeypatch):
    order = []

    def run(benchmark, name, environment, version):
        order.append(version)
        value = 2.0 if version == versions.THIS_VERSION else 1.0
        return [Figure("rate", value, "rows/s"), Figure("time", value, "us", lower_is_better=True)]

    monkeypatch.setattr(versions, "run_in_child", run)
    this, other = versions.THIS_VERSION, Path("other")
    rate, time = versions.compare_versions("core", "x", Workload(list), other, rounds=3)
    assert order == [this, other, other, this, this, other]
    assert (rate.value, time.value) == (2.0, 0.5)
    assert "2 beside 1 rows/s" in rate.note


def test_another_version_runs_the_workloads_of_this_one(other):
    (figure,) = versions.run_in_child("core", "waiting", version=other)
    assert 0 < figure.value <= 1.1


def test_worker_processes_of_another_version_find_the_functions_of_this_one(other):
    pytest.importorskip("cloudpickle")
    (figure,) = versions.run_in_child("processes", "python", version=other)
    assert figure.value > 0


def test_a_package_that_fails_is_named_with_its_own_words(other):
    (other / "input_workers" / "__init__.py").write_text("raise RuntimeError('a broken version')")
    with pytest.raises(RuntimeError, match=rf"'waiting' failed with the package in {other}(.|\n)*a broken version"):
        versions.run_in_child("core", "waiting", version=other)


def test_a_folder_without_the_package_is_an_error(tmp_path):
    with pytest.raises(iw.ConfigError, match="--beside must be a folder that contains the package input_workers, got"):
        versions.report_versions("core", core.WORKLOADS, str(tmp_path), "")


@pytest.mark.parametrize("benchmark", [core, processes])
def test_a_workload_that_does_not_exist_is_an_error(benchmark):
    with pytest.raises(iw.ConfigError, match="unknown part 'nosuch'"):
        versions.report_versions(benchmark.__name__.split(".")[-1], benchmark.WORKLOADS, str(ROOT), "nosuch")


def test_only_what_other_versions_can_run_is_compared(monkeypatch, capsys):
    compared = []
    monkeypatch.setattr(versions, "compare_versions", lambda benchmark, name, workload, other: compared.append(name) or [])
    assert cli.main(["bench", "core", "--beside", str(ROOT)]) == 0
    assert compared == [name for name in core.WORKLOADS if not name.startswith("large_")]


@pytest.mark.parametrize("benchmark", ["core", "processes"])
def test_the_command_line_says_which_part_is_unknown(benchmark):
    command = [sys.executable, "-m", "input_workers", "bench", benchmark, "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown part 'nosuch'; the parts are ")
