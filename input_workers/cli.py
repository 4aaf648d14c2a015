"""The command line: `input-workers train | check | verify-resume | bench | top`. Arguments go in, an exit code comes out.

0: done. 1: it failed, or the configuration has faults; the message says why. 2: the command line is wrong.
130: interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from input_workers.errors import ConfigError, InputWorkersError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

FAILED, INTERRUPTED = 1, 130
DEFAULT_URL = "http://127.0.0.1:9108"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; `arguments` are those of the process by default. Returns the exit code."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.command == "top" and parsed.json and not parsed.once:
        parser.error("top: --json goes with --once")
    try:
        if parsed.command == "train":
            return _train(parsed.config, parsed.resume)
        if parsed.command == "check":
            return _check(parsed.config)
        if parsed.command == "verify-resume":
            return _verify_resume(parsed.config, parsed.at)
        if parsed.command == "top":
            return _top(parsed.url, parsed.once, parsed.json)
        if parsed.benchmark == "headspace":
            bounds = {"rounds": parsed.rounds, "seconds": parsed.seconds, "steps": parsed.steps}
            return _headspace(parsed.config, bounds, parsed.json)
        return _bench(parsed.benchmark, parsed.only, getattr(parsed, "beside", None))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except InputWorkersError as error:
        if parsed.debug:
            raise
        print(f"error: {_explain(error)}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="input-workers", description="An input service inside a trainer.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train the model of a configuration, and show where rows and time went")
    train.add_argument("config", metavar="CONFIG.toml")
    train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in checkpoint.folder")
    check = commands.add_parser("check", help="say what is wrong with a configuration, everything at once")
    check.add_argument("config", metavar="CONFIG.toml")
    verify = commands.add_parser("verify-resume", help="read both sources whole, and again with stops: do the same rows come?")
    verify.add_argument("config", metavar="CONFIG.toml")
    verify.add_argument(
        "--at", type=int, action="append", required=True, metavar="BATCH", help="stop after so many batches; may be repeated"
    )
    bench = commands.add_parser("bench", help="measure the package against the limits of this machine")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name in ("auto", "core", "device", "keras", "loader", "processes", "streams"):
        one = benchmarks.add_parser(name)
        one.add_argument("only", nargs="?", default="", help="run only those whose name contains this")
        if name in ("core", "processes"):
            one.add_argument("--beside", metavar="PATH", help="compare with the version of the package in this folder")
    headspace = benchmarks.add_parser(
        "headspace", help="how much faster the training of a configuration would be with free data"
    )
    headspace.add_argument("config", metavar="CONFIG.toml")
    headspace.add_argument("--rounds", type=_count, default=5, help="how often each side is measured; by default 5")
    headspace.add_argument("--seconds", type=_seconds, default=2.0, help="of each side in each round; by default 2")
    headspace.add_argument("--steps", type=_count, help="instead of --seconds: training steps of each side in each round")
    headspace.add_argument("--json", action="store_true", help="print the numbers as JSON")
    top = commands.add_parser("top", help="show the numbers of a trainer that serves its metrics, refreshed every second")
    top.add_argument("url", metavar="URL", nargs="?", default=DEFAULT_URL, help=f"by default {DEFAULT_URL}")
    top.add_argument("--once", action="store_true", help="show them once, and end")
    top.add_argument("--json", action="store_true", help="with --once: print them as JSON")
    for command in (
        train,
        check,
        verify,
        bench,
        *benchmarks.choices.values(),
        top,
    ):  # after the command too; left out there, it does not undo the first
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _train(path: str, resume: bool) -> int:
    from input_workers.config import load_config
    from input_workers.jobs.train import train

    train(load_config(path), _console(), resume=resume)
    return 0


def _verify_resume(path: str, at: Sequence[int]) -> int:
    from input_workers.config import load_config
    from input_workers.jobs.verify_resume import verify_resume

    return 0 if verify_resume(load_config(path), at, _console()) else FAILED


def _top(url: str, once: bool, as_json: bool) -> int:
    from input_workers.metrics.top import read_status, show_once, watch

    if as_json:
        print(read_status(url)[1])
    elif once:
        show_once(url, _console())
    else:
        try:
            watch(url, _console())
        except KeyboardInterrupt:
            pass  # that is how it is ended
    return 0


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    # Names of files and classes are shown as they are, and lines are cut by nobody.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _check(path: str) -> int:
    from input_workers.config import load_config

    load_config(path)
    print(f"{path}: ok")
    return 0


def _bench(benchmark: str, only: str, beside: str | None) -> int:
    name = f"input_workers.bench.{benchmark}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"bench {benchmark} needs {error.name}: pip install input-workers[bench]") from error
    if beside is not None:
        from input_workers.bench.versions import report_versions

        return report_versions(benchmark, module.WORKLOADS, beside, only)
    return int(module.main(only))


def _headspace(path: str, bounds: dict[str, Any], as_json: bool) -> int:
    from input_workers.bench.headspace import Bounds, headspace
    from input_workers.config import load_config

    found = headspace(load_config(path), _console(stderr=as_json), Bounds(**bounds))
    print(found.as_json() if as_json else found)
    return 0 if found.nonsense is None else FAILED


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}; wanted a whole number of at least 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}; wanted seconds above 0")
    return number


def _explain(error: BaseException) -> str:
    """Return the message of an error, and of its cause where it does not tell it already."""
    text = str(error)
    cause = error.__cause__
    if cause is not None and str(cause) not in text and isinstance(error, InputWorkersError):
        text = f"{text}: {_explain(cause)}"
    return text


if __name__ == "__main__":
    sys.exit(main())
