"""How the fetch function is run: one loop, and backends that run it in many threads or processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from input_workers.checks import check_whole
from input_workers.errors import ConfigError

if TYPE_CHECKING:
    from input_workers.fetchers.context import FetchContext
    from input_workers.fetchers.threads import ThreadFetchers
    from input_workers.metrics.fetcher_recorder import FetcherRecorder

__all__ = ["MAX_WORKERS", "Processes", "StartMethod", "Threads", "chosen_fetchers"]

StartMethod = Literal["forkserver", "spawn", "fork"]

# More fetchers than this is a mistake in a number, not a plan.
MAX_WORKERS = 4096


def _check_bounds(what: str, least: int, most: int) -> None:
    for name, value in (("min_workers", least), ("max_workers", most)):
        check_whole(f"{what}: {name}", value, 1, MAX_WORKERS)
    if least > most:
        raise ConfigError(f"{what}: min_workers={least} is more than max_workers={most}")


@dataclass(frozen=True, slots=True)
class Threads:
    """Fetchers as threads: for fetch functions that wait or release the GIL.

    Attributes:
        min_workers, max_workers: what num_workers="auto" stays within; a number of its own is not bound by them.
        keep_freed_memory: have glibc's malloc keep freed memory, from the start of the source on and for the whole process:
            see `input_workers.fetchers.malloc`. For functions that return large new arrays from each call.

    Raises:
        ConfigError: a value is wrong. Raised by the start of the source: the system has no glibc for `keep_freed_memory`.
    """

    min_workers: int = 1
    max_workers: int = 128  # a thread that waits costs little: some 30 KB, and a hand-over for each chunk
    keep_freed_memory: bool = False

    kind: ClassVar[Literal["thread", "process"]] = "thread"
    abandons_calls: ClassVar[bool] = True  # a thread cannot be killed: a call that hangs is given to another

    def __post_init__(self) -> None:
        if not isinstance(self.keep_freed_memory, bool):
            raise ConfigError(f"Threads: keep_freed_memory must be True or False, got {self.keep_freed_memory!r}")
        _check_bounds("Threads", self.min_workers, self.max_workers)

    @property
    def option_for_workers(self) -> str | None:
        """The name of an option that has an effect only where there are workers, if one was given."""
        return "keep_freed_memory" if self.keep_freed_memory else None

    def make_backend(
        self,
        context: FetchContext,
        recorders: Sequence[FetcherRecorder],
        resting: Sequence[FetcherRecorder],
        on_end: Callable[[], None],
    ) -> ThreadFetchers:
        """Return what runs the fetchers of a run. Raises ConfigError: freed memory cannot be kept on this system."""
        from input_workers.fetchers.malloc import keep_freed_memory
        from input_workers.fetchers.threads import ThreadFetchers

        if self.keep_freed_memory:
            keep_freed_memory()
        return ThreadFetchers(context, recorders, resting, on_end)


@dataclass(frozen=True, slots=True)
class Processes:
    """Fetchers as processes: for fetch functions that hold the interpreter lock, or may crash.

    The function is sent by cloudpickle: a worker imports what it needs, not your main module. BLAS, OpenMP and OpenCV have
    one thread in a worker, unless the environment says otherwise. What is written to stdout and stderr comes out here, line
    by line, marked with the worker. SIGINT (Ctrl-C) is left to the parent; workers end with it, however it ends.

    Attributes:
        start: "forkserver" (default on Linux), "spawn", or "fork", which is refused while threads run.
        worker_init_fun: `worker_init_fun(worker_id)`, once in each worker, before its first call.
        restarts: how many deaths of a worker within a minute are made good by starting another.
        preload: modules that take long to import: the process that forks the workers imports them once, so each worker
            starts with them. They must not start threads that work. Only "forkserver" needs it.
        min_workers, max_workers: what num_workers="auto" stays within; a number of its own is not bound by them.

    Raises:
        ConfigError: a value is wrong.
    """

    start: StartMethod | None = None
    worker_init_fun: Callable[[int], object] | None = None
    restarts: int = 3
    preload: tuple[str, ...] = ()
    min_workers: int = 1
    max_workers: int = 32  # a process costs what its imports do, often 100 MB or more

    kind: ClassVar[Literal["thread", "process"]] = "process"
    abandons_calls: ClassVar[bool] = False  # the process of a call that hangs is killed

    def __post_init__(self) -> None:
        if self.start not in (None, "forkserver", "spawn", "fork"):
            raise ConfigError(f"Processes: start: got {self.start!r}; wanted 'forkserver', 'spawn' or 'fork'")
        if self.worker_init_fun is not None and not callable(self.worker_init_fun):
            raise ConfigError(f"Processes: worker_init_fun: got {self.worker_init_fun!r}; wanted f(worker_id)")
        check_whole("Processes: restarts", self.restarts, 0)
        if not isinstance(self.preload, tuple) or not all(isinstance(name, str) for name in self.preload):
            raise ConfigError(f"Processes: preload: got {self.preload!r}; wanted a tuple of names of modules")
        _check_bounds("Processes", self.min_workers, self.max_workers)

    @property
    def option_for_workers(self) -> str | None:
        """The name of an option that has an effect only where there are workers, if one was given."""
        return "worker_init_fun" if self.worker_init_fun is not None else "preload" if self.preload else None

    def make_backend(
        self,
        context: FetchContext,
        recorders: Sequence[FetcherRecorder],
        resting: Sequence[FetcherRecorder],
        on_end: Callable[[], None],
    ) -> ThreadFetchers:
        """Return what runs the fetchers of a run. Raises ConfigError: the function cannot be sent to processes."""
        from input_workers.fetchers.processes import ProcessFetchers

        return ProcessFetchers(self, context, recorders, resting, on_end)

    @property
    def start_method(self) -> StartMethod:
        """How processes are started."""
        return self.start if self.start is not None else "forkserver" if hasattr(os, "pidfd_open") else "spawn"


def chosen_fetchers(fetchers: object) -> Threads | Processes:
    """Return what the user has chosen, by name or with options. Raises ConfigError."""
    if isinstance(fetchers, (Threads, Processes)):
        return fetchers
    if fetchers == "thread":
        return Threads()
    if fetchers == "process":
        return Processes()
    if fetchers == "ray":
        raise ConfigError("fetchers='ray' is not built yet; wanted 'thread' or 'process'")
    raise ConfigError(f"fetchers: got {fetchers!r}; wanted 'thread', 'process', iw.Threads() or iw.Processes(...)")
