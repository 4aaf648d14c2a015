"""What the package promises to those who import it: names, cheap imports, layers, sizes, and an example that runs."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import input_workers as iw

ROOT = pathlib.Path(iw.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = {file: ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for file in FILES}
MAX_LINES = 350

# From below to above: a module may import what is below it. Inside one entry, modules of the same folder know each other.
LAYERS: list[set[str]] = [
    {"errors"},
    {"contracts"},
    {
        "lifecycle",
        "leases",
        "packed_rows",
        "policy",
        "progress",
        "checks",
        "config",
        "cores",
        "metrics.device_recorder",
        "metrics.histogram",
        "metrics.instruments",
        "metrics.fetcher_recorder",
        "metrics.recorder",
        "metrics.snapshot",
        "metrics.timed",
        "metrics.trace",
        "metrics.trace_events",
        "metrics.verdict",
        "metrics.windows",
        "metrics.worker_count",
    },
    {"sources", "fetchers", "flow", "feeds"},
    {"coordinator"},
    {
        "metrics.exporter",
        "metrics.http_messages",
        "metrics.pages",
        "metrics.server",
        "metrics.status_page",
        "metrics.top",
        "adapters",
        "staging",
    },
    {"jobs", "bench"},
    {"cli", "__main__"},
]
# The flow's device and enqueuer hold a feed by its Protocol; nothing else is shared between the four siblings but counters.


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by the alphabet."""
    return 0 if name.isupper() else 1 if name[:1].isupper() else 2, name


def layer_of(name: str) -> tuple[int, str] | None:
    """Return (height, room) of a module; None for the package itself and for folders without a layer of their own."""
    inner = name.removeprefix("input_workers").lstrip(".")
    for height, rooms in enumerate(LAYERS):
        for room in rooms:
            if inner == room or inner.startswith(f"{room}."):
                return height, room
    return None


def imports_of(file: pathlib.Path) -> set[str]:
    """Return the modules of the package that a file names in import statements, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in NAMES.values() else str(node.module) for name in inner}
    return {name for name in found if name.split(".")[0] == "input_workers"}


def test_all_is_sorted_and_every_name_in_it_is_there() -> None:
    assert iw.__all__ == sorted(set(iw.__all__), key=order)
    for name in iw.__all__:
        assert getattr(iw, name) is not None


@pytest.mark.parametrize("file", FILES, ids=lambda file: NAMES[file])
def test_every_module_lists_its_names_sorted_and_defines_them(file: pathlib.Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "the first line says what enters and what leaves"
    listed = [node for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"]
    if not listed:
        return
    names = ast.literal_eval(listed[0].value)
    assert names == sorted(set(names), key=order)
    text = file.read_text()
    assert all(re.search(rf"\b{name}\b", text.replace(f'"{name}"', "")) for name in names)


def test_every_public_error_is_in_the_tree_of_errors() -> None:
    errors = [getattr(iw, name) for name in iw.__all__ if isinstance(getattr(iw, name), type)
              and issubclass(getattr(iw, name), BaseException)]  # fmt: skip
    assert len(errors) == 15
    assert all(issubclass(error, iw.InputWorkersError) for error in errors)
    for error, base in ((iw.ConfigError, ValueError), (iw.SpecMismatch, ValueError), (iw.LifecycleError, RuntimeError),
                        (iw.WaitTimeout, TimeoutError), (iw.StateMismatch, ValueError), (iw.FetchFailed, iw.SourceFailed),
                        (iw.WorkerDied, iw.SourceFailed), (iw.FetchTimeout, iw.SourceFailed)):  # fmt: skip
        assert issubclass(error, base)


def test_importing_loads_numpy_and_no_framework_and_starts_nothing() -> None:
    heavy = {"tensorflow", "keras", "torch", "jax", "cv2", "ray", "prometheus_client", "waitress", "pydantic", "rich",
             "sklearn"}  # fmt: skip
    script = "import threading, input_workers; assert threading.active_count() == 1"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", script], capture_output=True, text=True, timeout=60,
                          check=True, cwd=ROOT.parent)  # fmt: skip
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"numpy", "input_workers"} <= loaded
    assert not loaded & heavy


@pytest.mark.parametrize("file", FILES, ids=lambda file: NAMES[file])
def test_imports_only_go_down(file: pathlib.Path) -> None:
    mine = layer_of(NAMES[file])
    if mine is None:
        assert file.name == "__init__.py", f"{NAMES[file]} has no layer; give it one in LAYERS"
        return
    for name in imports_of(file):
        if name == "input_workers":
            assert mine[0] >= 5, f"{NAMES[file]} imports the package itself"
            continue
        other = layer_of(name)
        if other is not None:
            same_room = other[1] == mine[1]
            same_floor = other[0] == mine[0] and mine[0] not in (3, 4)
            assert other[0] < mine[0] or same_room or same_floor, f"{NAMES[file]} imports {name}, which is above or beside it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: NAMES[file])
def test_a_file_stays_one_subject_long(file: pathlib.Path) -> None:
    assert len(file.read_text().splitlines()) <= MAX_LINES


def test_the_example_in_the_readme_runs_as_written(tmp_path: pathlib.Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT.parent / "README.md").read_text(), re.DOTALL)
    assert blocks, "README.md shows no Python"
    done = subprocess.run([sys.executable, "-W", "error", "-c", blocks[0]], capture_output=True, text=True, timeout=120,
                          check=False, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT.parent)})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
