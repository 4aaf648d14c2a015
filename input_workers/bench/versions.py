"""This version of the package beside another one, on the same workloads in the same run.

A child process runs one workload once. It has the package of one version, and the benchmarks of this version.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import input_workers as iw
from input_workers.bench.measure import ROUNDS, Drained, Result, report

__all__ = ["Figure", "Workload", "figures_of", "report_versions", "run_in_child"]

HERE = Path(__file__).resolve().parent
THIS_VERSION = HERE.parents[1]

# The modules of input_workers.bench are looked up in this version's folder, everything else in PYTHONPATH. Functions for
# worker processes are sent by value, because the workers would look for them in the other version.
CHILD = """
import importlib, json, sys
from dataclasses import asdict
import input_workers, input_workers.bench
folder, benchmark, name = sys.argv[1:]
input_workers.bench.__path__ = [folder]
module = importlib.import_module(f"input_workers.bench.{benchmark}")
if benchmark == "processes":
    import cloudpickle
    cloudpickle.register_pickle_by_value(module)
figures = [asdict(figure) for figure in module.WORKLOADS[name].run()]
print(json.dumps({"package": input_workers.__file__, "figures": figures}))
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that a workload has measured."""

    name: str
    value: float
    unit: str
    lower_is_better: bool = False

    def times(self, other: Figure) -> float:
        """Return how many times as good as another figure this one is; above 1: better."""
        return other.value / self.value if self.lower_is_better else self.value / other.value


@dataclass(frozen=True, slots=True)
class Workload:
    """Something that a child process measures, of this version or another.

    Attributes:
        run: runs it once, through nothing but the public API.
        environment: variables that the process must be started with.
        is_compared: whether other versions can run it.
    """

    run: Callable[[], list[Figure]]
    environment: Mapping[str, str] = field(default_factory=dict)
    is_compared: bool = True


def figures_of(name: str, drained: Drained) -> list[Figure]:
    """Return the rate and the processor time of a source that was read to its end."""
    return [
        Figure(name, drained.rate, "rows/s"),
        Figure(f"{name}, processor time", drained.processor_us, "us/row", lower_is_better=True),
    ]


def run_in_child(
    benchmark: str, name: str, environment: Mapping[str, str] | None = None, version: Path = THIS_VERSION
) -> list[Figure]:
    """Run a workload once in a fresh process, with the package in the folder `version`.

    Raises:
        RuntimeError: the child has failed, or has imported the package from somewhere else.
    """
    # Without -P, the current folder would come before PYTHONPATH.
    command = [sys.executable, "-P", "-c", CHILD, str(HERE), benchmark, name]
    environment = {**os.environ, **(environment or {}), "PYTHONPATH": str(version)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"benchmark: workload {name!r} failed with the package in {version}:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if Path(answer["package"]).resolve().parents[1] != version.resolve():
        raise RuntimeError(f"benchmark: expected the package in {version}, got {answer['package']}")
    return [Figure(**figure) for figure in answer["figures"]]


def compare_versions(benchmark: str, name: str, workload: Workload, other: Path, rounds: int = ROUNDS) -> list[Result]:
    """Run a workload with both versions in turn; return how many times as good this version is, one line per figure."""
    measured: dict[Path, list[list[Figure]]] = {THIS_VERSION: [], other: []}
    for number in range(rounds):
        # Who is first changes, so a machine that becomes slower is no advantage of either.
        for version in (THIS_VERSION, other) if number % 2 == 0 else (other, THIS_VERSION):
            measured[version].append(run_in_child(benchmark, name, workload.environment, version))
    # Turned from figures by round into rounds by figure.
    return [
        _ratio(new, old)
        for new, old in zip(zip(*measured[THIS_VERSION], strict=True), zip(*measured[other], strict=True), strict=True)
    ]


def _ratio(new: Sequence[Figure], old: Sequence[Figure]) -> Result:
    ratios = [a.times(b) for a, b in zip(new, old, strict=True)]
    medians = [statistics.median(figure.value for figure in side) for side in (new, old)]
    # Other work on the machine can only make a round slower, so the best rounds show least of it.
    best = [(min if side[0].lower_is_better else max)(side, key=lambda figure: figure.value) for side in (new, old)]
    note = (
        f"{_show(medians[0])} beside {_show(medians[1])} {new[0].unit}; "
        f"rounds {min(ratios):.2f} to {max(ratios):.2f}, best rounds {best[0].times(best[1]):.2f}"
    )
    return Result(f"{new[0].name}, times as good", statistics.median(ratios), None, "", note)


def _show(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def report_versions(benchmark: str, workloads: Mapping[str, Workload], beside: str, only: str) -> int:
    """Compare every workload whose name contains `only` with the version in the folder `beside`, and print the ratios.

    Raises:
        ConfigError: there is no package in that folder, or no workload has such a name.
    """
    other = Path(beside).resolve()
    if not (other / "input_workers" / "__init__.py").is_file():
        raise iw.ConfigError(f"--beside must be a folder that contains the package input_workers, got {beside!r}")
    print(f"this version beside {other}; above 1, this version is better")
    return report(
        {
            name: functools.partial(compare_versions, benchmark, name, workload, other)
            for name, workload in workloads.items()
            if workload.is_compared
        },
        only,
    )
