"""What both tests of Keras do: checks run in a process of their own, since Keras has one backend in each."""

import os
import pathlib
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor


def start(child, backend, *arguments):
    """Start a file of checks on a backend of Keras."""
    path = os.pathsep.join(filter(None, [str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": path}
    command = [sys.executable, "-W", "error::UserWarning", str(child), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_all(child, arguments):
    """Run a file of checks on several backends, two at a time; return (stdout, stderr, exit code) of each."""

    def run(backend):
        with start(child, backend, *arguments[backend]) as running:
            return *running.communicate(timeout=300), running.returncode

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(arguments, pool.map(run, arguments), strict=True))


def check_run(run, checks):
    """Look at one of these runs: every check was made, and held."""
    out, errors, returncode = run
    assert returncode == 0, out + errors
    assert len([line for line in out.splitlines() if line.startswith("ok")]) == checks


def make_checks(checks):
    """Make (name, check) one after the other, in the child; print a line for each, and exit with 1 if one did not hold."""
    failed = False
    for name, check in checks:
        try:
            check()
            print("ok", name, flush=True)  # noqa: T201
        except BaseException:
            failed = True
            print("FAILED", name, traceback.format_exc(), flush=True)  # noqa: T201
    sys.exit(failed)
