"""Fetchers as processes: free of the interpreter lock, and of each other's crashes. Each has a thread here that serves it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

from input_workers.errors import ConfigError
from input_workers.fetchers import Processes
from input_workers.fetchers.context import FetchContext
from input_workers.fetchers.fetch_loop import fetch_loop
from input_workers.fetchers.fetcher import Fetcher
from input_workers.fetchers.process_launch import refuse_fork_beside_threads
from input_workers.fetchers.threads import ThreadFetchers, stack_of
from input_workers.fetchers.worker_calls import WorkerCalls
from input_workers.fetchers.worker_job import WorkerSettings
from input_workers.fetchers.worker_output import WorkerOutput
from input_workers.metrics.fetcher_recorder import FetcherRecorder

__all__ = ["ProcessFetchers", "pickled"]


class ProcessFetchers(ThreadFetchers):
    """Runs the fetch loop in threads whose calls are made in worker processes.

    The process of a fetcher that rests has ended; but that of a plain function, which may be amid its data, waits.

    Args:
        options: how processes are started.
        context, recorders, resting, on_end: as for ThreadFetchers.

    Raises:
        ConfigError: the function cannot be sent to processes.
    """

    watches_calls = False  # each thread watches the calls of its worker

    def __init__(
        self,
        options: Processes,
        context: FetchContext,
        recorders: Sequence[FetcherRecorder],
        resting: Sequence[FetcherRecorder],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(context, recorders, resting, on_end)
        calls, init = context.calls, options.worker_init_fun
        self._settings = WorkerSettings(
            context,
            options,
            pickled(calls.function, "the source's fetch" if calls.is_stream else "the fetch function"),
            None if init is None else pickled(init, "worker_init_fun"),
            WorkerOutput(context.source),
        )
        self._calls = {each.worker_id: WorkerCalls(self._settings, each.worker_id) for each in recorders}
        # Workers that have a process and no thread that serves it: those that rest, and one that is just being added.
        self._waiting: set[int] = set()
        self._is_shut_down = False

    def start(self) -> None:
        """Start every process, or none. Raises ConfigError: fork beside threads; OSError: a limit of the system."""
        if self._settings.options.start_method == "fork":
            refuse_fork_beside_threads()
        try:
            for number, calls in enumerate(self._calls.values(), 1):
                try:
                    calls.launch()
                except OSError as error:
                    raise OSError(
                        error.errno,
                        f"source {self.context.source!r}: worker process {number} of {len(self._calls)} cannot be started: "
                        f"{error.strerror or error} ({_limits()})",
                    ) from error
            self._settings.output.start()
            super().start()
        except BaseException:
            self.shut_down()
            deadline = time.monotonic() + UNDO_SECONDS
            if not super().join(deadline):  # those that were started serve their workers to the end
                for calls in self._calls.values():
                    calls.close()
            self._settings.output.stop(deadline)
            raise

    def prepare(self, fetcher: Fetcher) -> None:
        """Start another process while the source runs, unless one waits. Raises OSError."""
        if fetcher.worker_id in self._waiting:
            return
        calls = WorkerCalls(self._settings, fetcher.worker_id)
        self._calls[fetcher.worker_id] = calls
        if self._is_shut_down:  # after that flag is set, whatever is in `_calls` is shut down
            calls.shut_down()
        calls.launch(beside_threads=True)
        self._waiting.add(fetcher.worker_id)  # until its thread is there: should that not start, others end the process

    def serve(self, fetcher: Fetcher) -> bool:
        """Run the fetch loop, with calls that the fetcher's worker makes."""
        calls = self._calls[fetcher.worker_id]
        self._waiting.discard(fetcher.worker_id)
        is_through = True
        try:
            is_through = fetch_loop(fetcher, self.context, calls)
        finally:
            if fetcher.released and not is_through and not calls.is_stream:
                self._waiting.add(fetcher.worker_id)
            else:
                calls.close()
        return is_through

    def ended(self) -> None:
        """The last fetcher has ended, and its worker too; those that wait are ended here, or they would wait for a stop."""
        for each in self._waiting:
            self._calls[each].shut_down()
        for each in self._waiting:
            self._calls[each].close()
        self._settings.output.stop(time.monotonic() + UNDO_SECONDS)
        super().ended()

    @property
    def block_bytes(self) -> int:  # type: ignore[override]
        """The shared memory of all workers' chunks."""
        return sum(calls.block_bytes for calls in list(self._calls.values()))

    def shut_down(self) -> None:
        """Have every worker end, and those that wait for it."""
        self._is_shut_down = True
        for calls in list(self._calls.values()):
            calls.shut_down()

    def has_thread(self, thread: Thread) -> bool:
        """Whether this is one of the fetchers' threads."""
        return super().has_thread(thread) or thread is self._settings.output.thread

    def join(self, deadline: float) -> list[tuple[str, str]]:
        """End the workers, killing those that are in a call; return (name, stack) of threads that did not end in time."""
        self.shut_down()
        stuck = super().join(deadline)
        if not stuck:
            stuck = [(thread.name, stack_of(thread)) for thread in self._settings.output.stop(deadline)]
        return stuck


# When a start is undone, or a run has ended by itself, what is left of it gets this long.
UNDO_SECONDS = 2.0


def _limits() -> str:
    """Return the limits that starting a process runs into."""
    names = {"RLIMIT_NOFILE": "descriptors", "RLIMIT_NPROC": "processes and threads", "RLIMIT_AS": "memory"}
    found = [(name, what, resource.getrlimit(getattr(resource, name))[0]) for name, what in names.items()]
    return ", ".join(f"{name}, {what}: {limit}" for name, what, limit in found if limit != resource.RLIM_INFINITY)


def pickled(value: Any, what: str) -> bytes:
    """Return the value as cloudpickle has it. Raises ConfigError, naming what of it cannot be sent."""
    try:
        import cloudpickle
    except ModuleNotFoundError as error:
        raise ConfigError("fetchers='process' needs cloudpickle: pip install input-workers[process]") from error
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        culprit = _culprit(value, what, cloudpickle.dumps, 4)
        raise ConfigError(
            f"fetchers='process': {culprit} cannot be sent to a worker process: {type(error).__name__}: {error}; wanted "
            "something that can be pickled; open files, locks and connections in worker_init_fun, or at first use"
        ) from error


def _culprit(value: Any, path: str, dumps: Callable[[Any], object], depth: int) -> str:
    """Return the path of the innermost part of the value that cannot be pickled."""
    parts: dict[str, Any] = {}
    if hasattr(value, "__self__"):
        parts[f"the object of {path}"] = value.__self__
    code, closure = getattr(value, "__code__", None), getattr(value, "__closure__", None)
    if code is not None:
        for name, cell in zip(code.co_freevars, closure or (), strict=False):
            parts[f"{path}'s variable {name!r}"] = cell.cell_contents
        for name in code.co_names:
            if name in value.__globals__:
                parts[f"{path}'s global {name!r}"] = value.__globals__[name]
    elif isinstance(value, dict):
        parts |= {f"{path}[{key!r}]": part for key, part in value.items()}
    elif isinstance(value, (list, tuple)):
        parts |= {f"{path}[{index}]": part for index, part in enumerate(value)}
    else:
        parts |= {f"{path}.{name}": part for name, part in getattr(value, "__dict__", {}).items()}
    for name, part in parts.items():
        try:
            dumps(part)
        except Exception:
            return _culprit(part, name, dumps, depth - 1) if depth else name
    return f"{path} ({type(value).__qualname__})"
